"""A store and its source: verified and certified, K v tile by tile and as the source says it is; repaired."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import StoreError, TileError
from ntkpipe.base.progress import Ticks
from ntkpipe.base.tables import TableRows, as_table
from ntkpipe.build.life import Key, RowProducts, TileSource, Vector, rewrite
from ntkpipe.store.growth import ChunkKey, end_growth, undo_cut_growth
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelSet
from ntkpipe.store.layout import Index, planes
from ntkpipe.store.store import Store
from ntkpipe.store.verification import (
    Finding,
    VerificationReport,
    agreement,
    count_findings,
    describe_chunk,
    first_rows,
    record_report,
    verify_and_record,
)

# Largest row error of a good store, by the coarsest dtype used, on the scale sqrt(K_ii * trace K).
_TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "tf32": 1e-2, "bfloat16": 5e-2}
# A row is suspect if its error exceeds the median by this factor; rounding stays below 8 for a million rows.
_OUTLIER = 16.0
_SHOWN = 50
_LOOKED_AT = 8  # sums over rows that stand out, of which every row is looked at
NOT_CERTIFIED = Finding("certificate", (), "not computed: mend the findings above first", is_harmless=True)
_MOST_RECORDED = 1000  # actions in a report that is stored
_COMPUTED = "computed again"


@dataclass(frozen=True)
class _Stored:
    """K v of a stored kernel, and what its errors are measured by."""

    array: str
    product: Vector
    scale: Vector  # sqrt(K_ii * trace K)

    def summed(self, labels: NDArray[np.int64], count: int) -> "_Stored":
        """The same summed over the rows with each label, but negative ones."""
        return _Stored(self.array, _summed(labels, self.product, count), np.sqrt(_summed(labels, self.scale**2, count)))


def certify(store: Store, source: TileSource, *, progress: bool) -> tuple[dict[str, Any], ...]:
    """Certify every kernel of a complete store: how well it agrees with J(J'v), row by row."""
    manifest = store.manifest
    rows = next(iter(store.arrays.values())).layout.shape[0]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=rows)
    with Ticks(source.num_steps(), what="certify", unit="step", enabled=progress) as ticks:
        exact = source.products(signs, ticks.tick)
    dtypes = (manifest.compute_dtype, manifest.accumulate_dtype, manifest.store_dtype)
    dtype = max(dtypes, key=lambda dtype: _TOLERANCE[dtype])
    precision = float(np.finfo(np.float64 if dtype == "float64" else np.float32).eps)
    judge = partial(_judge, precision=precision, tolerance=_TOLERANCE[dtype])
    stored = _stored_products(store, signs, precision)
    found = {} if exact is None else {key: judge(each, exact[key]) for key, each in stored.items()}
    if found and all(each["is_good"] for each in found.values()):
        return tuple(found.values())
    # Is it the store, or is J u of another J than gradients are? These decide where the two differ.
    by_rows = source.row_products(signs, progress)
    if by_rows is None:
        return tuple(found.values())
    judge = partial(judge, by_tolerance=by_rows.by_tolerance)
    labels = {split: by_rows.bundles(split) for split in dict.fromkeys(split for *_, split in stored)}
    sums = by_rows.sums(labels)

    def summed(products: Mapping[Key, _Stored], key: Key) -> _Stored:
        return products[key].summed(labels[key[-1]], len(sums[key]))

    if exact is not None:
        ours = {key: replace(each, product=exact[key]) for key, each in stored.items()}
        if all(judge(summed(ours, key), sums[key])["is_good"] for key in ours):
            return tuple(found.values())
    by_bundle = {key: judge(summed(stored, key), sums[key]) for key in stored}
    return tuple(_rows_named(by_rows, stored, labels, by_bundle, judge).values())


def _rows_named(
    by_rows: RowProducts,
    stored: Mapping[Key, _Stored],
    labels: Mapping[str, NDArray[np.int64]],
    certificates: Mapping[Key, dict[str, Any]],
    judge: Callable[..., dict[str, Any]],
) -> dict[Key, dict[str, Any]]:
    """Certificates of sums over rows with the suspect rows of suspect sums: each row by itself, of the worst sums."""
    bad = {split: set[int]() for split in labels}
    for (*_, split), each in certificates.items():
        bad[split].update(each["suspect_rows"][:_LOOKED_AT])
    rows = {split: np.flatnonzero(np.isin(own, [*bad[split]])) for split, own in labels.items()}
    alone = {split: np.full(len(own), -1) for split, own in labels.items()}
    for split, chosen in rows.items():
        alone[split][chosen] = np.arange(len(chosen))
    exact, found = by_rows.sums(alone) if any(map(len, rows.values())) else {}, {}
    for key, each in certificates.items():
        chosen = rows[key[-1]]
        found[key] = {**each, **by_rows.words()}
        if each["suspect_rows"]:
            named = judge(stored[key].summed(alone[key[-1]], len(chosen)), exact[key], median=each["median_error"])
            suspects = chosen[list(named["suspect_rows"])].tolist()
            mine = np.isin(labels[key[-1]], each["suspect_rows"][:_LOOKED_AT])
            suspects = suspects or np.flatnonzero(mine).tolist()[:_SHOWN]
            found[key] |= {"suspect_rows": tuple(suspects), "num_suspects": max(named["num_suspects"], len(suspects))}
    return found


