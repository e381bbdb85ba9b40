"""Gradient flow: against exponentials by eigenvectors, with errors that are never larger than what is said of them."""

import math

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law, spectra

from ntkpipe.base import config
from ntkpipe.base.errors import ConfigError, NonFiniteError, ResourceError
from ntkpipe.learning.dynamics import dynamics
from ntkpipe.operators.dense import DenseOperator

TIMES = [0.0, 1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7]


def reference(matrix, start, scaled):
    """``exp(-s K)`` and ``K^-1 (I - exp(-s K))`` of a block."""
    values, vectors = np.linalg.eigh(matrix)
    parts = vectors.T @ start
    if math.isinf(scaled):
        return np.zeros_like(start), vectors @ (parts / values[:, None])
    phi = -np.expm1(-scaled * values) / values
    return vectors @ (np.exp(-scaled * values)[:, None] * parts), vectors @ (phi[:, None] * parts)


def largest(block, start):
    sizes = np.linalg.norm(start, axis=0)
    return (np.linalg.norm(block, axis=0)[sizes > 0] / sizes[sizes > 0]).max(initial=0.0)


@pytest.fixture
def targets(rng):
    return np.eye(4)[rng.integers(0, 4, 300)]


@pytest.mark.parametrize("name", spectra(300))
@pytest.mark.parametrize("max_passes", [2, 5, 10, 25, 500])
def test_errors_are_never_larger_than_what_is_said_of_them(name, max_passes, targets):
    matrix = matrix_with_spectrum(spectra(300)[name])
    found = dynamics(matrix, targets, times=TIMES, max_passes=max_passes)
    for index, time in enumerate(TIMES):
        decayed, grown = reference(matrix, targets, time * found.learning_rate)
        assert largest(found.residuals[index] + decayed, targets) <= found.errors[index]
        # The reference's own rounding is in the second.
        gap = largest(matrix @ (found.coefficients[index] - grown), targets)
        assert gap <= 2 * found.errors[index] + 1e-9 + 1e-16 * time
    if name != "indefinite":
        assert (found.errors[np.array([s == "converged" for s in found.statuses])] <= 1e-6).all()


@pytest.mark.parametrize("name", [name for name in spectra(300) if name != "indefinite"])
def test_all_finite_times_converge(name, targets):
    found = dynamics(matrix_with_spectrum(spectra(300)[name]), targets, times=TIMES)
    assert found.status == "converged"
    assert set(found.statuses) == {"converged"}
    assert found.defect < 1e-5
    assert found.num_steps < 80


def test_the_estimate_is_no_multiple_of_the_error_that_nobody_would_use(targets):
    """Bounds may be loose, but the number of passes that they ask for is within a third of what is needed."""
    matrix = matrix_with_spectrum(power_law(300, condition=1e6))
    asked = dynamics(matrix, targets, times=[1e5]).num_steps
    fewer = dynamics(matrix, targets, times=[1e5], max_passes=int(asked * 0.66))
    decayed, _ = reference(matrix, targets, 1e5 * fewer.learning_rate)
    assert largest(fewer.residuals[0] + decayed, targets) > 1e-6


def test_the_limit_is_the_ridgeless_regression(targets):
    matrix = matrix_with_spectrum(power_law(300, condition=1e4))
    found = dynamics(matrix, targets, times=[1.0, math.inf], tol=1e-8)
    np.testing.assert_allclose(found.coefficients[1], np.linalg.solve(matrix, targets), rtol=0, atol=1e-6)
    assert found.statuses == ("converged", "converged")
    assert (found.residuals[1] == 0).all()
    assert found.errors[1] == pytest.approx(largest(matrix @ found.coefficients[1] - targets, targets))


def test_a_limit_that_is_not_reached_is_not_called_converged(targets):
    matrix = matrix_with_spectrum(power_law(300, condition=1e8))
    found = dynamics(matrix, targets, times=[1.0, math.inf], max_passes=20)
    assert found.statuses == ("converged", "step limit")
    assert found.status == "step limit"
    assert "max_passes" in found.message
    gap = largest(matrix @ found.coefficients[1] - targets, targets)
    assert found.errors[1] == pytest.approx(gap, rel=1e-3)


def test_the_limit_of_a_singular_matrix_is_the_pseudo_inverse_and_said_not_to_be_known(targets):
    matrix = matrix_with_spectrum(spectra(300)["singular"])
    found = dynamics(matrix, targets, times=[1e3, math.inf])
    assert found.statuses == ("converged", "indefinite at storage precision")
    pinv = np.linalg.pinv(matrix, rcond=1e-10, hermitian=True)
    np.testing.assert_allclose(found.coefficients[1], pinv @ targets, atol=1e-5)
    np.testing.assert_allclose(found.residuals[1], matrix @ pinv @ targets - targets, atol=1e-5)


def test_targets_in_the_range_of_a_singular_matrix_have_a_limit(rng):
    matrix = matrix_with_spectrum(spectra(300)["singular"])
    found = dynamics(matrix, matrix @ rng.standard_normal((300, 2)), times=[math.inf])
    assert found.status == "converged"


