"""What is done with a factor: against LAPACK over spectra, from memory and from files."""

import json
from itertools import pairwise

import numpy as np
import pytest
from matrices import matrix_with_spectrum, spectra
from scipy.linalg import solve_triangular
from stored import store_matrix

from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.base.resources import process_memory
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.operators.opening import as_operator
from ntkpipe.solvers.direct.cholesky import cholesky

N = 310
RIDGES = {"singular": 1.0, "indefinite": 0.5}
NAMES = list(spectra(N))


@pytest.fixture(scope="module")
def matrices():
    return {name: matrix_with_spectrum(values) for name, values in spectra(N).items()}


@pytest.fixture(params=["memory", "files"])
def factor_of(request, tmp_path):
    def make(matrix, **options):
        path = tmp_path / "factor" if request.param == "files" else None
        return cholesky(matrix, path=path, panel_width=options.pop("panel_width", 48), **options)

    return make


@pytest.fixture
def rhs():
    return np.random.default_rng(1).standard_normal((N, 5))


@pytest.mark.parametrize("name", NAMES)
def test_solutions_have_the_residuals_that_are_said_and_are_as_good_as_lapacks(matrices, factor_of, rhs, name):
    ridge = RIDGES.get(name, 0.0)
    shifted = matrices[name] + ridge * np.eye(N)
    found = factor_of(matrices[name], ridge=ridge).solve(rhs)
    true = np.linalg.norm(rhs - shifted @ found.coefficients, axis=0) / np.linalg.norm(rhs, axis=0)
    np.testing.assert_allclose(found.residuals, true, rtol=0.5, atol=1e-15)
    lapack = np.linalg.norm(rhs - shifted @ np.linalg.solve(shifted, rhs), axis=0) / np.linalg.norm(rhs, axis=0)
    assert found.residuals.max() < 3 * lapack.max() + 1e-14
    assert found.is_converged
    exact = np.linalg.solve(shifted, rhs)
    condition = np.linalg.cond(shifted)
    assert np.linalg.norm(found.coefficients - exact) < 20 * condition * 2.2e-16 * np.linalg.norm(exact)


def test_refinement_makes_residuals_smaller_never_larger(matrices, factor_of, rhs):
    factor = factor_of(matrices["power_law_1e8"])
    plain, once, twice = (factor.solve(rhs, refine=steps) for steps in (0, 1, 2))
    assert (once.residuals <= plain.residuals).all()
    assert (twice.residuals <= once.residuals).all()
    assert once.residuals.sum() < plain.residuals.sum()
    assert plain.refinements == 0


def test_a_step_of_refinement_that_only_stirs_rounding_is_not_taken(matrices, factor_of):
    """At the level of rounding residuals go up and down: each column keeps its best."""
    operator, many = DenseOperator(matrices["power_law_1e6"]), np.random.default_rng(3).standard_normal((N, 60))
    factor = factor_of(operator)
    found = [factor.solve(many, refine=steps) for steps in range(4)]
    for earlier, later in pairwise(found):
        assert (later.residuals <= earlier.residuals).all()
    sizes = np.linalg.norm(many, axis=0)
    for one in found:
        true = np.linalg.norm(many - operator.matmat(one.coefficients), axis=0) / sizes
        np.testing.assert_allclose(one.residuals, true, rtol=1e-10)


def test_a_solution_reads_the_factor_twice_and_twice_again_for_refinement(matrices, factor_of, rhs):
    operator = DenseOperator(matrices["power_law_1e4"])
    factor = factor_of(operator)
    assert factor.solve(rhs, refine=0).factor_passes == pytest.approx(2)
    found = factor.solve(rhs)
    assert found.factor_passes == pytest.approx(4)
    assert found.work.passes == 2
    assert (found.factor_bytes_read > 0) == (factor.path is not None)


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 7), (N, 0)])
def test_solutions_have_the_shape_of_the_right_hand_sides(matrices, factor_of, shape):
    found = factor_of(matrices["clustered"]).solve(np.ones(shape, np.float32))
    assert found.coefficients.shape == shape
    assert found.coefficients.dtype == np.float64
    assert str(found).startswith("status")
    json.dumps(found.to_json())


def test_a_column_of_zeros_has_the_solution_zero(matrices, factor_of, rhs):
    rhs[:, 2] = 0.0
    found = factor_of(matrices["power_law_1e6"]).solve(rhs)
    assert not found.coefficients[:, 2].any()
    assert found.residuals[2] == 0.0


def test_right_hand_sides_are_left_as_they_are(matrices, factor_of, rhs):
    before = rhs.copy()
    factor = factor_of(matrices["power_law_1e6"])
    factor.solve(rhs)
    factor.half_solve(rhs)
    assert (rhs == before).all()


def test_a_residual_above_the_tolerance_is_not_called_converged(matrices, factor_of, rhs):
    found = factor_of(matrices["power_law_1e10"]).solve(rhs, tol=1e-14)
    assert found.status == "stagnated"
    assert "ill-conditioned" in found.message


