"""Regression systems: one call, true residuals, preconditioner's cost apart, paths of ridges, clear refusals."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from costs import costs
from matrices import matrix_with_spectrum, power_law

from ntkpipe.base.errors import ArgumentError, ConfigError, IndefiniteError, NonFiniteError, ResourceError
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.direct.cholesky import bytes_of_cholesky, cholesky
from ntkpipe.solvers.direct.eigh import bytes_of_drivers, eigh, eigvalsh
from ntkpipe.solvers.inverse import systems
from ntkpipe.solvers.inverse.solve import solve, solve_path
from ntkpipe.solvers.linear.preconditioner import randomly_pivoted_cholesky
from ntkpipe.solvers.memory import bytes_of_density, bytes_of_eigsh, bytes_of_solve
from ntkpipe.solvers.spectral.density import density
from ntkpipe.solvers.spectral.lanczos import eigsh
from ntkpipe.solvers.spectral.logdet import logdet, slq_logdet
from ntkpipe.solvers.spectral.smallest import bytes_of_smallest

N = 300
METHODS = ("auto", "pcg", "block_cg", "cholesky")


@pytest.fixture
def matrix():
    return matrix_with_spectrum(power_law(N, condition=1e5)).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 7)])
def test_three_lines_are_enough(matrix, method, shape, rng):
    rhs = rng.standard_normal(shape)
    found = solve(matrix, rhs, ridge=0.5, method=method)
    wide = matrix.astype(np.float64) + 0.5 * np.eye(N)
    assert found.is_converged
    assert found.coefficients.shape == shape
    assert np.linalg.norm(wide @ found.coefficients - rhs) <= 1e-6 * np.linalg.norm(rhs)
    np.testing.assert_allclose(found.coefficients, np.linalg.solve(wide, rhs), atol=1e-4)


@pytest.mark.parametrize("preconditioner", ["rpcholesky", "nystrom"])
def test_cost_and_preconditioner_are_told_apart(matrix, preconditioner, rng):
    operator = DenseOperator(matrix)
    found = solve(operator, rng.standard_normal((N, 3)), rank=40, preconditioner=preconditioner, method="pcg")
    assert found.rank == 40
    assert found.work == operator.work
    cg_passes = found.iterations + len(found.checks)
    assert found.work.passes == pytest.approx(found.preconditioner_work.passes + cg_passes)
    assert found.history.shape == (found.iterations, 3)
    assert found.check_residuals.shape == (len(found.checks), 3)
    assert found.residuals.max() == found.check_residuals[-1].max()
    said = str(found)
    for words in ("converged", "rank 40", "iterations", "passes"):
        assert words in said


def test_a_result_is_data(matrix, rng):
    found = solve(matrix, rng.standard_normal((N, 2)), method="block_cg")
    data = json.loads(json.dumps(found.to_json()))
    assert data["preconditioner_work"]["passes"] == found.preconditioner_work.passes
    assert data["options"]["rank"] == 30
    assert not found.coefficients.flags.writeable


def test_a_preconditioner_that_was_made_before_costs_nothing(matrix, rng):
    operator = DenseOperator(matrix)
    made = randomly_pivoted_cholesky(operator, 50)
    rhs = rng.standard_normal((N, 2))
    given = solve(operator, rhs, ridge=0.1, preconditioner=made, method="block_cg")
    assert given.preconditioner_work.passes == 0.0
    assert (given.rank, given.mu) == (50, made.tail + 0.1)
    np.testing.assert_array_equal(
        given.coefficients, solve(operator, rhs, ridge=0.1, rank=50, method="block_cg").coefficients
    )
    with pytest.raises(ConfigError, match="300 rows for a matrix of 5 rows"):
        solve(np.eye(5), np.ones(5), preconditioner=made)


@pytest.mark.parametrize("method", METHODS)
def test_a_path_is_its_single_solutions(matrix, method, rng):
    rhs, ridges = rng.standard_normal((N, 3)), [0.0, 10.0, 0.1]
    path = solve_path(matrix, rhs, ridges, method=method, tol=1e-9)
    assert [found.ridge for found in path] == ridges
    for found, ridge in zip(path, ridges, strict=True):
        alone = solve(matrix, rhs, ridge=ridge, method=method, tol=1e-9)
        assert found.is_converged
        assert found.mu == alone.mu
        np.testing.assert_allclose(found.coefficients, alone.coefficients, atol=1e-5)
    is_iterated = method in {"pcg", "block_cg"}
    assert [found.preconditioner_work.passes > 0 for found in path] == [False, is_iterated, False]
    assert [found.iterations > 0 for found in path] == [is_iterated] * 3


def test_a_path_makes_its_preconditioner_once_and_starts_where_it_was(matrix, rng):
    operator, rhs = DenseOperator(matrix), rng.standard_normal((N, 3))
    path = solve_path(operator, rhs, [1.0, 0.99], method="block_cg")
    assert sum(found.work.passes for found in path) == pytest.approx(operator.work.passes)
    assert path[1].iterations < path[0].iterations


@pytest.mark.parametrize("num_rows", [1, 2, 8])
def test_small_arrays(num_rows, rng):
    matrix = matrix_with_spectrum(np.arange(1.0, num_rows + 1))
    rhs = rng.standard_normal((num_rows, 2 * num_rows))
    for method in METHODS:
        found = solve(matrix, rhs, method=method, tol=1e-10)
        assert found.is_converged
        np.testing.assert_allclose(found.coefficients, np.linalg.solve(matrix, rhs), atol=1e-8)


def test_samples_that_occur_twice_need_a_ridge_and_get_an_honest_status_without(rng):
    kernel = np.kron(matrix_with_spectrum(power_law(100, condition=1e3)), np.ones((3, 3)))
    rhs = rng.standard_normal((300, 2))
    assert solve(kernel, rhs, ridge=1e-2).is_converged
    without = solve(kernel, rhs, max_passes=500, method="block_cg")
    assert without.status in {"stagnated", "indefinite at storage precision"}
    least = np.linalg.norm(rhs - kernel @ np.linalg.lstsq(kernel, rhs, rcond=1e-10)[0], axis=0)
    assert (without.residuals >= 0.999 * least / np.linalg.norm(rhs, axis=0)).all()


def test_an_initial_guess_is_used(matrix, rng):
    rhs = rng.standard_normal((N, 2))
    first = solve(matrix, rhs)
    again = solve(matrix, rhs, initial=first.coefficients, method="block_cg")
    assert (again.iterations, again.status) == (0, "converged")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rhs": np.ones(3)}, r"shape \(3,\).*needed \(300,\)"),
        ({"rhs": np.ones((N, 0))}, r"shape \(300, 0\)"),
        ({"rhs": np.ones((N, 1, 1))}, "shape"),
        ({"rhs": np.ones(N, complex)}, "complex128"),
        ({"ridge": -1.0}, "ridge=-1"),
        ({"ridge": float("inf")}, "ridge=inf"),
        ({"tol": float("nan")}, "tol=nan"),
        ({"rank": 0}, "rank=0"),
        ({"max_passes": 1}, "max_passes=1"),
        ({"method": "lu"}, "method='lu'"),
        ({"preconditioner": "jacobi"}, "preconditioner='jacobi'"),
        ({"initial": np.ones((N, 2))}, "initial of 2 columns"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(matrix, options, words):
    operator = DenseOperator(matrix)
    with pytest.raises(ConfigError, match=words):
        solve(operator, **{"rhs": np.ones(N), **options})
    assert operator.work.passes == 0.0


def test_nan_is_an_error(matrix):
    rhs = np.ones(N)
    rhs[7] = np.nan
    with pytest.raises(NonFiniteError, match="targets hold NaN"):
        solve(matrix, rhs)


def test_memory_is_refused_with_both_numbers(matrix):
    with pytest.raises(ResourceError, match=r"takes .* may be used"):
        solve(DenseOperator(matrix), np.ones(N), memory_limit=1000, method="pcg")


@pytest.mark.parametrize("method", ["auto", "cholesky"])
def test_a_factor_goes_to_files_where_a_path_is_given(matrix, rng, tmp_path, method, monkeypatch):
    costs(monkeypatch, iterating=2.0, factoring=1.0)
    rhs = rng.standard_normal((N, 3))
    options = {"ridge": 0.1, "method": method, "path": tmp_path / "factor", "tol": 1e-10}
    found = solve(matrix, rhs, **options)
    assert (found.method, found.status) == ("cholesky", "converged")
    shifted = matrix + 0.1 * np.eye(N)
    exact = np.linalg.solve(shifted, rhs)
    error = np.linalg.norm(found.coefficients - exact, axis=0) / np.linalg.norm(exact, axis=0)
    assert error.max() <= 1e-10 * np.linalg.cond(shifted)
    assert cholesky(matrix, ridge=0.1, path=tmp_path / "factor").resumed > 0
    again = solve(matrix, rhs, **options)
    np.testing.assert_array_equal(again.coefficients, found.coefficients)


def test_no_ridge_is_no_path(matrix):
    with pytest.raises(ConfigError, match="no ridge"):
        solve_path(matrix, np.ones(N), [])


def test_few_rows_are_factored(matrix, rng):
    found = solve(matrix, rng.standard_normal((N, 3)))
    assert found.method == "cholesky"
    assert "operations by Cholesky" in found.why


def test_auto_takes_the_minimum_norm_where_no_factor_is_possible(rng):
    """By rounding to float32 it is indefinite: Cholesky refuses, and what is below the cut-off counts as zero."""
    matrix = matrix_with_spectrum(power_law(N, condition=1e10)).astype(np.float32)
    rhs = matrix @ rng.standard_normal(N)
    found = solve(matrix, rhs)
    assert (found.method, found.why) == ("eigh", "Cholesky met a pivot that is not positive")
    assert found.residuals[0] == pytest.approx(np.linalg.norm(rhs - matrix @ found.coefficients) / np.linalg.norm(rhs))
    with pytest.raises(IndefiniteError, match="ridge of at least"):
        solve(matrix, rhs, method="cholesky")


@pytest.mark.parametrize("is_definite", [True, False])
def test_what_turns_out_slow_is_given_up(matrix, is_definite, rng, monkeypatch):
    """Iterating was expected to cost nothing, and factoring to cost nothing as well."""
    costs(monkeypatch, iterating=-1.0, factoring=0.0)
    if not is_definite:
        matrix = matrix_with_spectrum(power_law(N, condition=1e10)).astype(np.float32)
    rhs = rng.standard_normal((N, 3))
    found = solve(matrix, rhs, rank=2, tol=1e-9, ridge=1e-12)
    if is_definite:
        assert (found.method, found.status, found.iterations) == ("cholesky", "converged", 10)
        assert "given up after 10 iterations" in found.why
        assert found.preconditioner_work.passes > 0
    else:
        assert (found.method, found.why) == ("block_cg", "Cholesky met a pivot that is not positive")
        assert not found.is_converged
        assert found.checks[0] == 10 < found.iterations == len(found.history)
    own = np.linalg.norm(rhs - matrix.astype(float) @ found.coefficients, axis=0) / np.linalg.norm(rhs, axis=0)
    np.testing.assert_allclose(found.residuals, own, rtol=1e-3, atol=1e-10)


def test_auto_iterates_where_a_factor_is_no_help(rng, monkeypatch):
    """Of a singular matrix whose pivots happen to be positive."""
    matrix = np.kron(matrix_with_spectrum(power_law(100, condition=1e3)), np.ones((3, 3)))
    inside = matrix @ rng.standard_normal((300, 2))

    factor = cholesky(matrix, ridge=0.5)
    monkeypatch.setattr(systems, "factor_for_solves", lambda *_, **__: _Wrong(factor, matrix))
    found = solve(matrix, inside, ridge=1e-12)
    assert (found.status, found.method) == ("converged", "block_cg")
    assert "Cholesky left a residual of" in found.why
    assert np.linalg.norm(matrix @ found.coefficients - inside) <= 1e-6 * np.linalg.norm(inside)


class _Wrong:
    """A factor of another matrix."""

    def __init__(self, factor, matrix):
        self._factor, self._matrix = factor, matrix

    def solve(self, rhs, *, refine, tol):
        found = self._factor.solve(rhs, refine=0, tol=1.0)
        left = np.linalg.norm(rhs - self._matrix @ found.coefficients, axis=0) / np.linalg.norm(rhs, axis=0)
        return replace(found, status="stagnated", residuals=left)


CODES = np.arange(N) * 7 % 3
LABELS = {
    "from 0": CODES,
    "from 1": CODES + 1,
    "small": (CODES - 1).astype(np.int8),
    "booleans": CODES > 0,
    "strings": np.array(["ape", "bee", "cat"])[CODES],
    "objects": np.array(["ape", "bee", "cat"], object)[CODES],
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_classes_and_no_numbers(matrix, name):
    columns = np.unique(LABELS[name], return_inverse=True)[1][:, None] == np.arange(len(np.unique(LABELS[name])))
    found, expected = solve(matrix, LABELS[name], ridge=0.1), solve(matrix, columns.astype(float), ridge=0.1)
    np.testing.assert_array_equal(found.coefficients, expected.coefficients)
    assert found.targets == f"{columns.shape[1]} classes, one-hot"
    assert "classes, one-hot" in str(found)
    (path,) = solve_path(matrix, LABELS[name], [0.1])
    np.testing.assert_array_equal(path.coefficients, expected.coefficients)
    assert path.targets == found.targets


def test_what_targets_are_can_be_said(matrix):
    signs = np.where(CODES > 0, 1, -1)
    both = solve(matrix, signs, ridge=0.1, task="binary"), solve(matrix, signs, ridge=0.1, task="regression")
    assert [one.coefficients.shape for one in both] == [(N, 1), (N,)]
    np.testing.assert_array_equal(both[0].coefficients[:, 0], both[1].coefficients)
    assert [one.targets for one in both] == ["2 classes, as ±1", "1 real target"]
    assert solve(matrix, CODES.astype(float), ridge=0.1, task="classification").coefficients.shape == (N, 3)
    with pytest.raises(ConfigError, match="all of them different"):
        solve(matrix, np.arange(N), ridge=0.1)


def test_targets_of_samples_with_a_row_for_each_output(matrix, rng):
    outputs = rng.standard_normal((N // 3, 3))
    found = solve(matrix, outputs, ridge=0.1)
    expected = solve(matrix, outputs.reshape(-1), ridge=0.1)
    np.testing.assert_array_equal(found.coefficients, expected.coefficients)
    labels = solve(matrix, CODES[: N // 3], ridge=0.1)
    one_hot = solve(matrix, np.eye(3)[CODES[: N // 3]], ridge=0.1)
    np.testing.assert_array_equal(labels.coefficients, one_hot.coefficients)
    assert (found.coefficients.shape, labels.coefficients.shape, labels.targets) == ((N,), (N,), "3 classes, one-hot")


def test_a_ridge_may_be_in_units_of_the_mean_diagonal(matrix):
    unit = {"ridge": 0.1, "ridge_scale": "mean_diagonal"}
    absolute = {"ridge": 0.1 * float(matrix.diagonal().astype(np.float64).mean())}
    rhs = np.ones(N)
    for solver in (lambda **ridge: solve(matrix, rhs, **ridge), lambda **ridge: cholesky(matrix, **ridge)):
        assert solver(**unit).ridge == solver(**absolute).ridge == absolute["ridge"]
    for solver in (logdet, slq_logdet, partial(logdet, method="slq")):
        assert (solver(matrix, **unit).value, solver(matrix, **unit).ridge) == (
            solver(matrix, **absolute).value,
            absolute["ridge"],
        )
    found = solve_path(matrix, rhs, [0.1], ridge_scale="mean_diagonal")
    assert found[0].ridge == found.ridges[0] == absolute["ridge"]
    assert found.options["ridge_scale"] == "mean_diagonal"
    with pytest.raises(ConfigError, match="ridge_scale='trace'"):
        solve(matrix, rhs, ridge=1.0, ridge_scale="trace")


def test_what_is_asked_for_wrongly_is_told_by_name(matrix):
    with pytest.raises(ConfigError, match=r"solve\(\): ridge='1'; needed a number"):
        solve(matrix, np.ones(N), ridge="1")
    with pytest.raises(ArgumentError, match="has no argument 'regularisation'"):
        solve(matrix, np.ones(N), regularisation=1.0)


def test_solvers_take_what_they_say_they_take(matrix, monkeypatch):
    """With a byte less they refuse, or take fewer steps."""
    monkeypatch.setattr("ntkpipe.base.config.process_memory", lambda: 0)
    for needed, call in (
        (bytes_of_solve(N, 2, 30), partial(solve, rhs=np.ones((N, 2)), ridge=1.0, rank=30, method="pcg")),
        (bytes_of_eigsh(N, 5), partial(eigsh, k=5)),
        (bytes_of_cholesky(N), cholesky),
        (min(bytes_of_drivers(N, with_vectors=True).values()), eigh),
        (min(bytes_of_drivers(N, with_vectors=False).values()), eigvalsh),
        (bytes_of_density(N, 4, 2), partial(density, num_probes=4)),
    ):
        operator = DenseOperator(matrix)
        call(operator, memory_limit=needed)
        before = operator.work
        with pytest.raises(ResourceError):
            call(operator, memory_limit=needed - 1)
        assert operator.work.passes - before.passes <= 1
    assert bytes_of_smallest(N) > 8 * N * 30 * 3
