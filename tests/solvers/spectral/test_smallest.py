"""The smallest eigenvalue lies within its bounds, a proof is one, and what storage hides is said."""

import math

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law, spectra

from ntkpipe.base import config
from ntkpipe.base.errors import ConfigError, ResourceError
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.spectral import smallest as module
from ntkpipe.solvers.spectral.smallest import Davidson, smallest


def check(found, matrix):
    """Bounds and residuals against LAPACK and plain products."""
    matrix = np.asarray(matrix, np.float64)
    exact = np.linalg.eigvalsh(matrix)
    rounding = 1e-13 * np.linalg.norm(matrix)
    k = len(found.eigenvalues)
    vectors = found.eigenvectors
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-12)
    norms = np.linalg.norm(matrix @ vectors - vectors * found.eigenvalues, axis=0)
    np.testing.assert_allclose(found.residuals, norms, atol=rounding)
    assert found.high >= exact[0] - rounding
    if found.low is not None:
        assert found.low <= exact[0] + rounding
    assert found.largest == pytest.approx(exact[-1], rel=1e-6)
    return exact


@pytest.mark.parametrize("certify", [True, False])
@pytest.mark.parametrize("k", [1, 6])
@pytest.mark.parametrize("name", spectra(300))
def test_bounds_hold(name, k, certify):
    matrix = matrix_with_spectrum(spectra(300)[name])
    found = smallest(matrix, k, certify=certify, max_passes=600)
    exact = check(found, matrix)
    assert found.certificate == ("cholesky" if certify else "residual")
    is_indefinite = name == "indefinite"
    # Zeros are negative or positive by rounding, and several need not converge: bounds hold all the same.
    is_known = name != "singular"
    assert found.status == "converged" or not is_known
    assert ("not known at storage precision" in found.message) == (not is_known and found.status != "step limit")
    assert ("indefinite beyond" in found.message) == is_indefinite
    np.testing.assert_allclose(found.eigenvalues, exact[:k], rtol=2e-2, atol=1e-12 * exact[-1])
    if exact[0] > 1e-9 * exact[-1]:
        condition = exact[-1] / exact[0]
        assert found.condition_low <= condition * (1 + 1e-9)
        assert found.condition_high >= condition * (1 - 1e-9)
        assert found.condition_high / found.condition_low < 1.05


def test_an_exact_inverse_takes_few_passes():
    matrix = matrix_with_spectrum(power_law(400, condition=1e6))
    factor, operator = cholesky(matrix), DenseOperator(matrix)
    found = smallest(operator, inverse=lambda block: factor.solve(block).coefficients, certify=False)
    check(found, matrix)
    assert found.status == "converged"
    assert found.options["inverse"] == "given"
    assert found.work.passes < smallest(matrix, certify=False).work.passes / 2


def test_three_lines_on_a_small_array(rng):
    rows = rng.standard_normal((8, 8))
    found = smallest(rows @ rows.T)
    check(found, rows @ rows.T)
    assert "proved by Cholesky" in str(found)


@pytest.mark.parametrize(
    "matrix", [np.full((1, 1), 3.0), np.eye(40), np.zeros((6, 6)), np.ones((50, 50)), -np.eye(20), np.diag([0.0, 1.0])]
)
@pytest.mark.parametrize("certify", [True, False])
def test_degenerate_matrices(matrix, certify):
    found = smallest(matrix, certify=certify)
    check(found, matrix)
    assert found.low is not None


def test_a_missed_eigenvalue_is_found_by_the_proof():
    """A start that holds nothing of the smallest eigenvector, in a block diagonal matrix, converges to another one."""
    matrix = np.diag(np.concatenate([[1e-3], np.linspace(1.0, 2.0, 199)]))

    def blind(block):
        block = block.copy()
        block[0] = 0.0
        return block

    unproved = smallest(matrix, inverse=blind, certify=False)
    assert unproved.eigenvalues[0] == pytest.approx(1.0, rel=1e-3)
    assert (unproved.status, unproved.certificate) == ("converged", "residual")
    assert "if none was missed" in str(unproved)
    proved = smallest(matrix, inverse=blind, certify=True)
    assert proved.status == "not converged"
    assert (proved.low, proved.certificate, proved.condition_high) == (None, None, None)
    assert proved.high >= 1e-3
    assert "missed" in proved.message


