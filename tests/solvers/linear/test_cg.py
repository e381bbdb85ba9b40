"""Conjugate gradients: what they call converged is so, what cannot converge is said, and passes are counted."""

from functools import partial

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law, spectra

from ntkpipe.base.operator import Operator, Statistics, Work
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.linear.cg import RECURRENCES, Iteration, Recurrence
from ntkpipe.solvers.linear.preconditioner import randomly_pivoted_cholesky

N = 240


def pcg(operator, rhs, *, preconditioner=None, **options):
    return Iteration(operator, rhs, **options).run(partial(RECURRENCES["pcg"], operator, preconditioner))


def block_cg(operator, rhs, *, preconditioner=None, **options):
    return Iteration(operator, rhs, **options).run(partial(RECURRENCES["block_cg"], operator, preconditioner))


BOTH = pytest.mark.parametrize("method", [pcg, block_cg])


def residuals(matrix, rhs, solution, ridge=0.0):
    """By other means than the solver's: in extended precision where that matters."""
    wide = np.longdouble
    product = np.einsum("ij,jk->ik", matrix.astype(wide), solution.astype(wide)) + wide(ridge) * solution.astype(wide)
    return np.linalg.norm((rhs - product).astype(float), axis=0) / np.linalg.norm(rhs, axis=0)


class Drifting(Operator):
    """Products that are wrong by a little, differently each time: recursive residuals drift away from true ones."""

    def __init__(self, matrix, error):
        super().__init__(len(matrix), np.dtype(np.float32))
        self._matrix, self._error, self._rng, self._passes = matrix, error, np.random.default_rng(0), 0

    @property
    def work(self):
        return Work(float(self._passes))

    def identity(self):
        return "drifting"

    def _multiply(self, block):
        self._passes += 1
        product = self._matrix @ block
        return product + self._error * np.linalg.norm(block, axis=0) * self._rng.standard_normal(product.shape)

    def _measure(self):
        return Statistics(self._matrix.diagonal(), float(np.linalg.norm(self._matrix)))


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", spectra(N))
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 10.0])
def test_converged_means_a_true_residual_below_the_tolerance(method, dtype, name, ridge, rng):
    matrix = matrix_with_spectrum(spectra(N)[name]).astype(dtype)
    rhs = rng.standard_normal((N, 4))
    operator = DenseOperator(matrix)
    preconditioner = randomly_pivoted_cholesky(operator, 60).for_ridge(ridge)
    found = method(operator.shifted(ridge), rhs, preconditioner=preconditioner, max_passes=300)
    own = residuals(matrix, rhs, found.solution, ridge)
    rounding = 1e-15 * spectra(N)[name][0] * np.linalg.norm(found.solution, axis=0) / np.linalg.norm(rhs, axis=0)
    assert (np.abs(found.residuals - own) <= 1e-3 * own + rounding).all()
    assert (found.status == "converged") == bool((found.residuals <= 1e-6).all())
    if found.status == "converged":
        assert own.max() <= 1e-6 * (1 + 1e-3)
    smallest = np.linalg.eigvalsh(matrix.astype(np.float64))[0] + ridge
    if smallest > 1e-3:
        assert found.status == "converged"
    if found.status == "indefinite at storage precision":
        assert smallest < 1e-9 * spectra(N)[name][0]


@BOTH
def test_solutions_are_those_of_lapack(method, rng):
    matrix = matrix_with_spectrum(power_law(N, condition=1e4))
    rhs = rng.standard_normal((N, 3))
    operator = DenseOperator(matrix)
    found = method(operator, rhs, preconditioner=randomly_pivoted_cholesky(operator, 24), tol=1e-12)
    assert found.status == "converged"
    np.testing.assert_allclose(found.solution, np.linalg.solve(matrix, rhs), rtol=1e-6, atol=1e-10)


@BOTH
def test_without_a_preconditioner_as_many_steps_as_distinct_eigenvalues(method, rng):
    matrix = matrix_with_spectrum(spectra(N)["clustered"])
    found = method(DenseOperator(matrix), rng.standard_normal((N, 2)), tol=1e-8)
    assert (found.status, found.iterations) == ("converged", 4)


def test_the_block_needs_fewer_passes(rng):
    operator = DenseOperator(matrix_with_spectrum(power_law(N, condition=1e6)))
    rhs = rng.standard_normal((N, 16))
    assert block_cg(operator, rhs).iterations * 3 < pcg(operator, rhs, max_passes=2000).iterations


