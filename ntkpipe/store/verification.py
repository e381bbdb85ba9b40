"""Verification of a store without a model: all chunks present, whole and finite, and bounds that kernels satisfy."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import StoreError, TileError
from ntkpipe.base.progress import Ticks
from ntkpipe.base.resources import format_bytes
from ntkpipe.base.tables import TableRows, as_table
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.layout import Index
from ntkpipe.store.store import Store

# Rounding allowance of |K_ij| <= sqrt(K_ii K_jj), as of Gram matrices, by the coarser dtype of sum and store.
_BOUND_TOLERANCE = {"float32": 1e-5, "float64": 1e-11}
_MOST_STRAYS = 1000  # anybody may have put millions of stray files into a store
_MOST_RECORDED = 1000  # a report on every tile of a large store would be too large to be read back
_MOST_SHOWN = 20


@dataclass(frozen=True)
class Finding:
    """One problem of a store."""

    array: str
    index: Index  # the chunk; empty for the whole array
    problem: str
    is_harmless: bool = False  # whether no number is affected, as for a leftover that is never read


@dataclass(frozen=True)
class VerificationReport:
    """Result of :func:`verify_store`."""

    chunks_checked: int  # number of chunks read
    bytes_checked: int  # their bytes
    findings: tuple[Finding, ...]  # the problems; empty for a good store
    # One certificate per kernel, of its agreement with the model, if a model was given
    certificates: tuple[dict[str, Any], ...] = ()

    @property
    def is_good(self) -> bool:
        """Whether every finding is harmless."""
        return all(finding.is_harmless for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return {**asdict(self), "is_good": self.is_good}

    def rows(self) -> TableRows:
        """The report as (quantity, value) in words."""
        rows = [("chunks", f"{self.chunks_checked} read and checked, {format_bytes(self.bytes_checked)}")]
        for found in self.certificates:
            error, tolerance = f"{found['error']:.1e}", f"{found['tolerance']:.0e}"
            where = "" if found.get("by_formula", False) else " in every row"
            good = f"K v and {agreement(found)} agree to {error}{where} (tolerance {tolerance})"
            name = f"certificate {found['array'].removeprefix('kernel/')}"
            rows.append((name, good if found["is_good"] else "FAILED"))
        rows += first_rows("finding", [f"{describe_chunk(f.array, f.index)}: {f.problem}" for f in self.findings])
        return [*rows, ("verdict", "good" if self.is_good else count_findings(len(self.findings)))]

    def __str__(self) -> str:
        return as_table(self.rows())


def agreement(certificate: Mapping[str, Any]) -> str:
    """What K v was compared with; records of earlier versions do not say."""
    if certificate.get("by_formula", False):
        return f"rows at random by the formulas ({certificate['slow_entries']:,} entries by a slow path)"
    by_backward = certificate.get("by_backward", False)
    return "⟨∇f, Jᵀv⟩ (by backward alone: J u is missing, or of another J)" if by_backward else "J(Jᵀv)"


def verify_store(store: Store, on_chunk: Callable[[], None] = lambda: None) -> VerificationReport:
    """Read and check every chunk of a store, and each ``zarr.json``; memory is two tiles and the diagonals."""
    leftover = "a partial file of a killed writer; never read"
    findings = [Finding(name, (), leftover, is_harmless=True) for name in store.medium.leftovers()]
    diagonals = _diagonals(store)
    count = size = 0
    for name, array in store.arrays.items():
        try:
            array.check_metadata()
        except StoreError as error:
            findings.append(Finding(name, (), str(error)))
        for index in array.layout.indices():
            problem = _check(store, array, index, diagonals)
            findings += [Finding(name, index, problem)] if problem else []
            count, size = count + 1, size + array.layout.chunk_bytes
            on_chunk()
        strays = (index for index, _ in array.sizes() if not array.layout.holds(index))
        first = sorted(itertools.islice(strays, _MOST_STRAYS))
        findings += [Finding(name, index, "a chunk that does not belong to the array") for index in first]
        more = sum(1 for _ in strays)
        findings += [Finding(name, (), f"{more:,} more chunks that do not belong to the array")] if more else []
    return VerificationReport(count, size, tuple(findings))


def verify_and_record(store: Store, *, progress: bool) -> VerificationReport:
    """Verify a store with a progress bar, and record the report in it if it is writable."""
    total = sum(array.layout.num_chunks for array in store.arrays.values())
    with Ticks(total, what="verify", unit="chunk", enabled=progress) as ticks:
        report = verify_store(store, ticks.tick)
    record_report(store, report)
    return report


def record_report(store: Store, report: VerificationReport) -> None:
    """Record a report in the store, unless that is read-only."""
    if not store.is_writable():
        return
    checked = datetime.now(UTC).isoformat(timespec="seconds")
    with store.in_use():
        shown = replace(report, findings=report.findings[:_MOST_RECORDED]).to_json()
        found = {**shown, "is_good": report.is_good, "num_findings": len(report.findings), "checked": checked}
        store.write_result("verification", found)
        if report.certificates:  # a result of their own, which a later check without a model leaves alone
            store.write_result("certificate", {"kernels": report.certificates, "checked": checked})


def _diagonals(store: Store) -> dict[str, NDArray[np.float64]]:
    """Diagonals of the kernels of train samples, and of test samples with themselves, by array; NaN if unreadable."""
    found = {}
    for name, array in store.arrays.items():
        grid = array.layout.grid
        if array.layout.holds_blocks or (grid is not None and grid.symmetric):
            chunks = (index for index in array.layout.indices() if grid is None or index[0] == index[1])
            found[name] = np.concatenate([_diagonal_of(array, index) for index in chunks])
    return found


def _diagonal_of(array: StoredArray, index: Index) -> NDArray[np.float64]:
    try:
        return array.read(index).diagonal(axis1=-2, axis2=-1).reshape(-1).astype(np.float64)
    except TileError:  # reported where the chunk itself is checked
        first, *rest = array.layout.region(index)
        return np.full((first.stop - first.start) * (rest[0].stop if array.layout.holds_blocks else 1), np.nan)


def _check(store: Store, array: StoredArray, index: Index, diagonals: dict[str, NDArray[np.float64]]) -> str | None:
    try:
        values = array.read(index)
    except TileError as error:
        return str(error)
    if bad := array.layout.count_bad(values):
        return f"{bad} entries are NaN or infinite"
    name, grid = array.layout.name, array.layout.grid
    is_mirrored = grid is not None and grid.symmetric and index[0] == index[1]
    if is_mirrored and not np.array_equal(values, values.T):
        return "the diagonal tile is not symmetric"
    has_diagonal = is_mirrored or array.layout.holds_blocks
    if has_diagonal and (negative := int((values.diagonal(axis1=-2, axis2=-1) < 0).sum())):
        return f"{negative} diagonal entries are negative"
    if grid is None:
        return None
    plane = name.rpartition("/")[0]
    right = diagonals[f"{plane}/train"]
    left = right if grid.symmetric else diagonals[f"{plane}/test_diagonal"]
    rows, columns = grid.rows.rows(index[0]), grid.columns.rows(index[1])
    left, right = left[rows.start : rows.stop], right[columns.start : columns.stop]
    bound = np.sqrt(np.clip(left, 0, None))[:, None] * np.sqrt(np.clip(right, 0, None))
    # The bound is NaN, and satisfied, where a diagonal entry is unreadable; that chunk has its own finding.
    tolerance = max(_BOUND_TOLERANCE[dtype] for dtype in (store.manifest.accumulate_dtype, store.manifest.store_dtype))
    excess = np.abs(values) > bound * (1 + tolerance)
    if excess.any():
        row, column = map(int, np.argwhere(excess)[0])
        return (
            f"{int(excess.sum())} entries exceed sqrt(K_ii K_jj), the first K[{rows.start + row}, "
            f"{columns.start + column}] = {values[row, column]:.6g} > {bound[row, column]:.6g}"
        )
    return None


def count_findings(count: int) -> str:
    """``1 finding``, ``2 findings``."""
    return f"{count:,} finding{'s'[: count != 1]}"


def first_rows(name: str, words: Sequence[str]) -> TableRows:
    """A row for each of the first words, and one that counts the rest."""
    more = [f"and {len(words) - _MOST_SHOWN} more"] if len(words) > _MOST_SHOWN else []
    return [(name, each) for each in [*words[:_MOST_SHOWN], *more]]


def describe_chunk(array: str, index: Index) -> str:
    """Name a chunk, or an array if the index is empty."""
    return f"{array} ({', '.join(map(str, index))})" if index else array
