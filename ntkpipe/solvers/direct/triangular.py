"""Cholesky factors of blocks in memory and solves with them, nearly all of it in matrix products.

All of it uses NumPy's BLAS: SciPy brings another one, with threads of its own.
"""

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.blas import Pool

_BASE = 128  # size of blocks that are factored by LAPACK and inverted; larger ones are split, and combined by products
_SMALLEST = 32  # up to this size inverses are computed row by row
_ROWS = 512  # rows of a symmetric update at a time: entries of them above the diagonal are computed in vain
ROWS_OF_THREAD = 256  # rows that a thread solves at a time


class NotPositiveError(Exception):
    """A block has a pivot that is not positive."""

    def __init__(self, row: int, pivot: float) -> None:
        super().__init__(row, pivot)
        self.row = row
        self.pivot = pivot


class Triangle:
    """A lower triangular block for solves: recursive in halves, small diagonal blocks by their inverses.

    An inverse alone would lose digits where a small block is ill-conditioned; a step of refinement restores them
    (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 14.1 and chapter 12).
    """

    def __init__(self, lower: FloatArray, inverses: list[FloatArray] | None = None) -> None:
        self.lower = lower
        starts = range(0, len(lower), _BASE)
        self.inverses = inverses or [_inverse(lower[s : s + _BASE, s : s + _BASE]) for s in starts]

    def solve_right(self, rows: FloatArray) -> None:
        """Overwrite ``rows``, shape (r, s), with ``rows @ inv(lower).T``; memory is 4 r (s + 128) bytes."""
        scratch = np.empty(len(rows) * (len(self.lower) + _BASE) // 2)
        self._solve_right(rows, 0, len(self.lower), scratch)

    def _solve_right(self, rows: FloatArray, start: int, stop: int, scratch: FloatArray) -> None:
        """Solve with columns ``start`` to ``stop`` of the block; ``rows`` has these columns only."""
        size = stop - start
        if size <= _BASE:
            lower, inverse = self.lower[start:stop, start:stop], self.inverses[start // _BASE]
            solved = rows @ inverse.T
            rows -= solved @ lower.T
            solved += rows @ inverse.T
            rows[:] = solved
            return
        half = _half(size)
        left, right = rows[:, :half], rows[:, half:]
        self._solve_right(left, start, start + half, scratch)
        product = scratch[: right.size].reshape(right.shape)
        np.matmul(left, self.lower[start + half : stop, start : start + half].T, out=product)
        right -= product
        self._solve_right(right, start + half, stop, scratch)

    def solve_left(self, rhs: FloatArray, *, transposed: bool) -> None:
        """Overwrite ``rhs``, shape (s, r), with ``inv(lower) @ rhs`` or ``inv(lower).T @ rhs``."""
        starts = range(0, len(self.lower), _BASE)
        for start in reversed(starts) if transposed else starts:
            here = slice(start, min(start + _BASE, len(self.lower)))
            lower, inverse = self.lower[here, here], self.inverses[start // _BASE]
            if transposed:
                lower, inverse = lower.T, inverse.T
                rhs[here] -= self.lower[here.stop :, here].T @ rhs[here.stop :]
            else:
                rhs[here] -= self.lower[here, :start] @ rhs[:start]
            solved = inverse @ rhs[here]
            solved += inverse @ (rhs[here] - lower @ solved)
            rhs[here] = solved


def factor_in_place(block: FloatArray, scratch: FloatArray, pool: Pool) -> Triangle:
    """Overwrite a symmetric block, read from its lower triangle, with its Cholesky factor and zeros, by halves."""
    size = len(block)
    if size <= _BASE:
        try:
            block[:] = np.linalg.cholesky(block)
        except np.linalg.LinAlgError:
            raise NotPositiveError(*_first_bad_pivot(block)) from None
        return Triangle(block)
    half = _half(size)
    upper_left = factor_in_place(block[:half, :half], scratch, pool)
    below = block[half:, :half]
    starts = range(0, size - half, ROWS_OF_THREAD)
    pool.each(upper_left.solve_right, (below[start : start + ROWS_OF_THREAD] for start in starts))
    for start in range(0, size - half, _ROWS):
        rows = slice(start, min(start + _ROWS, size - half))
        pool.subtract_product(block[half:, half:][rows, : rows.stop], below[rows], below[: rows.stop], scratch)
    try:
        lower_right = factor_in_place(block[half:, half:], scratch, pool)
    except NotPositiveError as error:
        raise NotPositiveError(half + error.row, error.pivot) from None
    block[:half, half:] = 0.0
    return Triangle(block, upper_left.inverses + lower_right.inverses)


def solve_bytes(size: int) -> int:
    """Memory of a thread that solves its rows with a triangle of this size."""
    return 8 * ROWS_OF_THREAD * ((size + _BASE) // 2 + 2 * _BASE)


def _half(size: int) -> int:
    """Where to split: about the middle, at a whole number of base blocks."""
    return -(-size // (2 * _BASE)) * _BASE


def _inverse(lower: FloatArray) -> FloatArray:
    size = len(lower)
    inverse = np.zeros((size, size))
    if size <= _SMALLEST:
        for row in range(size):
            inverse[row, row] = 1.0
            inverse[row] -= lower[row, :row] @ inverse[:row]
            inverse[row] /= lower[row, row]
        return inverse
    half = size // 2
    inverse[:half, :half], inverse[half:, half:] = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse


def _first_bad_pivot(block: FloatArray) -> tuple[int, float]:
    """Row where the factorisation of a block breaks down, and the pivot there; slow, for failures only."""
    factor = np.zeros_like(block)
    pivots = np.empty(len(block))
    for row in range(len(block)):
        entries = np.linalg.solve(factor[:row, :row], block[row, :row])
        pivots[row] = block[row, row] - entries @ entries
        if not pivots[row] > 0:
            return row, float(pivots[row])
        factor[row, :row], factor[row, row] = entries, pivots[row] ** 0.5
    # LAPACK rounds differently: where it failed a pivot is within rounding of zero, so it is the smallest one.
    row = int(pivots.argmin())
    return row, float(pivots[row])