def _summed(labels: NDArray[np.int64], values: Vector, count: int) -> Vector:
    return np.bincount(labels[labels >= 0], weights=values[labels >= 0], minlength=count).astype(np.float64)


def _stored_products(store: Store, signs: Vector, precision: float) -> dict[Key, _Stored]:
    """Every kernel of a store times a vector."""
    manifest, found = store.manifest, dict[Key, _Stored]()
    for plane in planes(manifest):
        group = None if plane.group is None else list(manifest.groups)[plane.group]
        kernels = KernelSet(store, group, plane.output)
        diagonals = {"train": kernels.train.diagonal().astype(np.float64)}
        if manifest.test is not None:
            diagonals["test"] = np.diagonal(kernels.test_diagonal, axis1=1, axis2=2).reshape(-1).astype(np.float64)
        trace = float(diagonals["train"].sum())
        for split, diagonal in diagonals.items():
            scale = np.sqrt(np.clip(diagonal, 0, None) * trace)
            if plane.group is not None:  # whose Jacobian may vanish up to rounding
                scale += precision**0.5 * found[None, plane.output, split].scale
            kernel = kernels.train if split == "train" else kernels.test_train
            found[plane.group, plane.output, split] = _Stored(kernel.name, _multiply(kernel, signs), scale)
    return found


def verify_with(store: Store, source: TileSource | None, *, progress: bool) -> VerificationReport:
    """Verify a store, and certify its whole kernels by its source if all else is good; the store keeps the report."""
    report = verify_and_record(store, progress=progress)
    if source is None:
        return report
    if not report.is_good:
        return replace(report, findings=(*report.findings, NOT_CERTIFIED))
    certificates = certify(store, source, progress=progress)
    findings = (Finding(each["array"], (), _problem(each)) for each in certificates if not each["is_good"])
    report = replace(report, findings=(*report.findings, *findings), certificates=certificates)
    record_report(store, report)
    return report


def _problem(certificate: dict[str, Any]) -> str:
    error, median = f"{certificate['error']:.1e}", f"{certificate['median_error']:.1e}"
    bounds = f"tolerance {certificate['tolerance']:.0e}, median {median}"
    rows = ", ".join(map(str, certificate["suspect_rows"])) or "none"
    return f"K v and {agreement(certificate)} differ by up to {error} ({bounds}); suspect rows: {rows}"


def _judge(
    stored: _Stored,
    exact: Vector,
    *,
    precision: float,
    tolerance: float,
    median: float | None = None,
    by_tolerance: bool = False,
) -> dict[str, Any]:
    gap, scale = np.abs(stored.product - exact), stored.scale
    errors = np.divide(gap, scale, out=np.where(gap > 0, np.inf, 0.0), where=scale > 0)
    median = float(np.median(errors)) if median is None else median
    suspect = np.flatnonzero(errors > (tolerance if by_tolerance else _OUTLIER * max(median, precision / 4)))
    ranked = suspect[np.argsort(-errors[suspect])]
    error = float(errors.max())
    return {
        "array": stored.array,
        "error": error,  # the largest |K v - J(J'v)|_i / sqrt(K_ii * sum_j K_jj)
        "median_error": median,
        "tolerance": tolerance,  # bound on the error of a good kernel of this dtype
        "suspect_rows": tuple(ranked[:_SHOWN].tolist()),  # those whose error stands out, the largest first
        "num_suspects": len(suspect),
        "is_good": len(suspect) == 0 and error <= tolerance,
        "by_backward": False,  # whether gradients of rows take the place of J, which are of another function than J u
    }


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


@dataclass(frozen=True)
class Action:
    """One step of a repair."""

    array: str  # or the name of a file
    index: Index  # the chunk; empty for the whole array or file
    done: str


@dataclass(frozen=True)
class RepairReport:
    """Result of a repair."""

    found: VerificationReport  # the verification before
    actions: tuple[Action, ...]  # the steps of the repair
    left: VerificationReport  # the verification after

    @property
    def is_good(self) -> bool:
        """Whether the store is good after the repair."""
        return self.left.is_good

    @property
    def num_computed(self) -> int:
        """Number of recomputed chunks."""
        return sum(action.done == _COMPUTED for action in self.actions)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        actions = [asdict(action) for action in self.actions]
        return {"found": self.found.to_json(), "actions": actions, "left": self.left.to_json(), "is_good": self.is_good}

    def rows(self) -> TableRows:
        """The report as (quantity, value) in words."""
        found = ("found", f"{count_findings(len(self.found.findings))} in {self.found.chunks_checked} chunks")
        done = [f"{describe_chunk(action.array, action.index)}: {action.done}" for action in self.actions]
        return [found, *first_rows("repaired", done or ["nothing"]), *self.left.rows()]

    def __str__(self) -> str:
        return as_table(self.rows())