def test_growth_from_negative_eigenvalues_is_said(targets):
    matrix = matrix_with_spectrum(np.append(np.linspace(1.0, 2.0, 299), -0.5))
    found = dynamics(matrix, targets, times=[0.0, 10.0, 1e5], learning_rate=1.0)
    assert found.statuses == ("converged", *["indefinite at storage precision"] * 2)
    assert "-0.5" in found.message
    assert not np.isfinite(found.residuals[2]).all() or abs(found.residuals[2]).max() > 1e100
    assert str(found)


def test_rounding_of_zero_eigenvalues_does_not_grow(rng):
    factor = rng.standard_normal((100, 5))
    found = dynamics(factor @ factor.T, rng.standard_normal(100), times=[1e3, 1e15])
    assert found.statuses[0] == "converged"
    assert np.isfinite(found.residuals).all()


def test_losses_rates_and_starts_follow_the_convention(rng):
    """``df/dt = -η K (f - Y)``: no 1/n and no 2."""
    matrix, (goals, start) = matrix_with_spectrum([3.0, 2.0, 1.0]), rng.standard_normal((2, 3, 2))
    found = dynamics(matrix, goals, times=[0.0, 1e-6], learning_rate=0.7, initial_outputs=start, tol=1e-13)
    np.testing.assert_allclose(found.residuals[0], start - goals, atol=1e-14)
    slope = (found.residuals[1] - found.residuals[0]) / 1e-6
    np.testing.assert_allclose(slope, -0.7 * matrix @ (start - goals), rtol=1e-4)
    np.testing.assert_allclose(found.losses, 0.5 * (found.residuals**2).sum(axis=1))


def test_the_learning_rate_is_one_over_the_largest_eigenvalue_also_where_targets_know_nothing_of_it(rng):
    matrix = np.diag(np.append(5.0, np.linspace(1.0, 0.5, 49)))
    goals = np.append(0.0, rng.standard_normal(49))
    found = dynamics(matrix, goals, times=[3.0])
    assert found.learning_rate == pytest.approx(0.2, rel=1e-9)
    np.testing.assert_allclose(found.residuals[0], -np.exp(-0.6 * matrix.diagonal()) * goals, atol=1e-7)


def test_predictions_of_train_samples_are_the_train_functions(targets, rng):
    matrix = matrix_with_spectrum(power_law(300, condition=1e4))
    start = 0.1 * rng.standard_normal(targets.shape)
    found = dynamics(matrix, targets, times=[0.0, 5.0, 1e4, math.inf], initial_outputs=start)
    np.testing.assert_allclose(found.predict(matrix[:7], start[:7]), (targets + found.residuals)[:, :7], atol=1e-5)
    with pytest.raises(ConfigError, match=r"shape \(3, 4\); needed \(m, 300\)"):
        found.predict(np.ones((3, 4)))
    with pytest.raises(ConfigError, match=r"needed \(7, 4\)"):
        found.predict(matrix[:7], start[:6])


@pytest.mark.parametrize("kind", ["equal", "zero", "one zero", "dependent", "unlike sizes"])
def test_blocks_of_any_rank(kind, rng):
    matrix = matrix_with_spectrum(power_law(200, condition=1e4))
    column = rng.standard_normal((200, 1))
    goals = {
        "equal": np.repeat(column, 3, axis=1),
        "zero": np.zeros((200, 2)),
        "one zero": np.concatenate([column, np.zeros((200, 1))], axis=1),
        "dependent": rng.standard_normal((200, 2)) @ rng.standard_normal((2, 5)),
        "unlike sizes": rng.standard_normal((200, 3)) * [1e-20, 1.0, 1e20],
    }[kind]
    found = dynamics(matrix, goals, times=[0.0, 10.0, 1e3, math.inf])
    assert found.status == "converged"
    for index, time in enumerate([0.0, 10.0, 1e3]):
        decayed, _ = reference(matrix, goals, time * found.learning_rate)
        assert largest(found.residuals[index] + decayed, goals) <= found.errors[index]
    assert (found.residuals[:, :, (goals == 0).all(axis=0)] == 0).all()
    assert str(found)


