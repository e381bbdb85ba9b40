"""Cholesky factors of blocks in memory, and products with their inverses, so that nearly all is matrix products."""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas

# Blocks that are factored by LAPACK and inverted by substitution; what is larger is split into products.
_BASE = 256
# Rows of a symmetric update at a time: what of them is above the diagonal is wasted.
_ROWS = 512


class NotPositiveError(Exception):
    """A pivot of a block is not positive.

    Attributes
    ----------
    row
        Of the block.
    pivot
        What is there.
    """

    def __init__(self, row: int, pivot: float) -> None:
        super().__init__(row, pivot)
        self.row = row
        self.pivot = pivot


def factor_in_place(block: NDArray[np.float64], scratch: NDArray[np.float64]) -> None:
    """Overwrite a symmetric block, of which only the lower triangle is read, with its Cholesky factor.

    Recursive in halves. Above the diagonal zeros are written.

    Parameters
    ----------
    block
        Shape (s, s), rows contiguous.
    scratch
        At least 256 s numbers, for products.

    Raises
    ------
    NotPositiveError
        If a pivot is not positive; the block is then spoilt.
    """
    size = len(block)
    if size <= _BASE:
        try:
            factor = np.linalg.cholesky(block)
        except np.linalg.LinAlgError:
            raise NotPositiveError(*_first_bad_pivot(block)) from None
        block[:] = factor
        return
    half = _half(size)
    factor_in_place(block[:half, :half], scratch)
    below = block[half:, :half]
    for start in range(0, size - half, _ROWS):
        solve_right_in_place(below[start : start + _ROWS], block[:half, :half], scratch)
    for start in range(0, size - half, _ROWS):
        rows = slice(start, min(start + _ROWS, size - half))
        subtract_product(block[half:, half:][rows, : rows.stop], below[rows], below[: rows.stop], scratch)
    try:
        factor_in_place(block[half:, half:], scratch)
    except NotPositiveError as error:
        raise NotPositiveError(half + error.row, error.pivot) from None
    block[:half, half:] = 0.0


def solve_right_in_place(rows: NDArray[np.float64], lower: NDArray[np.float64], scratch: NDArray[np.float64]) -> None:
    """Overwrite ``rows`` with ``rows @ inv(lower).T``; recursive in halves, substitution at the bottom.

    Parameters
    ----------
    rows
        Shape (r, s), rows contiguous.
    lower
        Shape (s, s), lower triangular.
    scratch
        At least r s numbers.
    """
    size = len(lower)
    if size <= _BASE:
        # Fortran's order of the transposes, so that nothing is copied that need not be.
        solved = blas.dtrsm(1.0, np.ascontiguousarray(lower).T, rows.T, lower=0, trans_a=1)
        rows[:] = solved.T
        return
    half = _half(size)
    left, right = rows[:, :half], rows[:, half:]
    solve_right_in_place(left, lower[:half, :half], scratch)
    subtract_product(right, left, lower[half:, :half], scratch)
    solve_right_in_place(right, lower[half:, half:], scratch)


def subtract_product(
    target: NDArray[np.float64], left: NDArray[np.float64], right: NDArray[np.float64], scratch: NDArray[np.float64]
) -> None:
    """``target -= left @ right.T`` by way of ``scratch``, which has room for the product."""
    product = scratch[: target.size].reshape(target.shape)
    np.matmul(left, right.T, out=product)
    target -= product


def solve_lower(lower: NDArray[np.float64], rhs: NDArray[np.float64], *, transposed: bool) -> NDArray[np.float64]:
    """``inv(lower) @ rhs``, or of its transpose; for a block of a few hundred or thousand rows."""
    solved = blas.dtrsm(1.0, np.ascontiguousarray(lower).T, rhs, lower=0, trans_a=0 if transposed else 1)
    return np.asarray(solved, np.float64)


def _half(size: int) -> int:
    """Where to split: about the middle, at a whole number of base blocks."""
    return -(-size // (2 * _BASE)) * _BASE


def _first_bad_pivot(block: NDArray[np.float64]) -> tuple[int, float]:
    """Where the factorisation of a block breaks down, and the pivot there; slow, and only called where it does."""
    factor = np.zeros_like(block)
    pivots = np.empty(len(block))
    for row in range(len(block)):
        known = factor[:row, :row]
        entries = solve_lower(known, block[row, :row, None], transposed=False)[:, 0] if row else block[row, :0]
        pivots[row] = block[row, row] - entries @ entries
        if not pivots[row] > 0:
            return row, float(pivots[row])
        factor[row, :row], factor[row, row] = entries, pivots[row] ** 0.5
    # LAPACK rounds otherwise: where it failed a pivot is within rounding of zero, so the smallest is the one.
    row = int(pivots.argmin())
    return row, float(pivots[row])
