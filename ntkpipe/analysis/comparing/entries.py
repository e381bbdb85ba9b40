"""How far two symmetric matrices are apart, from one pass over the tiles of both side by side."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray, require_matrix_range
from ntkpipe.base.operator import Operator
from ntkpipe.operators.tiles import MatrixTiles

# A centred matrix of so small a part of the squared norm has no digits that say anything.
_NOTHING_LEFT = 1e-10
# Numbers of a strip in float64: what is done with it stays in a core's cache.
_STRIP_NUMBERS = 2**16
# Samples of a run where a matrix has no tiles.
_RUN = 512


class TileEntries:
    """Entries of tiles; a run must lie in one. The last tile is kept, so that neighbours do not read it again."""

    def __init__(self, source: MatrixTiles, width: int) -> None:
        self._source = source
        self._rows = source.grid.rows.tile_rows
        self.width = width  # rows a sample
        self.num_samples = source.grid.shape[0] // width
        self.edge: int | None = self._rows // width  # samples of a tile
        self.bytes_read = 0
        self._last: tuple[tuple[int, int], NDArray[Any]] | None = None

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """The block of two runs of rows, the first before the second or the same; a view until the next read."""
        index = rows.start // self._rows, columns.start // self._rows
        if self._last is None or self._last[0] != index:
            self._last = None  # or two tiles would be in memory during the read
            self._last = index, self._source.read(index, None)
            self.bytes_read += self._source.tile_bytes
        top, left = index[0] * self._rows, index[1] * self._rows
        return self._last[1][rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


class OperatorEntries:
    """Entries of an operator, in any blocks."""

    def __init__(self, operator: Operator, width: int) -> None:
        self._operator = operator
        self.width = width
        self.num_samples = operator.num_rows // width
        self.edge = None  # any run may be asked for
        self._before = operator.work.bytes_read

    @property
    def bytes_read(self) -> int:
        """Bytes that the operator has read for these entries."""
        return self._operator.work.bytes_read - self._before

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """See :class:`TileEntries`."""
        return self._operator.block(rows, columns)


Entries = TileEntries | OperatorEntries


@dataclass(frozen=True)
class Strip:
    """The same few rows of a block of both matrices, in float64; valid until the next one."""

    rows: slice  # rows, columns: of both matrices
    columns: slice
    # Whether its block is a diagonal one, which has its own mirror in it; entries of others count twice
    is_diagonal: bool
    first: FloatArray
    second: FloatArray


def strips(first: Entries, second: Entries) -> Iterator[Strip]:
    """Every entry of the upper blocks of two matrices, those of diagonal blocks first.

    A matrix K of fewer rows a sample than the other, one, is taken as ``K ⊗ I_O``, of which only strips ever exist.
    Blocks are cut at the edges of the tiles of both, and those of one coarse tile follow each other: so each tile is
    read once, those of diagonal blocks twice, and where the edges of the finer tiles do not divide those of the
    coarser ones, the finer ones that lie across, up to four times. Memory is a tile of each and some megabytes.
    """
    cuts = {0, first.num_samples}
    for entries in (first, second):
        if entries.edge is not None or first.edge == second.edge:
            cuts |= set(range(0, first.num_samples, entries.edge or _RUN))
    runs = [slice(*ends) for ends in pairwise(sorted(cuts))]
    coarse = max(first.edge or _RUN, second.edge or _RUN)
    diagonal = [(run, run) for run in runs]
    upper = [(row, column) for number, row in enumerate(runs) for column in runs[number + 1 :]]
    upper.sort(key=lambda pair: (pair[0].start // coarse, pair[1].start // coarse, pair[0].start, pair[1].start))
    for rows, columns in [*diagonal, *upper]:
        yield from _strips_of(first, second, rows, columns)


def _rows(samples: slice, width: int) -> slice:
    return slice(samples.start * width, samples.stop * width)


def _strips_of(first: Entries, second: Entries, rows: slice, columns: slice) -> Iterator[Strip]:
    width = max(first.width, second.width)
    blocks = [(one.read(_rows(rows, one.width), _rows(columns, one.width)), one.width) for one in (first, second)]
    step = max(1, _STRIP_NUMBERS // ((columns.stop - columns.start) * width * width))
    for start in range(rows.start, rows.stop, step):
        part = slice(start, min(start + step, rows.stop))
        inside = slice(start - rows.start, part.stop - rows.start)
        values = (_as_strip(block[_rows(inside, own)], width // own) for block, own in blocks)
        yield Strip(_rows(part, width), _rows(columns, width), rows == columns, *values)


def _as_strip(block: NDArray[Any], num_outputs: int) -> FloatArray:
    """Rows of a block in float64, C-contiguous; of ``K ⊗ I_O`` for those of K."""
    if num_outputs == 1:
        return np.ascontiguousarray(block, np.float64)
    spread = np.zeros((len(block), num_outputs, block.shape[1], num_outputs))
    for output in range(num_outputs):
        spread[:, output, :, output] = block
    return spread.reshape(len(block) * num_outputs, -1)


def measure_differences(first: Entries, second: Entries) -> dict[str, Any]:
    """Compare A and B entry by entry, read as :func:`strips` says.

    By the fields of the comparison, but differences are absolute; beside them diagonals, (rows,), and bytes read.
    ``|c A - B|`` comes from the residual of a c that is near the best one, not from 1 - alignment², which has no digits
    for matrices that differ by rounding. Centring is that of each output over samples, H = I - 11'/N. Its
    inner products come from row sums: their relative error is about 1e-16 times the share of the squared norm that
    centring takes away, and where less than 1e-10 is left, there is none.

    Memory beside that of the strips is ``2 rows (width + 1)`` float64.
    """
    sums = _Sums(first.num_samples, max(first.width, second.width))
    with np.errstate(invalid="ignore", over="ignore"):  # the result is looked at
        for strip in strips(first, second):
            sums.add(strip)
    return {**sums.result(), "bytes_read": first.bytes_read + second.bytes_read}


class _Sums:
    """Sums over the strips of both matrices."""

    def __init__(self, num_samples: int, width: int) -> None:
        self._num_samples, self._width = num_samples, width
        rows = num_samples * width
        self._diagonals = np.empty((2, rows))
        self._inverse = np.empty(rows)  # 1 / sqrt(B_ii), zero where that is not positive
        # Sums of each row over samples, one for each output of the column.
        self._rows = np.zeros((2, rows, width))
        # <A, A>, <B, B>, <A, B>, |A - B|², and with R = s A - B: |R|², <R, A>.
        self._inner = np.zeros(6)
        # |A - B|² of blocks of equal outputs around their mean over outputs, and of that mean.
        self._equal = np.zeros(2)
        self._near: float | None = None
        self._largest, self._at = -1.0, (0, 0)
        self._sizes = np.zeros(2)  # the largest entries of A and B

    def add(self, strip: Strip) -> None:
        """Add a strip; those of diagonal blocks come first, so that the diagonal is known where it is needed."""
        if strip.is_diagonal:
            self._add_diagonal(strip)
        first, second = strip.first, strip.second
        self._sizes = np.maximum(self._sizes, [np.abs(first).max(), np.abs(second).max()])
        if self._near is None:
            # Near the best scale, from a few entries.
            square = float(np.vdot(first, first))
            near = float(np.vdot(first, second)) / square if square else 1.0
            self._near = near if math.isfinite(near) and near else 1.0
        for sums, values in zip(self._rows, (first, second), strict=True):
            sums[strip.rows] += values.reshape(len(values), -1, self._width).sum(axis=1)
            if not strip.is_diagonal:
                sums[strip.columns] += values.reshape(-1, self._width, values.shape[1]).sum(axis=0).T
        gap = first - second
        residual = gap if self._near == 1.0 else self._near * first - second
        pairs = ((first, first), (second, second), (first, second), (gap, gap), (residual, residual), (residual, first))
        weight = 1.0 if strip.is_diagonal else 2.0
        self._inner += [weight * float(np.vdot(one, other)) for one, other in pairs]
        if (width := self._width) > 1:
            equal = np.einsum("ioko->iko", gap.reshape(-1, width, gap.shape[1] // width, width))
            mean = equal.mean(axis=2)
            self._equal += weight * np.array([np.sum((equal - mean[..., None]) ** 2), width * np.vdot(mean, mean)])
        self._find_largest(strip, gap)

    def _add_diagonal(self, strip: Strip) -> None:
        own = np.arange(strip.rows.start, strip.rows.stop)
        inside = own - own[0], own - strip.columns.start
        self._diagonals[:, own] = strip.first[inside], strip.second[inside]
        of_b = self._diagonals[1][own]
        self._inverse[own] = np.where(of_b > 0, 1 / np.sqrt(np.where(of_b > 0, of_b, 1.0)), 0.0)

    def _find_largest(self, strip: Strip, gap: FloatArray) -> None:
        """Look for the largest difference; in a diagonal block up to the strip's own rows, whose diagonal is known."""
        rows, columns = strip.rows, strip.columns
        if strip.is_diagonal:
            columns = slice(columns.start, rows.stop)
        relative = np.abs(gap[:, : columns.stop - columns.start])
        relative *= self._inverse[rows, None]
        relative *= self._inverse[columns]
        row, column = divmod(int(relative.argmax()), relative.shape[1])
        if relative[row, column] > self._largest:
            self._largest = float(relative[row, column])
            self._at = (rows.start + row, columns.start + column)

    def result(self) -> dict[str, Any]:
        """Differences from the sums."""
        for size in self._sizes:
            require_matrix_range(float(size))
        aa, bb, ab, gap, residual, with_first = map(float, self._inner)
        # |c A - B|² = |R|² - <R, A>² / |A|²; nothing below zero but rounding.
        best = residual - with_first**2 / aa if aa else bb
        zero_rows = int((self._diagonals[1] <= 0).sum())
        is_known = self._largest >= 0 and zero_rows < len(self._inverse)
        return {
            "frobenius_a": math.sqrt(aa),
            "frobenius_b": math.sqrt(bb),
            "relative_difference": math.sqrt(gap),
            "difference_by_outputs": self._by_outputs(gap),
            "scale": ab / aa if aa else None,
            "scaled_difference": math.sqrt(max(best, 0.0)),
            "alignment": _cosine(ab, aa, bb),
            "centred_alignment": self._centred_alignment(aa, bb, ab),
            "largest_entry_difference": self._largest if is_known else 0.0,
            "largest_entry": (min(self._at), max(self._at)) if is_known else None,
            "num_zero_rows": zero_rows,
            "diagonal_a": self._diagonals[0],
            "diagonal_b": self._diagonals[1],
        }

    def _by_outputs(self, gap: float) -> tuple[float, float, float] | None:
        """Parts of |A - B|, whose squares add up: between outputs, of equal ones around their mean, of that mean."""
        around, mean = map(float, self._equal)
        if self._width == 1:
            return None
        return math.sqrt(max(gap - around - mean, 0.0)), math.sqrt(around), math.sqrt(mean)

    def _centred_alignment(self, aa: float, bb: float, ab: float) -> float | None:
        count, width = self._num_samples, self._width
        totals = self._rows.reshape(2, count, width, width).sum(axis=1)

        def centred(inner: float, one: int, other: int) -> float:
            """``<(H ⊗ I) A (H ⊗ I), B>`` from ``<A, B>`` and row sums: I - H ⊗ I is U U' with U = 1 ⊗ I / sqrt(N)."""
            of_rows, of_totals = (float(np.vdot(sums[one], sums[other])) for sums in (self._rows, totals))
            return inner - 2 * of_rows / count + of_totals / count**2

        of_a, of_b = centred(aa, 0, 0), centred(bb, 1, 1)
        if of_a <= _NOTHING_LEFT * aa or of_b <= _NOTHING_LEFT * bb:
            return None
        return _cosine(centred(ab, 0, 1), of_a, of_b)


def _cosine(inner: float, one: float, other: float) -> float | None:
    return inner / math.sqrt(one * other) if one > 0 and other > 0 else None
