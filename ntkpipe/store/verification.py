"""Verification of a store by itself: every chunk present, whole and finite, and the matrix one that a kernel can be."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import StoreError, TileError
from ntkpipe.base.progress import Ticks
from ntkpipe.base.resources import format_bytes
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.layout import Index
from ntkpipe.store.store import Store

Rows = list[tuple[str, str]]

# |K_ij| <= sqrt(K_ii K_jj) holds for any Gram matrix; what rounding may add, by the coarser dtype of sum and store.
_BOUND_TOLERANCE = {"float32": 1e-5, "float64": 1e-11}
_MOST_STRAYS = 1000
# A report of every tile of a large store would be too large to be read back.
_MOST_RECORDED = 1000


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    array: str  # array, index: the chunk, or the array and nothing
    index: Index
    problem: str  # what is wrong with it
    is_harmless: bool = False  # whether the numbers are good all the same: a leftover that is never read


@dataclass(frozen=True)
class VerificationReport:
    """What :func:`verify_store` found.

    Attributes
    ----------
    chunks_checked
        Chunks that were read.
    bytes_checked
        Their bytes.
    findings
        What is wrong; empty for a good store.
    certificates
        Of the whole kernels against the model, where it was given: one a kernel.
    """

    chunks_checked: int
    bytes_checked: int
    findings: tuple[Finding, ...]
    certificates: tuple[dict[str, Any], ...] = ()

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.is_harmless for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "is_good": self.is_good}


def verify_store(store: Store, on_chunk: Callable[[], None] = lambda: None) -> VerificationReport:
    """Read and check every chunk of a store. Needs no model; memory is two tiles and the diagonals.

    Checked are: each array's ``zarr.json``; presence, size and crc32c of every chunk; that real values are finite; that
    diagonal tiles are symmetric to the last bit; that the diagonal is not negative and
    ``|K_ij| <= sqrt(K_ii K_jj) (1 + tol)``. Files that killed writers left behind are listed, too.
    """
    findings = [
        Finding(
            name,
            (),
            "a partial file of a killed writer; never read",
            is_harmless=True,
        )
        for name in store.partials()
    ]
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
        # Whoever made the store may have put millions there.
        first = sorted(itertools.islice(strays, _MOST_STRAYS))
        findings += [Finding(name, index, "a chunk that does not belong to the array") for index in first]
        more = sum(1 for _ in strays)
        findings += [Finding(name, (), f"{more:,} more chunks that do not belong to the array")] if more else []
    return VerificationReport(count, size, tuple(findings))


def verify_and_record(store: Store, *, progress: bool) -> VerificationReport:
    """Verify a store with a progress bar, and keep the report in it if it can be written."""
    total = sum(array.layout.num_chunks for array in store.arrays.values())
    with Ticks(total, what="verify", unit="chunk", enabled=progress) as ticks:
        report = verify_store(store, ticks.tick)
    record_report(store, report)
    return report


def record_report(store: Store, report: VerificationReport) -> None:
    """Keep a report in the store, certificates by themselves, so that a later check without a model leaves them.

    A store that cannot be written is left as it is.
    """
    if store.is_writable():
        checked = datetime.now(UTC).isoformat(timespec="seconds")
        with store.in_use():
            shown = replace(report, findings=report.findings[:_MOST_RECORDED]).to_json()
            found = {**shown, "is_good": report.is_good, "num_findings": len(report.findings), "checked": checked}
            store.write_result("verification", found)
            if report.certificates:
                store.write_result("certificate", {"kernels": report.certificates, "checked": checked})


def _diagonals(store: Store) -> dict[str, NDArray[np.float64]]:
    """Diagonal entries of the train and test samples of each plane, by the array that they are in.

    NaN where a chunk cannot be read; that is reported where the chunk is checked.
    """
    found = {}
    for name, array in store.arrays.items():
        layout = array.layout
        if layout.grid is not None and layout.grid.symmetric:
            axis = layout.grid.rows
            found[name] = np.concatenate(
                [_diagonal_of(_try_read(array, (i, i)), len(axis.rows(i))) for i in range(axis.num_tiles)]
            )
        elif layout.holds_blocks:
            parts = []
            for index in layout.indices():
                region = layout.region(index)[0]
                parts.append(_diagonal_of(_try_read(array, index), (region.stop - region.start) * layout.shape[1]))
            found[name] = np.concatenate(parts)
    return found


def _diagonal_of(values: NDArray[Any] | None, rows: int) -> NDArray[np.float64]:
    """The diagonal along the last two axes."""
    if values is None:
        return np.full(rows, np.nan)
    return values.diagonal(axis1=-2, axis2=-1).reshape(-1).astype(np.float64)


def _try_read(array: StoredArray, index: Index) -> NDArray[Any] | None:
    try:
        return array.read(index)
    except TileError:
        return None


def _check(store: Store, array: StoredArray, index: Index, diagonals: dict[str, NDArray[np.float64]]) -> str | None:
    """What is wrong with one chunk."""
    try:
        values = array.read(index)
    except TileError as error:
        return str(error)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return f"{int((~np.isfinite(values)).sum())} entries are NaN or infinite"
    name, grid = array.layout.name, array.layout.grid
    if array.layout.holds_blocks:
        negative = int((values.diagonal(axis1=1, axis2=2) < 0).sum())
        return f"{negative} diagonal entries are negative" if negative else None
    if grid is None:
        return None
    is_mirrored = grid.symmetric and index[0] == index[1]
    if is_mirrored and not np.array_equal(values, values.T):
        return "the diagonal tile is not symmetric"
    if is_mirrored and bool((values.diagonal() < 0).any()):
        return f"{int((values.diagonal() < 0).sum())} diagonal entries are negative"
    plane = name.rpartition("/")[0]
    right = diagonals[f"{plane}/train"]
    left = right if grid.symmetric else diagonals[f"{plane}/test_diagonal"]
    rows, columns = grid.rows.rows(index[0]), grid.columns.rows(index[1])
    bound = np.sqrt(np.clip(left[rows.start : rows.stop], 0, None))[:, None] * np.sqrt(
        np.clip(right[columns.start : columns.stop], 0, None)
    )
    # Where a diagonal entry is unreadable the bound is NaN and says nothing; that chunk is reported by itself.
    tolerance = max(_BOUND_TOLERANCE[dtype] for dtype in (store.manifest.accumulate_dtype, store.manifest.store_dtype))
    excess = np.abs(values) > bound * (1 + tolerance)
    if excess.any():
        row, column = map(int, np.argwhere(excess)[0])
        return (
            f"{int(excess.sum())} entries exceed sqrt(K_ii K_jj), the first K[{rows.start + row}, "
            f"{columns.start + column}] = {values[row, column]:.6g} > {bound[row, column]:.6g}"
        )
    return None


def verification_rows(report: VerificationReport) -> Rows:
    """A verification report in words."""
    rows = [("chunks", f"{report.chunks_checked} read and checked, {format_bytes(report.bytes_checked)}")]
    for certificate in report.certificates:
        rows.append(
            (
                f"certificate {certificate['array'].removeprefix('kernel/')}",
                f"K v and J(Jᵀv) agree to {certificate['error']:.1e} in every row (tolerance "
                f"{certificate['tolerance']:.0e})"
                if certificate["is_good"]
                else "FAILED",
            )
        )
    rows += [("finding", line) for line in _shown(report)]
    return [*rows, ("verdict", "good" if report.is_good else f"{len(report.findings)} findings")]


def _shown(report: VerificationReport, most: int = 20) -> Iterator[str]:
    """Findings in words, one line each."""
    for finding in report.findings[:most]:
        where = f" ({', '.join(map(str, finding.index))})" if finding.index else ""
        yield f"{finding.array}{where}: {finding.problem}"
    if len(report.findings) > most:
        yield f"and {len(report.findings) - most} more"
