"""The smallest eigenvalue as errors know it: what they call indefinite is so, and the ridge that they advise works."""

import contextlib
import re

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law

from ntkpipe.base.errors import IndefiniteError
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers import probe_lanczos
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.inverse.solve import solve
from ntkpipe.solvers.probe_lanczos import lowest_eigenvalue

SIZES = (5, 17, 64, 130, 300)


def duplicates(n, rng):
    features = rng.standard_normal((n // 2 + 1, n)) * np.arange(1, n + 1) ** -0.8
    rows = rng.integers(0, n // 2 + 1, n)
    return (features @ features.T)[np.ix_(rows, rows)].astype(np.float32)


def low_rank_with_noise(n, rng):
    features = rng.standard_normal((n, n // 4 + 1))
    noise = rng.standard_normal((n, n))
    return features @ features.T + 1e-4 * (noise + noise.T)


def rounded(n, rng):
    return matrix_with_spectrum(power_law(n, condition=1e12), seed=n).astype(np.float32)


def exactly_singular(n, rng):
    features = rng.integers(-3, 4, (n, n // 3 + 1)).astype(np.float64)
    return features @ features.T


def slightly_indefinite(n, rng):
    return matrix_with_spectrum([*power_law(n - 1, condition=1e6), -1e-3], seed=n)


def indefinite(n, rng):
    return matrix_with_spectrum([*power_law(n - 1, condition=1e6), -1.0], seed=n)


FAMILY = [duplicates, low_rank_with_noise, rounded, exactly_singular, slightly_indefinite, indefinite]
BY = pytest.mark.parametrize("by", ["lapack", "lanczos"])


@pytest.fixture
def matrix(make, n, by, rng, monkeypatch):
    if by == "lanczos":
        monkeypatch.setattr(probe_lanczos, "_FEW_ROWS", 0)
    values = make(n, rng)
    return (values + values.T) / 2


@BY
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("make", FAMILY)
def test_the_advised_ridge_works(matrix, rng):
    rhs = rng.standard_normal((len(matrix), 2))
    with contextlib.suppress(IndefiniteError):
        cholesky(matrix)
        return  # by rounding it passed for a definite one
    with pytest.raises(IndefiniteError) as caught:
        cholesky(matrix)
    ridge = caught.value.ridge
    assert float(re.search(r"ridge of at least (\S+?)(,|$)", str(caught.value))[1]) == ridge
    assert np.isfinite(cholesky(matrix, ridge=ridge).logdet)
    for method in ("pcg", "block_cg"):
        found = solve(matrix, rhs, ridge=ridge, method=method, tol=1e-3, max_passes=4000)
        assert found.status != "indefinite at storage precision"
        # Float64 reaches residuals of about its rounding times the condition number.
        assert found.is_converged or np.linalg.norm(matrix.astype(float), 2) / ridge > 1e9


@BY
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("make", FAMILY)
def test_only_what_rounding_does_not_explain_is_called_indefinite(matrix, make):
    values = np.linalg.eigvalsh(matrix.astype(np.float64))
    found = lowest_eigenvalue(DenseOperator(matrix))
    rounding = 1e-13 * values[-1]
    assert values[0] <= found.most + rounding
    assert found.least <= values[0] + rounding
    is_refuted = "not positive semi-definite" in found.words
    if values[0] >= -found.floor - rounding:
        assert not is_refuted
    if make in {indefinite, slightly_indefinite}:
        assert is_refuted == (found.most < -1e-4)


@pytest.mark.parametrize("n", SIZES)
def test_a_pivot_far_below_zero_is_no_verdict(n, rng):
    """A Gram matrix of float32 whose leading block is nearly singular: Schur complements divide rounding by little."""
    features = rng.standard_normal((n, 2)) * [1.0, 1e-3]
    matrix = (features @ features.T).astype(np.float32)
    with pytest.raises(IndefiniteError) as caught:
        cholesky(matrix)
    assert np.linalg.eigvalsh(matrix.astype(float))[0] > -10 * caught.value.floor
    assert "indefinite at storage precision" in str(caught.value)
    assert "not positive semi-definite" not in str(caught.value)


def test_it_is_found_once_for_a_matrix_and_its_shifts(rng):
    operator = DenseOperator(matrix_with_spectrum(power_law(40, condition=1e3)))
    first = lowest_eigenvalue(operator)
    before = operator.work.passes
    shifted = lowest_eigenvalue(operator.shifted(-2.0).shifted(-3.0))
    assert (shifted.most, shifted.least) == (first.most - 5.0, first.least - 5.0)
    assert operator.work.passes == before
    assert shifted.ridge() >= 5.0 - first.most


def test_large_matrices_take_some_tens_of_passes(rng, monkeypatch):
    monkeypatch.setattr(probe_lanczos, "_FEW_ROWS", 100)
    operator = DenseOperator(matrix_with_spectrum([*power_law(499, condition=1e6), -1.0]))
    found = lowest_eigenvalue(operator)
    assert operator.work.passes <= 42
    assert found.least <= -1.0 <= found.most + 1e-9


@pytest.mark.parametrize("value", [1.0, 1.01e-7, 9.99e5, 3.4e-300, 0.0])
def test_ridges_are_rounded_up_to_two_digits(value):
    found = probe_lanczos.rounded_up(value)
    assert value <= found <= 1.1 * value
    assert float(f"{found:.2g}") == found
