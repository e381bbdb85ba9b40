"""Factors of blocks in memory, where they are split into halves and where they are not."""

import numpy as np
import pytest
from scipy.linalg import solve_triangular

from ntkpipe.solvers.triangular import (
    NotPositiveError,
    Triangle,
    factor_in_place,
    subtract_product,
)
from ntkpipe.testing import matrix_with_spectrum, power_law

SIZES = (1, 127, 128, 129, 300, 700)


@pytest.fixture(scope="module", params=SIZES)
def matrix(request):
    return matrix_with_spectrum(power_law(max(request.param, 2), condition=1e4))[: request.param, : request.param]


def scratch_of(size):
    return np.empty(256 * max(size, 256))


def test_a_factor_is_lapacks_and_zero_above_the_diagonal(matrix):
    block = matrix.copy()
    block[np.triu_indices(len(block), 1)] = np.nan  # never read
    factor_in_place(block, scratch_of(len(block)))
    assert not np.triu(block, 1).any()
    np.testing.assert_allclose(block, np.linalg.cholesky(matrix), rtol=1e-9, atol=1e-10)


def test_rows_are_solved_against_the_transposed_factor(matrix):
    lower = np.linalg.cholesky(matrix)
    rows = np.random.default_rng(0).standard_normal((200, len(matrix)))
    exact = solve_triangular(lower, rows.T, lower=True).T
    Triangle(lower).solve_right(rows, scratch_of(len(matrix)))
    np.testing.assert_allclose(rows, exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("transposed", [False, True])
def test_columns_are_solved_against_the_factor(matrix, transposed):
    lower = np.linalg.cholesky(matrix)
    rhs = np.random.default_rng(0).standard_normal((len(matrix), 3))
    exact = solve_triangular(lower, rhs, lower=True, trans=int(transposed))
    Triangle(lower).solve_left(rhs, transposed=transposed)
    np.testing.assert_allclose(rhs, exact, rtol=1e-8, atol=1e-9)


def test_products_are_subtracted_in_place():
    rng = np.random.default_rng(0)
    whole, left, right = rng.standard_normal((6, 9)), rng.standard_normal((4, 5)), rng.standard_normal((3, 5))
    exact = whole.copy()
    exact[1:5, 2:5] -= left @ right.T
    subtract_product(whole[1:5, 2:5], left, right, np.empty(12))
    np.testing.assert_allclose(whole, exact, rtol=1e-14)


@pytest.mark.parametrize("row", [0, 127, 128, 383, 384, 699])
def test_the_row_of_a_pivot_that_is_not_positive_is_of_the_whole_block(row):
    matrix = np.eye(700)
    matrix[row, row] = -2.0
    with pytest.raises(NotPositiveError) as caught:
        factor_in_place(matrix, scratch_of(700))
    assert (caught.value.row, caught.value.pivot) == (row, -2.0)
