"""Log determinants: within their stated errors, and never called converged where truncation is what they are off by."""

import math

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law, spectra

from ntkpipe.base.errors import ConfigError
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.linear.preconditioner import randomly_pivoted_cholesky
from ntkpipe.solvers.spectral.logdet import logdet, slq_logdet


def plain_logdet(matrix, **options):
    return slq_logdet(matrix, preconditioner=None, **options)


def reference(matrix, ridge):
    sign, value = np.linalg.slogdet(matrix + ridge * np.eye(len(matrix)))
    return value if sign > 0 else math.nan


def exact_samples(matrix, ridge, *, num_probes=16, seed=0):
    """What the probes of plain quadrature give after infinitely many steps."""
    probes = np.random.default_rng(seed).choice([-1.0, 1.0], (len(matrix), num_probes))
    values, vectors = np.linalg.eigh(matrix)
    return np.log(values + ridge) @ (vectors.T @ probes) ** 2


WELL_DEFINED = [name for name in spectra(300) if name not in {"singular", "indefinite"}]


@pytest.mark.parametrize("name", WELL_DEFINED)
@pytest.mark.parametrize("rank", [0, 30])
@pytest.mark.parametrize("relative_ridge", [0.0, 1e-4])
def test_values_are_within_their_errors(name, rank, relative_ridge):
    matrix = matrix_with_spectrum(spectra(300)[name])
    ridge = relative_ridge * np.trace(matrix) / 300
    found = slq_logdet(matrix, ridge=ridge, rank=rank or None, preconditioner="rpcholesky" if rank else None)
    assert abs(found.value - reference(matrix, ridge)) <= 3 * found.standard_error + found.truncation_error + 1e-9
    assert found.truncation_error <= max(found.standard_error / 4, 0.15)
    assert found.rank <= rank
    assert (found.rank > 0) == (rank > 0)


@pytest.mark.parametrize("name", WELL_DEFINED)
@pytest.mark.parametrize("steps", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_truncation_error_is_honest_at_any_number_of_steps(name, steps, ridge):
    matrix = matrix_with_spectrum(spectra(300)[name])
    found = plain_logdet(matrix, num_steps=steps, ridge=ridge)
    exact = exact_samples(matrix, ridge).mean()
    slack = 1e-6 * abs(exact)
    assert abs(found.value - exact) <= found.truncation_error + slack
    assert found.lower - slack <= exact <= found.upper + slack


@pytest.mark.parametrize("condition", [1e6, 1e8, 1e10])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 20])
def test_plain_quadrature_of_few_steps_is_not_called_converged(condition, steps):
    matrix = matrix_with_spectrum(power_law(400, condition=condition))
    found = plain_logdet(matrix, num_steps=steps, tol=0.05)
    assert abs(found.value - reference(matrix, 0.0)) > 3 * found.standard_error
    assert found.status == "step limit"
    assert "truncation" in found.message


def test_the_bracket_of_a_preconditioned_matrix_holds():
    matrix = matrix_with_spectrum(power_law(300, condition=1e6))
    ridge = 1e-2
    preconditioner = randomly_pivoted_cholesky(matrix, 20).for_ridge(ridge)
    settled = slq_logdet(matrix, ridge=ridge, preconditioner=preconditioner, num_steps=150)
    for steps in (2, 5, 10, 20):
        found = slq_logdet(matrix, ridge=ridge, preconditioner=preconditioner, num_steps=steps)
        assert found.lower <= settled.value + 1e-6
        assert found.upper >= settled.value - 1e-6
        assert found.lower > -math.inf


def test_standard_errors_cover_as_often_as_they_say():
    matrix = matrix_with_spectrum(np.repeat([100.0, 1.0], 50))
    gaps, errors = [], []
    for seed in range(100):
        found = plain_logdet(matrix, seed=seed, num_steps=4)
        gaps.append(abs(found.value - reference(matrix, 0.0)))
        errors.append(found.standard_error)
    assert 56 <= np.sum(np.array(gaps) <= errors) <= 80
    assert 88 <= np.sum(np.array(gaps) <= 2 * np.array(errors)) <= 100


def test_a_preconditioner_takes_fewer_passes_and_leaves_smaller_errors():
    matrix = matrix_with_spectrum(power_law(300, condition=1e8))
    plain, better = plain_logdet(matrix), slq_logdet(matrix, rank=60)
    assert better.work.passes < 0.7 * plain.work.passes
    assert better.standard_error < 0.7 * plain.standard_error


def test_too_few_probes_are_called_so():
    found = plain_logdet(matrix_with_spectrum(power_law(300, condition=1e4)), num_probes=4, tol=1e-3)
    assert found.status == "not converged"
    assert "times the probes" in found.message