@BOTH
def test_each_step_is_a_pass_and_each_check_another(method, rng):
    operator = DenseOperator(matrix_with_spectrum(power_law(N, condition=1e4)))
    preconditioner, steps = randomly_pivoted_cholesky(operator, 10), []
    before = operator.work.passes
    found = method(operator, rng.standard_normal((N, 3)), preconditioner=preconditioner, tol=1e-9, monitor=steps.append)
    assert found.status == "converged"
    assert operator.work.passes - before == found.iterations + len(found.checks) == len(steps)
    assert list(found.checks[:-1]) == list(range(25, found.iterations, 25))
    assert found.checks[-1] == found.iterations
    assert steps[-1].residual == found.residuals.max()


@BOTH
def test_a_singular_matrix_is_solved_where_that_is_possible(method, rng):
    spectrum = np.concatenate([power_law(180, condition=1e3), np.zeros(60)])
    matrix = matrix_with_spectrum(spectrum)
    operator = DenseOperator(matrix)
    inside = matrix @ rng.standard_normal((N, 3))
    preconditioner = randomly_pivoted_cholesky(operator, 40)
    assert method(operator, inside, preconditioner=preconditioner).status == "converged"
    outside = rng.standard_normal((N, 3))
    found = method(operator, outside, preconditioner=preconditioner, max_passes=2000)
    assert found.status in {"stagnated", "indefinite at storage precision"}
    np.testing.assert_allclose(found.residuals, residuals(matrix, outside, found.solution), rtol=1e-3)
    assert found.residuals.max() <= 1.0 + 1e-12


@BOTH
def test_negative_curvature_is_told_with_the_floor(method, rng):
    matrix = matrix_with_spectrum(power_law(N, condition=1e10)).astype(np.float32)
    assert np.linalg.eigvalsh(matrix.astype(np.float64))[0] < 0.0
    operator = DenseOperator(matrix)
    # Mostly what large eigenvalues have, as targets are.
    rhs = matrix @ rng.standard_normal((N, 3)) + rng.standard_normal((N, 3))
    found = method(operator, rhs, preconditioner=randomly_pivoted_cholesky(operator, 24))
    assert found.status == "indefinite at storage precision"
    assert f"{operator.storage_floor():.2g}" in found.message
    own = residuals(matrix, rhs, found.solution)
    np.testing.assert_allclose(found.residuals, own, rtol=1e-3)
    assert own.max() < 0.5
    ridge = 10 * operator.storage_floor()
    shifted = method(operator.shifted(ridge), rhs, tol=1e-3, max_passes=2000)
    assert shifted.status == "converged"


@BOTH
def test_drifting_residuals_are_replaced(method, rng):
    matrix = matrix_with_spectrum(power_law(N, condition=1e4))
    rhs = rng.standard_normal((N, 2))
    found = method(Drifting(matrix, 1e-6), rhs, tol=1e-6, max_passes=2000)
    assert found.replacements > 0
    assert found.status in {"converged", "stagnated"}
    own = residuals(matrix, rhs, found.solution).max()
    assert own < 1e-4
    # Computed with a product that is wrong by that much itself.
    assert found.residuals.max() == pytest.approx(own, abs=1e-4)


@BOTH
def test_what_float64_cannot_reach_has_stagnated(method, rng):
    matrix = matrix_with_spectrum(power_law(N, condition=1e6))
    rhs = rng.standard_normal((N, 2))
    found = method(DenseOperator(matrix), rhs, tol=1e-16, max_passes=3000)
    assert found.status == "stagnated"
    assert residuals(matrix, rhs, found.solution).max() < 1e-8


@BOTH
def test_too_few_passes_are_told(method, rng):
    operator = DenseOperator(matrix_with_spectrum(power_law(N, condition=1e6)))
    rhs = rng.standard_normal((N, 2))
    found = method(operator, rhs, max_passes=12)
    assert (found.status, found.iterations, list(found.checks)) == ("step limit", 11, [11])
    assert operator.work.passes == 12
    assert found.residuals == pytest.approx(residuals(operator.columns(np.arange(N)), rhs, found.solution))
    # The residual of zero is one; iterates may be nearer in the norm of the matrix and have a larger one.
    assert (found.residuals == np.minimum(found.check_residuals[-1], 1.0)).all()
    assert found.residuals.max() < 1.0


@BOTH
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_columns_of_all_kinds(method, scale, rng):
    """Zeros, equal columns, sizes far apart, and more columns than rows."""
    matrix = matrix_with_spectrum(power_law(12, condition=1e3))
    rhs = rng.standard_normal((12, 20))
    rhs[:, 3], rhs[:, 4], rhs[:, 5] = 0.0, rhs[:, 0], 1e-12 * rhs[:, 1]
    found = method(DenseOperator(matrix), scale * rhs, tol=1e-9)
    assert found.status == "converged"
    assert not found.solution[:, 3].any()
    np.testing.assert_allclose(found.solution / scale, np.linalg.solve(matrix, rhs), rtol=1e-5, atol=1e-20)


