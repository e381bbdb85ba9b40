"""Preconditioners: powers of P are those of F F' + μ I, F F' is below K, ranks are what is there, bits repeat."""

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law, spectra

from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.inverse.solve import solve
from ntkpipe.solvers.linear.preconditioner import default_rank, nystrom, preconditioner_of, randomly_pivoted_cholesky

METHODS = ("rpcholesky", "nystrom")
N = 300


def make(matrix, method="rpcholesky", rank=60, ridge=0.0, seed=0):
    return preconditioner_of(DenseOperator(matrix), method, rank, seed).for_ridge(ridge)


def factor_of(preconditioner):
    return preconditioner.vectors * np.sqrt(preconditioner.values)


def dense(preconditioner):
    factor = factor_of(preconditioner)
    return factor @ factor.T + preconditioner.mu * np.eye(preconditioner.num_rows)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["power_law_1e4", "power_law_1e8", "spiked", "singular"])
def test_powers_are_those_of_the_matrix(method, name, rng):
    made = make(matrix_with_spectrum(spectra(N)[name]), method, ridge=0.5)
    values, vectors = np.linalg.eigh(dense(made))
    block = rng.standard_normal((N, 3))
    for function, power in ((made.solve, -1.0), (made.inverse_sqrt, -0.5)):
        expected = (vectors * values**power) @ (vectors.T @ block)
        np.testing.assert_allclose(function(block), expected, atol=1e-10 * abs(expected).max())
        np.testing.assert_allclose(function(block[:, 0]), function(block)[:, 0], atol=1e-13 * abs(expected).max())
    assert made.logdet() == pytest.approx(np.linalg.slogdet(dense(made))[1], abs=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in spectra(N) if name != "indefinite"])
def test_the_low_rank_part_is_below_the_matrix_and_its_tail_is_the_mean_of_what_is_left(method, name):
    spectrum = spectra(N)[name]
    matrix = matrix_with_spectrum(spectrum)
    made = make(matrix, method)
    left = matrix - factor_of(made) @ factor_of(made).T
    assert np.linalg.eigvalsh(left).min() > -1e-10 * spectrum[0]
    assert made.tail == pytest.approx(np.trace(left) / N, abs=1e-11 * spectrum[0])
    # What is left is not much more than the best approximation of half the rank leaves.
    assert np.trace(left) <= 2.0 * spectrum[30:].sum() + 1e-9 * spectrum[0]


@pytest.mark.parametrize("method", METHODS)
def test_the_condition_number_becomes_small(method):
    matrix = matrix_with_spectrum(power_law(N, condition=1e6))
    root = make(matrix, method).inverse_sqrt
    values = np.linalg.eigvalsh(root(root(matrix).T))
    assert values.max() / values.min() < 1e3


def test_columns_are_interpolated():
    """K - F F' vanishes in the rows and columns of pivots: as many as the rank."""
    matrix = matrix_with_spectrum(power_law(N, condition=1e4))
    made = make(matrix)
    left = matrix - factor_of(made) @ factor_of(made).T
    assert np.count_nonzero(np.abs(left).max(axis=0) < 1e-9) == 60


def test_rounds_find_small_clusters_that_one_round_misses(rng):
    """270 samples in one place and 30 in places of their own: one round mostly reads the crowd."""
    points = np.concatenate([1e-3 * rng.standard_normal((1470, 2)), 20 * rng.standard_normal((30, 2))])
    distances = ((points[:, None] - points[None]) ** 2).sum(-1)
    matrix = np.exp(-distances / 2)
    one, five = (factor_of(randomly_pivoted_cholesky(matrix, 60, rounds=rounds, seed=1)) for rounds in (1, 5))
    assert np.trace(matrix - five @ five.T) < 1e-3 < np.trace(matrix - one @ one.T)


def test_candidates_near_a_pivot_are_left_for_others():
    """Ten places of 30 samples: of 20 candidates, which are in nine places, ten pivots are in nearly as many."""
    rng = np.random.default_rng(0)
    points = np.repeat(100.0 * np.arange(10)[:, None], 30, axis=0) + 1e-3 * rng.standard_normal((300, 1))
    matrix = np.exp(-((points - points.T) ** 2) / 2)
    made = [randomly_pivoted_cholesky(matrix, 10, rounds=1, seed=seed) for seed in range(8)]
    missed = [np.count_nonzero(matrix.diagonal() - (factor_of(one) ** 2).sum(axis=1) > 0.5) / 30 for one in made]
    assert np.mean(missed) < 2.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("matrix", "rank"),
    [
        (np.zeros((5, 5)), 0),
        (np.ones((50, 50)), 1),
        (np.ones((1, 1)), 1),
        (np.diag([3.0, 0.0, 1.0]), 2),
        (np.kron(matrix_with_spectrum(np.arange(1.0, 9.0)), np.ones((6, 6))), 8),
    ],
)
def test_the_rank_is_never_more_than_there_is(method, matrix, rank):
    made = make(matrix, method, rank=40, ridge=0.1)
    assert made.rank == rank
    np.testing.assert_allclose(dense(made), matrix + 0.1 * np.eye(len(matrix)), atol=1e-9 * max(1.0, matrix.max()))
    assert make(matrix, method, rank=40).mu > 0.0