def test_enough_probes_converge():
    found = plain_logdet(matrix_with_spectrum(power_law(300, condition=1e4)), num_probes=64, tol=0.03)
    assert found.status == "converged"
    assert "converged" in str(found)


@pytest.mark.parametrize("name", ["singular", "indefinite"])
@pytest.mark.parametrize("rank", [0, 30])
def test_a_matrix_that_is_not_definite_has_no_log_determinant(name, rank):
    matrix = matrix_with_spectrum(spectra(300)[name])
    found = slq_logdet(matrix, rank=rank or None, preconditioner="rpcholesky" if rank else None)
    assert found.status == "indefinite at storage precision"
    assert "larger ridge" in found.message
    assert str(found)


def test_eigenvalues_below_what_storage_knows_are_no_result():
    values = np.append(np.geomspace(1.0, 1e-2, 99), 1e-9)
    matrix = matrix_with_spectrum(values).astype(np.float32)
    operator = DenseOperator(matrix_with_spectrum(values), storage_dtype=matrix.dtype)
    assert slq_logdet(operator, num_steps=100).status == "indefinite at storage precision"
    assert slq_logdet(operator, num_steps=100, ridge=1e-3).status != "indefinite at storage precision"


def test_a_ridge_makes_an_indefinite_matrix_a_definite_one():
    matrix = matrix_with_spectrum(spectra(300)["indefinite"])
    found = slq_logdet(matrix, ridge=0.01)
    assert abs(found.value - reference(matrix, 0.01)) <= 3 * found.standard_error + found.truncation_error


@pytest.mark.parametrize("size", [1, 2, 8])
def test_tiny_diagonal_matrices_are_exact(size):
    """Rademacher probes know diagonals."""
    found = plain_logdet(np.diag(np.arange(1.0, size + 1)))
    assert found.status == "converged"
    assert found.value == pytest.approx(math.lgamma(size + 1), abs=1e-9)
    assert found.work.passes == size + 1


def test_the_identity_needs_one_step():
    found = plain_logdet(3 * np.eye(50))
    assert found.num_steps == 1
    assert found.value == pytest.approx(50 * math.log(3))
    assert (found.status, found.lower) == ("converged", found.upper)


def test_equal_seeds_give_equal_bits():
    matrix = matrix_with_spectrum(power_law(100, condition=1e4))
    first, second, other = (slq_logdet(matrix, num_steps=9, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.samples, second.samples)
    assert (first.samples != other.samples).any()


def test_monitors_are_called_after_each_pass():
    seen = []
    slq_logdet(matrix_with_spectrum(power_law(100, condition=1e4)), num_steps=12, monitor=seen.append)
    assert len(seen) == 12


@pytest.mark.parametrize("size", [1, 2, 8])
def test_tiny_matrices_with_the_defaults(size):
    matrix = matrix_with_spectrum(np.arange(1.0, size + 1))
    found = slq_logdet(matrix)
    assert abs(found.value - math.lgamma(size + 1)) <= 3 * found.standard_error + found.truncation_error + 1e-9


def test_a_preconditioner_may_be_made_before_for_another_ridge():
    matrix = matrix_with_spectrum(power_law(300, condition=1e6))
    made = randomly_pivoted_cholesky(matrix, 50).for_ridge(1.0)
    found = slq_logdet(matrix, ridge=0.1, preconditioner=made)
    assert abs(found.value - reference(matrix, 0.1)) <= 3 * found.standard_error + found.truncation_error
    assert found.options["preconditioner"] == "rpcholesky"
    with pytest.raises(ConfigError, match="300 rows for a matrix of 4"):
        slq_logdet(np.eye(4), preconditioner=made)


@pytest.mark.parametrize("options", [{"num_probes": 1}, {"num_steps": 0}, {"ridge": -1.0}, {"max_passes": 0}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        slq_logdet(np.eye(4), **options)


def test_more_probes_than_a_factor_costs_are_not_the_only_advice():
    values = np.geomspace(1e-12, 1.0, 40)
    matrix = matrix_with_spectrum(values)
    found = plain_logdet(matrix, tol=1e-4)
    assert "method='cholesky'" in found.message
    assert logdet(matrix, method="cholesky").value == pytest.approx(np.log(values).sum(), rel=1e-3)
    few = plain_logdet(matrix_with_spectrum(power_law(300, condition=1e4)), tol=0.02, num_probes=8)
    factor = float(few.message.split("give ")[1].split(" times")[0])
    assert 1.0 < factor < 300 / 8
    assert "cholesky" not in few.message
    more = plain_logdet(matrix_with_spectrum(power_law(300, condition=1e4)), tol=0.02, num_probes=int(8 * factor) + 1)
    assert more.is_converged
