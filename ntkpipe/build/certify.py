"""Certify a whole stored kernel against its model: K v, tile by tile, and J(J'v), by plain ``torch.func``."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ntkpipe.base.errors import ConfigError, StoreMismatchError
from ntkpipe.base.kinds import get_kind
from ntkpipe.build.prepare import functional_model, loader
from ntkpipe.jacobian.fallback import JacobianProducts
from ntkpipe.jacobian.model.functional import Forward, fingerprint
from ntkpipe.jacobian.model.samples import Samples, Source, StoredSource, as_samples
from ntkpipe.jacobian.probe import probe_samples
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelSet, KernelStore
from ntkpipe.store.layout import planes
from ntkpipe.store.manifest import DataRecord, Manifest
from ntkpipe.store.verification import Finding, VerificationReport

Vector = NDArray[np.float64]

# Largest row error of a good store, by the coarsest dtype used, on the scale sqrt(K_ii * trace K).
_TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "tf32": 1e-2, "bfloat16": 5e-2}
# A row is suspect if its error exceeds the median by this factor; rounding stays below 8 for a million rows.
_OUTLIER = 16.0
_SHOWN = 50


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


@dataclass(frozen=True)
class Reference:
    """The model and samples of a store, which it is certified against."""

    products: tuple[JacobianProducts, ...]  # one; or one for each output, which sum to the kernel or have one each
    sources: Mapping[str, Source]  # samples by split
    groups: tuple[frozenset[str], ...]  # names of the parameters of each group, and last of those in none

    @property
    def num_steps(self) -> int:
        """Number of ``step`` calls of :func:`certify`: a pass over the train samples, and one per group over all."""
        passes = [self.sources["train"], *len(self.groups) * list(self.sources.values())]
        return sum(len(each.spans(source.num_samples)) for each in self.products for source in passes)


def find_reference(
    store: KernelStore, model: nn.Module, inputs: object, test_inputs: object, *, forward: Forward, device: str | None
) -> Reference:
    """Check that model and samples are those of the store, and prepare their products."""
    manifest = store.manifest
    sources: dict[str, Source] = {}
    for split, given, record in (("train", inputs, manifest.train), ("test", test_inputs, manifest.test)):
        if given is not None:
            sources[split] = _matching_samples(store, given, record, split).source
        elif record is not None:
            if manifest.derived is not None and not manifest.derived.has_samples:
                raise ConfigError(
                    f"{store.path} was derived without the samples; needed inputs and, if it has a test set, "
                    "test_inputs"
                )
            sources[split] = StoredSource(store.store, split, record.num_samples)
    _require_same_model(store, model)
    functional = functional_model(model, forward, manifest.model.parameters, manifest.compute_dtype, device)
    samples = Samples(sources["train"], manifest.train.is_mapping, None, False, "train inputs")
    functional = functional.with_fast_layout(loader(functional, samples)(probe_samples(samples.num_samples)))
    kind = get_kind(manifest.kind)
    covectors = torch.from_numpy(kind.covectors(manifest.num_outputs)).to(functional.device, functional.dtype)
    sizes = (manifest.tile, manifest.choices.strip, manifest.choices.subtile, manifest.choices.batch)
    whole = JacobianProducts(functional, covectors, *sizes, manifest.train.is_mapping)
    left = frozenset(manifest.model.parameters).difference(*manifest.groups.values())
    groups = (*map(frozenset, manifest.groups.values()), *([left] if left else []))
    apart = tuple(replace(whole, covectors=one[None]) for one in covectors)
    return Reference((whole,) if kind.pairs == "all" else apart, sources, groups)


def _require_same_model(store: KernelStore, model: nn.Module) -> None:
    stored, remedy = store.manifest.model, "Give the model, or the workflow file and options, that it was made with"
    known = dict(model.named_parameters())
    missing = [name for name in stored.parameters if name not in known]
    if missing:
        raise StoreMismatchError(
            f"{store.path} was made with another model: this one has no parameter {missing[0]!r}, and "
            f"{len(missing) - 1} others of {len(stored.parameters)} are missing. {remedy}",
            (("model.parameters", stored.parameters, tuple(known)),),
        )
    given = fingerprint(model, stored.parameters)
    differing = tuple(
        (f"model.{field}", getattr(stored, field), getattr(given, field))
        for field in ("state_digest", "structure_digest", "num_parameters")
        if getattr(stored, field) != getattr(given, field)
    )
    if differing:
        names = ", ".join(field for field, _, _ in differing)
        raise StoreMismatchError(f"{store.path} was made with another model: {names} differ. {remedy}", differing)


def _matching_samples(store: KernelStore, given: object, record: DataRecord | None, split: str) -> Samples:
    if record is None:
        raise ConfigError(f"{store.path} was made without test_inputs, but test_inputs were given")
    samples = as_samples(given, label=f"{split} inputs")
    inspected = samples.inspect(f"{split} inputs")
    if inspected.inputs_digest != record.inputs_digest:
        raise StoreMismatchError(
            f"the {split} inputs are not those that {store.path} was made with: it holds {record.num_samples} samples "
            f"of {record.inputs}, given are {inspected.num_samples} of {inspected.inputs}",
            ((f"{split}.inputs_digest", record.inputs_digest, inspected.inputs_digest),),
        )
    return samples


def certify(
    store: KernelStore, reference: Reference, *, seed: int = 0, step: Callable[[], None] = lambda: None
) -> tuple[Certificate, ...]:
    """Certify every kernel of a complete store."""
    manifest = store.manifest
    rows = next(iter(store.store.arrays.values())).layout.shape[0]
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=rows)
    exact = _products(reference, signs, is_apart=get_kind(manifest.kind).pairs == "same", step=step)
    found: list[Certificate] = []
    wholes: dict[int | None, dict[str, Vector]] = {}
    for plane in planes(manifest):
        kernels: KernelSet = store if plane.group is None else store.group(list(manifest.groups)[plane.group])
        if plane.output is not None:
            kernels = kernels.output(plane.output)
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


def _products(
    reference: Reference, signs: Vector, *, is_apart: bool, step: Callable[[], None]
) -> dict[tuple[int | None, int | None, str], Vector]:
    """``J J'v`` by group (None for all parameters), output (None unless they are apart), and split."""
    found: dict[tuple[int | None, int | None, str], Vector] = {}
    for output, each in enumerate(reference.products):
        # J'v is computed once: its parts in the groups of parameters give their kernels, and these sum to the whole.
        direction = each.transposed(reference.sources["train"], signs, step)
        for group, names in enumerate(reference.groups):
            part = {name: value if name in names else torch.zeros_like(value) for name, value in direction.items()}
            for split, source in reference.sources.items():
                product = each.product(source, part, step)
                for number in (None, group):
                    key = number, output if is_apart else None, split
                    found[key] = found[key] + product if key in found else product
    return found


def with_certificates(report: VerificationReport, certificates: tuple[Certificate, ...]) -> VerificationReport:
    """The report with certificates, and a finding for each bad one."""
    findings = tuple(
        Finding(
            certificate.array,
            (),
            f"K v and J(J'v) differ by up to {certificate.error:.1e} (tolerance {certificate.tolerance:.0e}, median "
            f"{certificate.median_error:.1e}); suspect rows: {', '.join(map(str, certificate.suspect_rows)) or 'none'}",
        )
        for certificate in certificates
        if not certificate.is_good
    )
    return replace(
        report,
        findings=report.findings + findings,
        certificates=tuple({**asdict(each), "is_good": each.is_good} for each in certificates),
    )


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