def test_a_lower_bound_is_not_proved_above_the_eigenvalue(monkeypatch):
    """Were residuals too small by a fault, the proof would fail."""
    monkeypatch.setattr(
        module, "rayleigh_ritz", lambda operator, vectors, **_: (np.array([2e-3]), vectors, np.array([1e-5]))
    )
    found = smallest(matrix_with_spectrum(np.concatenate([np.linspace(1.0, 2.0, 99), [1e-3]])), certify=True)
    assert found.status == "not converged"


def test_float32_storage_hides_small_eigenvalues():
    exact = np.concatenate([power_law(250, condition=1e3), np.full(50, 1e-9)])
    matrix = matrix_with_spectrum(exact).astype(np.float32)
    found = smallest(matrix)
    check(found, matrix)
    assert "not known at storage precision" in found.message
    assert found.condition_high is None
    assert found.status in {"converged", "indefinite at storage precision"}
    assert (found.eigenvalues[0] < 0) == (found.status == "indefinite at storage precision")


def test_too_few_passes_are_said():
    matrix = matrix_with_spectrum(power_law(400, condition=1e6))
    found = smallest(matrix, max_passes=2, certify=False)
    check(found, matrix)
    assert found.status == "step limit"
    assert "raise max_passes" in found.message


def test_passes_are_counted_and_seen():
    operator, steps = DenseOperator(matrix_with_spectrum(power_law(200, condition=1e4))), []
    found = smallest(operator, certify=False, monitor=steps.append)
    assert found.work == operator.work
    assert [step.work.passes for step in steps] == sorted(step.work.passes for step in steps)
    assert steps[-1].residual <= 1e-2 < steps[0].residual


def test_two_runs_give_the_same_bits():
    matrix = matrix_with_spectrum(power_law(200, condition=1e4))
    first, second = (smallest(matrix, 3, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.eigenvectors, second.eigenvectors)
    assert (first.low, first.high) == (second.low, second.high)


def test_a_proof_that_does_not_fit_is_left_out_or_refused(monkeypatch, tmp_path):
    matrix = matrix_with_spectrum(power_law(300, condition=1e4))
    monkeypatch.setattr(config, "available_memory", lambda: 10**7)
    assert smallest(matrix).certificate == "residual"
    assert smallest(matrix, path=tmp_path / "factor").certificate == "cholesky"

    def refuse(operator, **options):
        raise ResourceError("no room")

    monkeypatch.setattr(module, "cholesky", refuse)
    with pytest.raises(ResourceError):
        smallest(matrix, certify=True)


@pytest.mark.parametrize(
    ("options", "word"), [({"k": 0}, "k="), ({"k": 21}, "k="), ({"tol": -1}, "tol"), ({"block": 1, "k": 2}, "block")]
)
def test_bad_numbers_are_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        smallest(np.eye(20), **options)


@pytest.mark.parametrize("inverse", [lambda block: block[:, :1], lambda block: block.astype(complex)])
def test_an_inverse_that_returns_something_else_is_refused(inverse):
    with pytest.raises(ConfigError, match="inverse returned"):
        smallest(np.diag(np.arange(1.0, 41.0)), inverse=inverse)


def test_an_inverse_that_returns_nan_costs_passes_only():
    matrix = matrix_with_spectrum(np.linspace(1.0, 9.0, 60))
    found = smallest(matrix, inverse=lambda block: block * math.nan, certify=True)
    check(found, matrix)
    assert found.eigenvalues[0] == pytest.approx(1.0)


@pytest.mark.parametrize("num_rows", [5, 60])
def test_the_space_stays_orthonormal_and_its_products_true(num_rows):
    matrix = matrix_with_spectrum(power_law(num_rows, condition=1e3))
    operator, space = DenseOperator(matrix), Davidson(num_rows, 4, lambda block: block, 0)
    for _ in range(25):
        space.advance(operator)
        vectors = space._vectors[:, : space._size]
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(space._size), atol=1e-12)
        np.testing.assert_allclose(space._products[:, : space._size], matrix @ vectors, atol=1e-12 * 1e4)
        if space.is_whole:
            break
    assert space.is_whole == (num_rows == 5)
