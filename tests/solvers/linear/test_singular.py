"""Singular kernels without a ridge: solutions stay small, residuals are the best of all, statuses are honest."""

import re

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law

from ntkpipe import KernelRegression, cholesky, solve

SIZES = (6, 40, 150)
METHODS = pytest.mark.parametrize("method", ["pcg", "block_cg"])
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
# An iterate of this many times |y| / |K| counts as bad as a residual of |y|.
MOST = 1.1e6


def low_rank(n, rng):
    features = rng.standard_normal((n, max(1, n // 3))) * np.arange(1, max(1, n // 3) + 1) ** -1.0
    return features @ features.T


def duplicated(n, rng):
    """Every sample of half of the rows comes twice, or more often."""
    features = rng.standard_normal((n // 2, n)) * np.arange(1, n + 1) ** -0.7
    rows = np.concatenate([np.arange(n // 2), rng.integers(0, n // 2, n - n // 2)])
    return (features @ features.T)[np.ix_(rows, rows)]


def constant(n, rng):
    return np.full((n, n), 2.0)


KINDS = pytest.mark.parametrize("make", [low_rank, duplicated, constant])


def stored(matrix, dtype):
    return ((matrix + matrix.T) / 2).astype(dtype)


def residuals(matrix, rhs, solution):
    return np.linalg.norm(rhs - matrix.astype(np.float64) @ solution, axis=0) / np.linalg.norm(rhs, axis=0)


@METHODS
@DTYPES
@KINDS
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("rank", [None, "half"])
def test_inconsistent_targets_have_a_small_solution_and_no_good_status(make, n, dtype, method, rank, rng):
    matrix, rhs = stored(make(n, rng), dtype), rng.standard_normal((n, 3))
    found = solve(matrix, rhs, method=method, rank=rank and n // 2)
    assert not found.is_converged
    own = residuals(matrix, rhs, found.coefficients)
    np.testing.assert_allclose(found.residuals, own, rtol=1e-6)
    assert (found.residuals <= 1.0).all()
    assert (found.residuals <= found.check_residuals.min(axis=0, initial=1.0)).all()
    values, vectors = np.linalg.eigh(matrix.astype(float))
    sizes = np.linalg.norm(found.coefficients, axis=0) * values[-1] / np.linalg.norm(rhs, axis=0)
    # What is larger is worth it: no solution of that size has so small a residual.
    shares = (values[-1] / MOST) ** 2 / (values**2 + (values[-1] / MOST) ** 2)
    least = np.linalg.norm(shares[:, None] * (vectors.T @ rhs), axis=0) / np.linalg.norm(rhs, axis=0)
    assert ((sizes <= MOST) | (own < least)).all()
    assert found.iterations + len(found.checks) < 1000
    assert "KernelRegression(method='eigh')" in found.message


@METHODS
@DTYPES
@KINDS
@pytest.mark.parametrize("n", SIZES)
def test_the_ridge_of_the_message_does(make, n, dtype, method, rng):
    matrix, rhs = stored(make(n, rng), dtype), rng.standard_normal((n, 2))
    message = solve(matrix, rhs, method=method).message
    ridge = float(re.search(r"ridge by at least (\S+),", message)[1])
    assert np.isfinite(cholesky(matrix, ridge=ridge).logdet)
    assert "semi-definite" not in message
    assert solve(matrix, rhs, method=method, ridge=ridge, max_passes=4000).is_converged


@METHODS
@KINDS
@pytest.mark.parametrize("n", SIZES)
def test_consistent_targets_converge(make, n, method, rng):
    matrix = stored(make(n, rng), np.float64)
    rhs = matrix @ rng.standard_normal((n, 3))
    found = solve(matrix, rhs, method=method)
    assert found.is_converged
    assert residuals(matrix, rhs, found.coefficients).max() <= 1.1e-6


def test_where_zero_is_the_best_it_is_the_answer(rng):
    """Of targets that the kernel does not see at all."""
    matrix = np.zeros((8, 8))
    matrix[:4, :4] = matrix_with_spectrum(power_law(4, condition=10.0))
    rhs = np.zeros((8, 1))
    rhs[6] = 1.0
    for method in ("pcg", "block_cg"):
        found = solve(matrix, rhs, method=method, task="regression")
        assert (found.residuals[0], abs(found.coefficients).max()) == (1.0, 0.0)
        assert not found.is_converged


@METHODS
def test_a_zero_matrix(method):
    found = solve(np.zeros((5, 5)), np.ones((5, 2)), method=method)
    assert found.residuals == pytest.approx(1.0, rel=1e-15)
    assert not found.coefficients.any()
    assert not found.is_converged


@METHODS
@pytest.mark.parametrize("condition", [1e8, 1e10])
def test_ill_conditioned_but_definite_is_not_taken_for_singular(condition, method, rng):
    """Residuals are far above one for hundreds of passes, and then become small after all."""
    matrix = matrix_with_spectrum(power_law(120, condition=condition))
    rhs = rng.standard_normal((120, 2))
    found = solve(matrix, rhs, method=method, rank=6, max_passes=8000)
    assert found.is_converged
    assert found.check_residuals.max() > 1.0


@METHODS
def test_passes_that_do_not_suffice_leave_the_best(method, rng):
    matrix = matrix_with_spectrum(np.geomspace(1e4, 1e-6, 100))
    rhs = rng.standard_normal((100, 2))
    found = solve(matrix, rhs, method=method, max_passes=200)
    assert found.status == "step limit"
    assert found.residuals.max() < 1.0
    np.testing.assert_allclose(found.residuals, residuals(matrix, rhs, found.coefficients), rtol=1e-6)


def test_the_minimum_norm_is_what_the_message_says(rng):
    matrix, rhs = duplicated(40, rng), rng.standard_normal(40)
    wanted = np.linalg.pinv(matrix, rcond=1e-10, hermitian=True) @ rhs
    found = KernelRegression(method="eigh", ridge=0.0).fit(matrix, rhs)
    np.testing.assert_allclose(found.dual_coef_, wanted, rtol=1e-6, atol=1e-9 * abs(wanted).max())
