"""Leave-one-out residuals of singular kernels are the limits of those at small ridges."""

import numpy as np
import pytest

from ntkpipe.solvers.inverse.exact import limit_residuals


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("columns", [1, 3])
def test_the_limit_is_that_of_small_ridges(rng: np.random.Generator, width: int, columns: int) -> None:
    n, rank = 12, 7
    factor = rng.standard_normal((n, rank))
    kernel, targets = factor @ factor.T, rng.standard_normal((n, columns))
    values, vectors = np.linalg.eigh(kernel)
    null, inside = vectors[:, : n - rank], vectors[:, n - rank :]
    projection = null @ null.T
    inverse = (inside / values[n - rank :]) @ inside.T

    def blocks(matrix: np.ndarray) -> np.ndarray:
        return np.stack([matrix[i : i + width, i : i + width] for i in range(0, n, width)])

    found = limit_residuals(blocks(projection), projection @ targets, blocks(inverse), inverse @ targets)
    ridge = 1e-6 * values[-1]
    resolvent = np.linalg.inv(kernel + ridge * np.eye(n))
    parts = (resolvent @ targets).reshape(n // width, width, columns)
    expected = np.linalg.solve(blocks(resolvent), parts).reshape(n, columns)
    # The limit is linear in the ridge; the inverse has a condition number of 1e6.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
