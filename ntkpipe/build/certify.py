"""Certify a whole stored kernel against its source: K v, tile by tile, and what the source says it is."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np

from ntkpipe.base.progress import Ticks
from ntkpipe.build.source import TileSource, Vector
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelSet
from ntkpipe.store.layout import planes
from ntkpipe.store.manifest import Manifest
from ntkpipe.store.store import Store
from ntkpipe.store.verification import Finding, VerificationReport, record_report, verify_and_record

# Largest row error of a good store, by the coarsest dtype used, on the scale sqrt(K_ii * trace K).
_TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "tf32": 1e-2, "bfloat16": 5e-2}
# A row is suspect if its error exceeds the median by this factor; rounding stays below 8 for a million rows.
_OUTLIER = 16.0
_SHOWN = 50
NOT_CERTIFIED = Finding("certificate", (), "not computed: mend the findings above first", is_harmless=True)


@dataclass(frozen=True)
class Certificate:
    """How well a stored kernel agrees with J(J'v)."""

    array: str  # the kernel
    error: float  # largest row error `|K v - J(J'v)|_i / sqrt(K_ii * sum_j K_jj)`
    median_error: float
    tolerance: float  # bound on the error of a good kernel of this dtype
    suspect_rows: tuple[int, ...]  # rows whose error stands out, the largest first; at most 50
    num_suspects: int  # number of all such rows

    @property
    def is_good(self) -> bool:
        """Whether the error is small and no row stands out."""
        return self.num_suspects == 0 and self.error <= self.tolerance


def certify(
    store: Store, source: TileSource, *, seed: int = 0, step: Callable[[], None] = lambda: None
) -> tuple[Certificate, ...]:
    """Certify every kernel of a complete store."""
    manifest = store.manifest
    rows = next(iter(store.arrays.values())).layout.shape[0]
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=rows)
    exact = source.products(signs, step)
    found: list[Certificate] = []
    wholes: dict[int | None, dict[str, Vector]] = {}
    for plane in planes(manifest):
        group = None if plane.group is None else list(manifest.groups)[plane.group]
        kernels = KernelSet(store, group, plane.output)
        diagonals = {"train": kernels.train.diagonal().astype(np.float64)}
        if manifest.test is not None:
            diagonals["test"] = np.diagonal(kernels.test_diagonal, axis1=1, axis2=2).reshape(-1).astype(np.float64)
        trace = float(diagonals["train"].sum())
        scales = {split: np.sqrt(np.clip(diagonal, 0, None) * trace) for split, diagonal in diagonals.items()}
        if plane.group is None:
            wholes[plane.output] = scales
        for split, scale in scales.items():
            kernel = kernels.train if split == "train" else kernels.test_train
            floor = None if plane.group is None else wholes[plane.output][split]
            product = exact[plane.group, plane.output, split]
            found.append(_judge(kernel, signs, product, scale, floor, manifest))
    return tuple(found)


def verify_with(store: Store, source: TileSource | None, *, progress: bool) -> VerificationReport:
    """Verify a store, and certify its whole kernels by its source if all else is good; the store keeps the report."""
    report = verify_and_record(store, progress=progress)
    if source is None:
        return report
    if not report.is_good:
        return replace(report, findings=(*report.findings, NOT_CERTIFIED))
    with Ticks(source.num_steps(), what="certify", unit="step", enabled=progress) as ticks:
        certificates = certify(store, source, step=ticks.tick)
    findings = (
        Finding(
            each.array,
            (),
            f"K v and J(J'v) differ by up to {each.error:.1e} (tolerance {each.tolerance:.0e}, median "
            f"{each.median_error:.1e}); suspect rows: {', '.join(map(str, each.suspect_rows)) or 'none'}",
        )
        for each in certificates
        if not each.is_good
    )
    shown = tuple({**asdict(each), "is_good": each.is_good} for each in certificates)
    report = replace(report, findings=(*report.findings, *findings), certificates=shown)
    record_report(store, report)
    return report


def _judge(
    kernel: Kernel, signs: Vector, exact: Vector, scale: Vector, whole: Vector | None, manifest: Manifest
) -> Certificate:
    """Judge rows by their scale; in a group, whose Jacobian may vanish up to rounding, also by that of the whole."""
    dtypes = (manifest.compute_dtype, manifest.accumulate_dtype, manifest.store_dtype)
    dtype = max(dtypes, key=lambda dtype: _TOLERANCE[dtype])
    precision = float(np.finfo(np.float64 if dtype == "float64" else np.float32).eps)
    if whole is not None:
        scale = scale + precision**0.5 * whole
    gap = np.abs(_multiply(kernel, signs) - exact)
    errors = np.divide(gap, scale, out=np.where(gap > 0, np.inf, 0.0), where=scale > 0)
    median = float(np.median(errors))
    suspect = np.flatnonzero(errors > _OUTLIER * max(median, precision / 4))
    ranked = suspect[np.argsort(-errors[suspect])]
    return Certificate(
        array=kernel.name,
        error=float(errors.max()),
        median_error=median,
        tolerance=_TOLERANCE[dtype],
        suspect_rows=tuple(int(row) for row in ranked[:_SHOWN]),
        num_suspects=len(suspect),
    )


def _multiply(kernel: Kernel, vector: Vector) -> Vector:
    """``K v`` in float64, reading each stored tile once."""
    grid = kernel.grid
    result = np.zeros(kernel.shape[0])
    for row, column in grid.tiles():
        tile = kernel.read_tile(row, column).astype(np.float64)
        rows, columns = grid.rows.rows(row), grid.columns.rows(column)
        result[rows.start : rows.stop] += tile @ vector[columns.start : columns.stop]
        if grid.symmetric and row != column:
            result[columns.start : columns.stop] += tile.T @ vector[rows.start : rows.stop]
    return result