def test_float32_rounding_is_not_taken_for_rank():
    features = np.random.default_rng(0).standard_normal((N, 20))
    stored = (features @ features.T).astype(np.float32)
    made = make(stored, rank=150)
    assert made.rank <= 25
    assert made.tail >= DenseOperator(stored).storage_floor() > 0.0


@pytest.mark.parametrize("method", METHODS)
def test_it_survives_matrices_that_rounding_made_indefinite(method):
    matrix = matrix_with_spectrum(spectra(N)["indefinite"])
    made = make(matrix, method, rank=N)
    assert made.mu > 0.0
    if method == "nystrom":
        # It is exact at full rank: what made it stable has been taken away again.
        assert made.shift > 1e-5
        np.testing.assert_allclose(made.values[:50], spectra(N)["indefinite"][:50], atol=0.1 * made.shift)
    assert made.values.min() >= 0.0
    np.testing.assert_allclose(made.vectors.T @ made.vectors, np.eye(made.rank), atol=1e-12)


def test_the_identity_is_a_matrix_too():
    made = make(np.eye(50), rank=20)
    assert (made.rank, made.mu) == (20, pytest.approx(0.6))


@pytest.mark.parametrize("method", METHODS)
def test_other_ridges_share_the_factor(method):
    matrix = matrix_with_spectrum(power_law(N, condition=1e6))
    made = make(matrix, method)
    other = made.for_ridge(2.0)
    assert other.vectors is made.vectors
    assert other.mu == pytest.approx(made.tail + 2.0)
    assert other.mu == make(matrix, method, ridge=2.0).mu


@pytest.mark.parametrize("method", METHODS)
def test_bits_repeat_and_seeds_differ(method):
    matrix = matrix_with_spectrum(power_law(N, condition=1e6)).astype(np.float32)
    first, again, other = (make(matrix, method, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.vectors, again.vectors)
    assert not np.array_equal(first.vectors, other.vectors)


def test_cost_is_told():
    operator = DenseOperator(matrix_with_spectrum(power_law(N, condition=1e6)))
    made = randomly_pivoted_cholesky(operator, 60)
    assert made.work == operator.work
    # The diagonal, and twice as many columns as pivots.
    assert made.work.passes == pytest.approx(1 + 120 / N)
    before = operator.work
    assert nystrom(operator, 60).work.passes == operator.work.passes - before.passes == 1.0


def test_defaults():
    assert [default_rank(n) for n in (1, 9, 4000, 10**6)] == [1, 1, 400, 1000]


@pytest.mark.parametrize("method", METHODS)
def test_wrong_options_are_refused(method):
    with pytest.raises(ConfigError, match="rank=0"):
        make(np.eye(3), method, rank=0)
    with pytest.raises(ConfigError, match="ridge=-1"):
        make(np.eye(3), method, ridge=-1.0)
    with pytest.raises(ConfigError, match="ridge=nan"):
        make(np.eye(3), method).for_ridge(float("nan"))


@pytest.mark.parametrize("spectrum", [[-1.0] * 12, -np.geomspace(1e-3, 5.0, 12), [*[-2.0] * 11, 0.5]])
def test_advice_where_there_is_no_nystrom_approximation(spectrum):
    matrix, right = matrix_with_spectrum(spectrum), np.arange(12.0)
    with pytest.raises(ConfigError, match=r"far from positive.*at most -.*preconditioner='rpcholesky'") as caught:
        make(matrix, "nystrom")
    ridge = float(str(caught.value).split("at least ")[1])
    found = solve(matrix, right, ridge=ridge, method="pcg", preconditioner="rpcholesky", task="regression", tol=1e-12)
    assert found.is_converged
    np.testing.assert_allclose(found.coefficients, np.linalg.solve(matrix + ridge * np.eye(12), right), atol=1e-9)


def test_nan_in_the_matrix_is_an_error():
    with pytest.raises(NonFiniteError):
        make(np.full((3, 3), np.nan))