def test_targets_of_one_axis_have_results_without_the_last_one(rng):
    matrix, goals = matrix_with_spectrum(power_law(50, condition=1e2)), rng.standard_normal(50)
    flat, block = (dynamics(matrix, values, times=[2.0, 3.0]) for values in (goals, goals[:, None]))
    assert (flat.residuals.shape, flat.coefficients.shape, flat.losses.shape) == ((2, 50), (2, 50), (2,))
    np.testing.assert_array_equal(flat.residuals, block.residuals[:, :, 0])
    np.testing.assert_allclose(flat.predict(matrix), goals + flat.residuals, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_tiny_matrices(size, rng):
    matrix, goals = matrix_with_spectrum(np.arange(1.0, size + 1)), rng.standard_normal((size, 3))
    found = dynamics(matrix, goals, times=[0, 1, 100, math.inf])
    assert found.status == "converged"
    decayed, grown = reference(matrix, goals, 1 / found.learning_rate * found.learning_rate**2)
    np.testing.assert_allclose(found.residuals[1], -decayed, atol=1e-10)
    np.testing.assert_allclose(found.coefficients[1], grown, atol=1e-10)
    np.testing.assert_allclose(found.coefficients[3], np.linalg.solve(matrix, goals), atol=1e-10)


def test_the_zero_matrix_needs_a_rate():
    with pytest.raises(ConfigError, match="give learning_rate"):
        dynamics(np.zeros((3, 3)), np.ones(3), times=[1.0])
    found = dynamics(np.zeros((3, 3)), np.ones(3), times=[0.0, 7.0], learning_rate=0.5)
    np.testing.assert_allclose(found.residuals, -np.ones((2, 3)))
    np.testing.assert_allclose(found.coefficients, [[0, 0, 0], [3.5, 3.5, 3.5]])


def test_an_early_stop_is_the_best_there_is_where_storage_rounds(rng):
    """What rounding to float32 can have done grows with time, and is said beside the error of the method."""
    exact = matrix_with_spectrum(power_law(300, condition=1e8))
    goals = rng.standard_normal((300, 1))
    rounded = exact.astype(np.float32)
    rate = 1e-4
    found = dynamics(rounded, goals, times=[1.0, 1e3, 1e5], learning_rate=rate)
    assert (np.diff(found.storage_errors) > 0).all()
    for index, time in enumerate(found.times):
        decayed, _ = reference(exact, goals, time * rate)
        assert largest(found.residuals[index] + decayed, goals) <= 2 * found.storage_errors[index] + found.errors[index]


def test_passes_are_steps_and_a_check_and_bits_repeat(targets):
    operator = DenseOperator(matrix_with_spectrum(power_law(300, condition=1e4)))
    operator.statistics()
    first, second = (dynamics(operator, targets, times=[10.0, 1e3]) for _ in range(2))
    np.testing.assert_array_equal(first.residuals, second.residuals)
    assert first.work.passes == first.num_steps + 1


def test_memory_limits_the_steps_and_is_named(targets, monkeypatch):
    monkeypatch.setattr(config, "process_memory", lambda: 0)
    matrix = matrix_with_spectrum(power_law(300, condition=1e8))
    found = dynamics(matrix, targets, times=[1e7], memory_limit=8 * 300 * 5 * 15)
    assert found.num_steps == 12
    assert "memory_limit" in found.message
    with pytest.raises(ResourceError, match="raise memory_limit"):
        dynamics(matrix, targets, times=[1e7], memory_limit=10_000)


def test_monitors_are_called_after_each_pass(targets):
    seen = []
    found = dynamics(matrix_with_spectrum(power_law(300, condition=1e4)), targets, times=[1e3], monitor=seen.append)
    assert len(seen) == found.num_steps
    assert seen[-1].residual <= 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"times": []}, "times="),
        ({"times": [-1.0]}, "times="),
        ({"times": [math.nan]}, "times="),
        ({"times": [1.0], "tol": 0.0}, "tol="),
        ({"times": [1.0], "learning_rate": 0.0}, "learning_rate="),
        ({"times": [1.0], "learning_rate": math.nan}, "learning_rate="),
        ({"times": [1.0], "max_passes": 0}, "max_passes="),
        ({"times": [1.0], "initial_outputs": np.ones((3, 2))}, r"initial_outputs of shape \(3, 2\)"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        dynamics(np.eye(3), np.ones(3), **options)


@pytest.mark.parametrize("goals", [np.ones(4), np.ones((3, 0)), np.ones((3, 1, 1)), np.ones(3, complex)])
def test_bad_targets_are_refused(goals):
    with pytest.raises(ConfigError, match=r"targets of (shape|dtype)"):
        dynamics(np.eye(3), goals, times=[1.0])
    with pytest.raises(NonFiniteError, match="targets hold"):
        dynamics(np.eye(3), np.array([1.0, math.nan, 0.0]), times=[1.0])


def test_labels_become_columns_and_samples_may_have_a_row_for_each_output(rng):
    matrix, codes = matrix_with_spectrum(power_law(60, condition=1e2)), np.arange(60) % 3
    found, expected = (dynamics(matrix, goals, times=[2.0, math.inf]) for goals in (codes + 1, np.eye(3)[codes]))
    np.testing.assert_array_equal(found.residuals, expected.residuals)
    assert (found.targets, expected.targets) == ("3 classes, one-hot", "3 real targets")
    assert "3 classes, one-hot" in str(found)
    few, start = codes[:20], rng.standard_normal((20, 3))
    found = dynamics(matrix, few, times=[2.0], initial_outputs=start)
    expected = dynamics(
        matrix, np.eye(3)[few].reshape(-1), times=[2.0], initial_outputs=start.reshape(-1), task="regression"
    )
    assert found.residuals.shape == (1, 60)
    np.testing.assert_array_equal(found.residuals, expected.residuals)