@pytest.mark.parametrize("width", [16, 48, 310])
@pytest.mark.parametrize("at_once", [None, 7, 100, 1000])
def test_the_diagonal_of_the_inverse(matrices, factor_of, width, at_once):
    matrix = matrices["power_law_1e6"]
    found = factor_of(matrix, panel_width=width).inverse_diagonal(columns_at_once=at_once)
    np.testing.assert_allclose(found, np.diagonal(np.linalg.inv(matrix)), rtol=1e-8)


def test_some_of_the_diagonal_of_the_inverse_in_any_order(matrices, factor_of):
    matrix, rows = matrices["power_law_1e4"], [309, 3, 48, 47, 3, 200]
    factor = factor_of(matrix)
    inverse = np.diagonal(np.linalg.inv(matrix))
    np.testing.assert_allclose(factor.inverse_diagonal(rows, columns_at_once=2), inverse[rows], rtol=1e-10)
    assert factor.inverse_diagonal([]).shape == (0,)
    before = factor._panels.traffic
    factor.inverse_diagonal([300])
    assert (factor._panels.traffic - before).passes < 0.05


def test_leave_one_out_residuals_are_those_of_fits_without_the_row(matrices, factor_of):
    matrix, y, ridge = matrices["power_law_1e4"], np.random.default_rng(2).standard_normal(N), 0.5
    factor = factor_of(matrix, ridge=ridge)
    found = factor.solve(y).coefficients / factor.inverse_diagonal()
    for i in (0, 100, 309):
        rest = np.delete(np.arange(N), i)
        fitted = np.linalg.solve(matrix[np.ix_(rest, rest)] + ridge * np.eye(N - 1), y[rest])
        assert found[i] == pytest.approx(y[i] - matrix[i, rest] @ fitted, rel=1e-8)


def test_half_solves_are_with_the_triangular_factor(matrices, factor_of, rhs):
    matrix = matrices["power_law_1e4"]
    factor, lower = factor_of(matrix), np.linalg.cholesky(matrix)
    np.testing.assert_allclose(factor.half_solve(rhs), solve_triangular(lower, rhs, lower=True), rtol=1e-8, atol=1e-9)
    backward = solve_triangular(lower, rhs, lower=True, trans=1)
    np.testing.assert_allclose(factor.half_solve(rhs, transposed=True), backward, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("bad", [np.ones(N - 1), np.ones((N, 2, 2)), np.ones(N, complex), np.array(["a"] * N)])
def test_wrong_right_hand_sides_are_refused(matrices, factor_of, bad):
    factor = factor_of(matrices["clustered"])
    for use in (factor.solve, factor.half_solve):
        with pytest.raises(ConfigError, match="right-hand sides"):
            use(bad)


def test_wrong_options_are_refused(matrices, factor_of):
    factor = factor_of(matrices["clustered"])
    for rows in ([-1], [N]):
        with pytest.raises(ConfigError, match="rows"):
            factor.inverse_diagonal(rows)
    with pytest.raises(ConfigError, match="columns_at_once"):
        factor.inverse_diagonal(columns_at_once=0)
    with pytest.raises(ConfigError, match="refine"):
        factor.solve(np.ones(N), refine=-1)
    with pytest.raises(NonFiniteError):
        factor.solve(np.full(N, np.nan))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_stored_kernel_is_read_in_tiles(matrices, factor_of, tmp_path, rhs, dtype):
    matrix = matrices["power_law_1e4"].astype(dtype)
    kernel = store_matrix(matrix, tmp_path / "k.zarr", tile=37)
    factor = factor_of(kernel)
    exact = matrix.astype(np.float64)
    assert factor.logdet == pytest.approx(np.linalg.slogdet(exact)[1], rel=1e-12)
    np.testing.assert_allclose(factor.solve(rhs).coefficients, np.linalg.solve(exact, rhs), rtol=1e-8, atol=1e-9)
    assert factor.work.bytes_read > 0


def test_a_stored_kernel_under_a_memory_limit(matrices, tmp_path):
    matrix = matrices["power_law_1e4"]
    kernel = store_matrix(matrix, tmp_path / "k.zarr", tile=37)
    factor = cholesky(kernel, path=tmp_path / "f", memory_limit=process_memory() + 3 * 2**19)
    assert factor.num_panels > 1
    assert factor.logdet == pytest.approx(np.linalg.slogdet(matrix)[1], rel=1e-12)


@pytest.mark.parametrize(
    "view",
    [
        lambda op: op.shifted(0.5),
        lambda op: op.scaled(3.0),
        lambda op: op.leading(200),
        lambda op: op.centred().shifted(1.0),
        lambda op: op.leading(60).kronecker(3),
        lambda op: op.leading(61).centred().kronecker(4).shifted(0.25),
    ],
)
def test_views_of_operators_are_factored_as_the_matrices_that_they_are(matrices, view):
    operator = view(as_operator(matrices["power_law_1e4"]))
    dense = operator.matmat(np.eye(operator.num_rows))
    dense = (dense + dense.T) / 2
    for rows, columns in ((slice(0, 60), slice(0, 60)), (slice(37, 61), slice(5, 42)), (slice(1, 2), slice(3, 59))):
        np.testing.assert_allclose(operator.block(rows, columns), dense[rows, columns], rtol=1e-9, atol=1e-9)
    factor = cholesky(operator, panel_width=35)
    assert factor.logdet == pytest.approx(np.linalg.slogdet(dense)[1], rel=1e-10)
