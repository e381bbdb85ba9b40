"""How far two symmetric matrices are apart, from one pass over the entries of both."""

import math
from typing import Any

import numpy as np

from ntkpipe.analysis.comparing.paired_tiles import Entries, Strip, strips
from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import NonFiniteError

# A centred matrix of so small a part of the squared norm has no digits that say anything.
_NOTHING_LEFT = 1e-10


def measure_differences(first: Entries, second: Entries) -> dict[str, Any]:
    """Compare A and B entry by entry; how they are read is in :mod:`ntkpipe.analysis.comparing.paired_tiles`.

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
        self._diagonals = np.empty(rows), np.empty(rows)
        self._inverse = np.empty(rows)  # 1 / sqrt(B_ii), zero where that is not positive
        # Sums of each row over samples, one for each output of the column.
        self._rows = np.zeros((rows, width)), np.zeros((rows, width))
        # <A, A>, <B, B>, <A, B>, |A - B|², and with R = s A - B: |R|², <R, A>.
        self._inner = np.zeros(6)
        self._near: float | None = None
        self._largest, self._at = -1.0, (0, 0)

    def add(self, strip: Strip) -> None:
        """Add a strip; those of diagonal blocks come first, so that the diagonal is known where it is needed."""
        if strip.is_diagonal:
            self._add_diagonal(strip)
        first, second = strip.first, strip.second
        if self._near is None:
            # Near the best scale, from a few entries.
            square = float(np.vdot(first, first))
            near = float(np.vdot(first, second)) / square if square else 1.0
            self._near = near if math.isfinite(near) and near else 1.0
        self._add_rows(strip)
        gap = first - second
        residual = gap if self._near == 1.0 else self._near * first - second
        pairs = ((first, first), (second, second), (first, second), (gap, gap), (residual, residual), (residual, first))
        weight = 1.0 if strip.is_diagonal else 2.0
        self._inner += [weight * float(np.vdot(one, other)) for one, other in pairs]
        self._find_largest(strip, gap)

    def _add_diagonal(self, strip: Strip) -> None:
        own = np.arange(strip.rows.start, strip.rows.stop)
        inside = own - own[0], own - strip.columns.start
        for diagonal, values in zip(self._diagonals, (strip.first, strip.second), strict=True):
            diagonal[own] = values[inside]
        of_b = self._diagonals[1][own]
        self._inverse[own] = np.where(of_b > 0, 1 / np.sqrt(np.where(of_b > 0, of_b, 1.0)), 0.0)

    def _add_rows(self, strip: Strip) -> None:
        width = self._width
        for sums, values in zip(self._rows, (strip.first, strip.second), strict=True):
            sums[strip.rows] += values.reshape(len(values), -1, width).sum(axis=1)
            if not strip.is_diagonal:
                sums[strip.columns] += values.reshape(-1, width, values.shape[1]).sum(axis=0).T

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
        if not np.isfinite(self._inner).all():
            raise NonFiniteError(
                "one of the kernels holds NaN or infinity, or entries whose squares are beyond float64"
            )
        aa, bb, ab, gap, residual, with_first = map(float, self._inner)
        # |c A - B|² = |R|² - <R, A>² / |A|²; nothing below zero but rounding.
        best = residual - with_first**2 / aa if aa else bb
        zero_rows = int((self._diagonals[1] <= 0).sum())
        is_known = self._largest >= 0 and zero_rows < len(self._inverse)
        return {
            "frobenius_a": math.sqrt(aa),
            "frobenius_b": math.sqrt(bb),
            "relative_difference": math.sqrt(gap),
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

    def _centred_alignment(self, aa: float, bb: float, ab: float) -> float | None:
        one, other = self._rows
        of_a, of_b = self._centred(aa, one, one), self._centred(bb, other, other)
        if of_a <= _NOTHING_LEFT * aa or of_b <= _NOTHING_LEFT * bb:
            return None
        return _cosine(self._centred(ab, one, other), of_a, of_b)

    def _centred(self, inner: float, one: FloatArray, other: FloatArray) -> float:
        """``<(H ⊗ I) A (H ⊗ I), B>`` from ``<A, B>`` and row sums: I - H ⊗ I is U U' with U = 1 ⊗ I / sqrt(N)."""
        count, width = self._num_samples, self._width
        totals = [sums.reshape(count, width, width).sum(axis=0) for sums in (one, other)]
        return inner - 2 * float(np.vdot(one, other)) / count + float(np.vdot(*totals)) / count**2


def _cosine(inner: float, one: float, other: float) -> float | None:
    return inner / math.sqrt(one * other) if one > 0 and other > 0 else None
