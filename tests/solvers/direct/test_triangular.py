"""Factors of blocks in memory, where they are split into halves and where they are not."""

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law
from scipy.linalg import solve_triangular

from ntkpipe.base.blas import Pool
from ntkpipe.solvers.direct.triangular import (
    NotPositiveError,
    Triangle,
    factor_in_place,
)

SIZES = (1, 127, 128, 129, 300, 700)


@pytest.fixture(scope="module", params=SIZES)
def matrix(request):
    return matrix_with_spectrum(power_law(max(request.param, 2), condition=1e4))[: request.param, : request.param]


@pytest.fixture(params=[1, 3])
def pool(request):
    with Pool.open(request.param) as found:
        yield found


def scratch_of(size):
    return np.empty(256 * max(size, 256))


def test_a_factor_is_lapacks_and_zero_above_the_diagonal(matrix, pool):
    block = matrix.copy()
    block[np.triu_indices(len(block), 1)] = np.nan  # never read
    factor_in_place(block, scratch_of(len(block)), pool)
    assert not np.triu(block, 1).any()
    np.testing.assert_allclose(block, np.linalg.cholesky(matrix), rtol=1e-9, atol=1e-10)


def test_rows_are_solved_against_the_transposed_factor(matrix):
    lower = np.linalg.cholesky(matrix)
    rows = np.random.default_rng(0).standard_normal((200, len(matrix)))
    exact = solve_triangular(lower, rows.T, lower=True).T
    Triangle(lower).solve_right(rows)
    np.testing.assert_allclose(rows, exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("transposed", [False, True])
def test_columns_are_solved_against_the_factor(matrix, transposed):
    lower = np.linalg.cholesky(matrix)
    rhs = np.random.default_rng(0).standard_normal((len(matrix), 3))
    exact = solve_triangular(lower, rhs, lower=True, trans=int(transposed))
    Triangle(lower).solve_left(rhs, transposed=transposed)
    np.testing.assert_allclose(rhs, exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("row", [0, 127, 128, 383, 384, 699])
def test_the_row_of_a_pivot_that_is_not_positive_is_of_the_whole_block(row, pool):
    matrix = np.eye(700)
    matrix[row, row] = -2.0
    with pytest.raises(NotPositiveError) as caught:
        factor_in_place(matrix, scratch_of(700), pool)
    assert (caught.value.row, caught.value.pivot) == (row, -2.0)
