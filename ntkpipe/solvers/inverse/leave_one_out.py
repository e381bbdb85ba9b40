"""Exact leave-one-out of kernel ridge regression from one fit: blocks of the inverse instead of n refits.

With G = (K + λI)^-1 and coefficients A = G Y, the fit without sample i misses it by ``(G_ii)^-1 A_i``, where i stands
for all rows of the sample: one, or the O rows of a full NTK, which share an input and must go together. For one row see
Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, equation 5.12, and Allen 1974, PRESS; with the
rows of i last, elimination gives the same for blocks, ``A_i = G_ii (y_i - K_i,-i (K_-i + λI)^-1 y_-i)``.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray, rows_of, runs
from ntkpipe.solvers.direct.factor import CholeskyFactor

# Size of a temporary array.
_BYTES_AT_ONCE = 2**25
# Rows of eigenvectors are known to about ε; a part of a row in the null space below its root is rounding.
_NOTHING = 1e-8


def residuals(blocks: FloatArray, coefficients: FloatArray) -> FloatArray:
    """``(G_ii)^-1 A_i`` of each sample."""
    count, width, _ = blocks.shape
    if width == 1:
        return coefficients / blocks[:, 0]
    found = np.linalg.solve(blocks, coefficients.reshape(count, width, -1))
    return np.asarray(found, np.float64).reshape(coefficients.shape)


def weighted_blocks(vectors: FloatArray, weights: FloatArray, width: int) -> FloatArray:
    """Diagonal blocks of ``V diag(w) V'``, shape (N, S, S): n² S multiplications."""
    count = len(vectors) // width
    found = np.empty((count, width, width))
    for samples in runs(count, max(1, _BYTES_AT_ONCE // (8 * width * vectors.shape[1]))):
        rows = vectors[samples.start * width : samples.stop * width].reshape(-1, width, vectors.shape[1])
        if width == 1:  # as one product, for which there is BLAS
            found[samples, 0, 0] = np.square(rows[:, 0]) @ weights
        else:
            found[samples] = (rows * weights) @ rows.transpose(0, 2, 1)
    return found


def inverse_blocks(factor: CholeskyFactor, width: int) -> FloatArray:
    """Diagonal blocks of ``(K + shift I)^-1`` by a factor, shape (N, S, S); about the work of the factor.

    Memory is n times as many columns as a panel of the factor has, in float64.
    """
    count = factor.num_rows // width
    if width == 1:
        return factor.inverse_diagonal().reshape(count, 1, 1)
    return blocks_at(
        np.arange(count), factor.num_rows, width, factor.panel_width, partial(quadratic, factor, width=width)
    )


def quadratic(factor: CholeskyFactor, columns: FloatArray, *, width: int) -> FloatArray:
    """``B_i' (K + shift I)^-1 B_i`` by a factor for each run of ``width`` columns, shape (c / width, width, width)."""
    half = factor.half_solve(columns).T.reshape(-1, width, len(columns))
    return np.asarray(half @ half.transpose(0, 2, 1))


def blocks_at(
    samples: NDArray[np.int64], num_rows: int, width: int, most: int, form: Callable[[FloatArray], FloatArray]
) -> FloatArray:
    """Diagonal blocks of a matrix at samples, from its quadratic form of unit vectors, about ``most`` at a time."""
    found = np.empty((len(samples), width, width))
    for some in runs(len(samples), max(1, most // width)):
        rows = rows_of(samples[some], width)
        unit = np.zeros((num_rows, len(rows)))
        unit[rows, np.arange(len(rows))] = 1.0
        found[some] = form(unit)
    return found


def limit_residuals(
    null_blocks: FloatArray, null_targets: FloatArray, inverse: FloatArray, coefficients: FloatArray
) -> FloatArray:
    """Leave-one-out residuals of the minimum-norm solution of a singular kernel: the limit λ → 0 of :func:`residuals`.

    There G = P/λ + K⁺ + O(λ) with P the projection onto the null space, and A = PY/λ + K⁺Y + O(λ). Within the range of
    P_ii the limit is decided by P, in the rest of a sample's rows by what remains: with Q an orthonormal basis of that,
    ``r = P_ii⁺ (PY)_i + Q s`` and ``Q'K⁺_ii Q s = Q'((K⁺Y)_i - K⁺_ii P_ii⁺ (PY)_i)``.
    """
    count, width, _ = inverse.shape
    shape = count, width, -1
    found = np.empty((count, width, coefficients.shape[1]))
    parts, rest = null_targets.reshape(shape), coefficients.reshape(shape)
    for sample in range(count):
        values, vectors = np.linalg.eigh(null_blocks[sample])
        inside = values > _NOTHING
        decided, free = vectors[:, inside], vectors[:, ~inside]
        residual = decided @ ((decided.T @ parts[sample]) / values[inside, None])
        if free.shape[1]:
            left = free.T @ (rest[sample] - inverse[sample] @ residual)
            residual = residual + free @ np.linalg.solve(free.T @ inverse[sample] @ free, left)
        found[sample] = residual
    return found.reshape(coefficients.shape)