@BOTH
def test_nothing_is_done_where_nothing_is_to_do(method, rng):
    matrix = matrix_with_spectrum(power_law(50, condition=1e3))
    operator = DenseOperator(matrix)
    zero = method(operator, np.zeros((50, 2)))
    assert (zero.status, zero.iterations, operator.work.passes) == ("converged", 0, 0.0)
    rhs = rng.standard_normal((50, 2))
    again = method(operator, rhs, initial=np.linalg.solve(matrix, rhs))
    assert (again.status, again.iterations, operator.work.passes) == ("converged", 0, 1.0)


@BOTH
def test_a_good_start_saves_passes_and_a_bad_one_costs_one(method, rng):
    operator = DenseOperator(matrix_with_spectrum(power_law(N, condition=1e4)))
    rhs = rng.standard_normal((N, 2))
    cold = method(operator, rhs)
    near = cold.solution * (1 + 1e-4 * rng.standard_normal((N, 2)))
    assert method(operator, rhs, initial=near).iterations < cold.iterations
    bad = method(operator, rhs, initial=1e9 * rng.standard_normal((N, 2)))
    assert bad.iterations == cold.iterations
    np.testing.assert_array_equal(bad.solution, cold.solution)


def test_columns_that_are_done_leave(rng):
    """The product of the last pass has fewer columns."""
    spectrum = power_law(N, condition=1e4)
    matrix = matrix_with_spectrum(spectrum)
    vectors = np.linalg.eigh(matrix)[1]
    rhs = np.column_stack([vectors[:, 0] + vectors[:, -1], rng.standard_normal(N)])
    widths = []

    class Watched(DenseOperator):
        def _multiply(self, block):
            widths.append(block.shape[1])
            return super()._multiply(block)

    found = pcg(Watched(matrix), rhs)
    assert found.status == "converged"
    assert widths.count(1) > widths.count(2)


@BOTH
def test_bits_repeat(method, rng):
    operator = DenseOperator(matrix_with_spectrum(power_law(N, condition=1e4)))
    rhs = rng.standard_normal((N, 3))
    np.testing.assert_array_equal(method(operator, rhs).solution, method(operator, rhs).solution)


def test_a_block_is_as_wide_as_its_rank(rng):
    widths = []

    class Watched(DenseOperator):
        def _multiply(self, block):
            widths.append(block.shape[1])
            return super()._multiply(block)

    rhs = np.repeat(rng.standard_normal((N, 2)), 3, axis=1)
    found = block_cg(Watched(matrix_with_spectrum(power_law(N, condition=1e3))), rhs)
    assert found.status == "converged"
    assert sorted(set(widths)) == [2, 6]  # directions, and checks of all columns


def test_a_block_whose_space_is_used_up_goes_on_without_curvature(rng):
    """Three residuals in a space of five dimensions: after one step only two are left, the third is rounding."""
    matrix = matrix_with_spectrum(np.concatenate([[5.0, 4.0, 3.0, 2.0, 1.0], np.zeros(N - 5)]))
    rhs = matrix @ rng.standard_normal((N, 3))
    found = block_cg(DenseOperator(matrix), rhs, tol=1e-12)
    assert (found.status, found.replacements) == ("converged", 0)
    assert residuals(matrix, rhs, found.solution).max() <= 1.1e-12
    # Nothing of the null space has come in.
    np.testing.assert_allclose(found.solution, np.linalg.pinv(matrix, rcond=1e-10) @ rhs, atol=1e-10)


class Boasting(Recurrence):
    """Halves the residual at each step, and says that it is a little less."""

    def __init__(self, solution, residual, factor):
        super().__init__(None, None, solution, residual)
        self._rhs, self._factor = residual + solution, factor

    def restart(self, columns):
        self._true = self.residual.copy()

    def step(self, columns):
        assert columns.any()
        self._true /= 2
        self.solution[:] = self._rhs - self._true
        self.residual[:] = self._factor * self._true
        return np.zeros_like(columns)


def test_who_claims_a_little_too_much_goes_on(rng):
    operator, rhs = DenseOperator(np.eye(20)), rng.standard_normal((20, 2))
    found = Iteration(operator, rhs, tol=1.001 * 2.0**-10).run(lambda x, r: Boasting(x, r, 0.2))
    # It claims success after eight steps, is told that it must halve what it claims, and has it after ten.
    assert (found.status, found.iterations, list(found.checks)) == ("converged", 10, [8, 9, 10])
    assert found.replacements == 0