def mend(store: Store, find_source: Callable[[], TileSource] | None = None, *, progress: bool) -> RepairReport:
    """Repair a store, with a source also its chunks, and record the repair below ``results/repairs``."""
    actions = [Action("growth", (), "put back as before: it was cut short")] if undo_cut_growth(store) else []
    source = None if find_source is None else find_source()
    found = verify_and_record(store, progress=progress)
    with store.in_use():
        actions += _tidy(store)
    leftovers = [finding.array for finding in found.findings if finding.is_harmless]
    actions += [Action(name, (), "leftover removed") for name in leftovers if store.medium.size(name) is None]
    chunks = bad_chunks(store, found)
    if source is not None and chunks:
        rewrite(store, chunks, source, progress=progress)
        actions += [Action(name, index, _COMPUTED) for name, index in sorted(chunks)]
    left = verify_with(store, source, progress=progress) if actions or source is not None else found
    if source is not None and not left.is_good:
        # An entry may exceed its bound since the diagonal is wrong; a certificate points at rows.
        more = bad_chunks(store, left)
        doubted = (more | _diagonals_of(store, more) | _suspects(store, left)) - (chunks - more)
        if doubted:
            before = {chunk: _digest(store, chunk) for chunk in doubted}
            rewrite(store, doubted, source, progress=progress)
            changed = [chunk for chunk in sorted(doubted) if _digest(store, chunk) != before[chunk]]
            actions += [Action(name, index, _COMPUTED) for name, index in changed]
            left = verify_with(store, source, progress=progress)
    if left.is_good and end_growth(store):
        actions.append(Action("growth", (), "ended: copies of old entries removed"))
    report = RepairReport(found, tuple(actions), left)
    if actions:
        _record(store, report)
    return report


def bad_chunks(store: Store, report: VerificationReport) -> frozenset[ChunkKey]:
    """Chunks that are missing or bad according to a report."""
    return frozenset(
        (finding.array, finding.index)
        for finding in report.findings
        if finding.index and store.arrays[finding.array].layout.holds(finding.index)
    )


def _tidy(store: Store) -> list[Action]:
    actions = []
    store.complete_groups()
    for name, array in store.arrays.items():
        try:
            array.check_metadata()
        except StoreError:
            array.replace_metadata()
            actions.append(Action(name, (), "zarr.json written anew"))
        for index in sorted(index for index, _ in array.sizes() if not array.layout.holds(index)):
            store.medium.delete(array.name(index))
            actions.append(Action(name, index, "removed: it did not belong to the array"))
    return actions


def _diagonals_of(store: Store, chunks: frozenset[ChunkKey]) -> frozenset[ChunkKey]:
    """Chunks that hold the diagonal entries which bound the entries of these tiles."""
    found: set[ChunkKey] = set()
    for name, index in chunks:
        grid, plane = store.arrays[name].layout.grid, name.rpartition("/")[0]
        if grid is not None:
            row, column = index
            found.add((f"{plane}/train", (column, column)))
            found.add((f"{plane}/train", (row, row)) if grid.symmetric else (f"{plane}/test_diagonal", (row, 0, 0)))
    return frozenset(found)


def _suspects(store: Store, report: VerificationReport) -> frozenset[ChunkKey]:
    """Tiles that may hold the wrong entries behind the suspect rows of certificates."""
    found: set[ChunkKey] = set()
    for certificate in report.certificates:
        name = certificate["array"]
        grid = store.arrays[name].layout.grid
        if certificate["is_good"] or grid is None:
            continue
        rows = sorted({row // grid.rows.tile_rows for row in certificate["suspect_rows"]})
        # A wrong entry of a symmetric kernel makes two rows suspect, its own and that of its column.
        columns = rows if grid.symmetric else range(grid.columns.num_tiles)
        found |= {(name, (row, column)) for row in rows for column in columns if grid.is_stored(row, column)}
    return frozenset(found)


def _digest(store: Store, chunk: ChunkKey) -> bytes:
    """Digest of a chunk's bytes; empty if it cannot be read."""
    name, index = chunk
    try:
        return hashlib.sha256(np.ascontiguousarray(store.arrays[name].read(index)).data).digest()
    except TileError:
        return b""


def _record(store: Store, report: RepairReport) -> None:
    finished = datetime.now(UTC)
    record = {
        "finished": finished.isoformat(timespec="seconds"),
        "num_actions": len(report.actions),
        "num_computed": report.num_computed,
        "num_findings": len(report.found.findings),
        "actions": [asdict(action) for action in report.actions[:_MOST_RECORDED]],
        "is_good": report.is_good,
    }
    with store.in_use():
        store.write_result(f"repairs/{finished:%Y%m%dT%H%M%S.%f}-{os.getpid()}", record)
