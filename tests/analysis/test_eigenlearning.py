"""Predicted risks: the conservation law, closed forms, and simulations where the theory is known to be right."""

import numpy as np
import pytest

from ntkpipe.analysis.eigenlearning import canatar, effective_ridge, eigenlearning
from ntkpipe.base.errors import ConfigError


def power_law(count: int, exponent: float) -> np.ndarray:
    return np.arange(1, count + 1) ** -exponent


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("num_samples", [1, 30, 399])
def test_learnabilities_and_what_the_ridge_takes_add_up_to_n(num_samples, ridge):
    values = power_law(400, 1.7)
    found = eigenlearning(values, np.ones(400), num_samples, ridge)
    assert found.learnabilities.sum() + ridge / found.kappa == pytest.approx(num_samples, rel=1e-12)


def test_effective_ridge_of_equal_eigenvalues_is_a_root_of_a_quadratic():
    count, value, n, ridge = 50, 0.3, 20, 0.7
    # n = m v / (v + κ) + δ/κ
    coefficients = [n, n * value - count * value - ridge, -ridge * value]
    expected = np.roots(coefficients).max()
    assert effective_ridge(np.full(count, value), n, ridge) == pytest.approx(expected, rel=1e-12)
    # Without ridge all modes are learnt alike: L = n/m, so E_0 = m / (m - n).
    found = eigenlearning(np.full(count, value), np.full(count, 2.0), n, 0.0)
    np.testing.assert_allclose(found.learnabilities, n / count, rtol=1e-12)
    assert found.overfitting_coefficient == pytest.approx(count / (count - n), rel=1e-12)
    assert found.test_loss == pytest.approx([100 * (1 - n / count)], rel=1e-11)


def test_more_samples_than_modes_learn_all_and_noise_is_amplified_as_in_least_squares():
    found = eigenlearning([2.0, 1.0, 0.5], [1.0, 2.0, 3.0], 12, 0.0, noise=0.4)
    assert found.kappa == 0
    assert found.overfitting_coefficient == pytest.approx(12 / (12 - 3))
    assert found.test_loss == pytest.approx([0.4 * 12 / 9])
    assert canatar([2.0, 1.0, 0.5], [1.0, 2.0, 3.0], 12, 0.0, noise=0.0) == pytest.approx([0.0])


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_canatar_is_eigenlearning_without_the_noise_of_the_new_target(noise, rng):
    values, powers = power_law(300, 1.4), rng.random((300, 2))
    for ridge in (1e-3, 0.5, 20.0):
        theirs = canatar(values, powers, 80, ridge, noise=noise)
        ours = eigenlearning(values, powers, 80, ridge, noise=noise).test_loss
        np.testing.assert_allclose(theirs + noise, ours, rtol=1e-11)


def test_overfitting_coefficient_is_the_slope_of_the_effective_ridge():
    values, n, ridge, step = power_law(200, 1.3), 60, 0.2, 1e-5
    slope = (effective_ridge(values, n, ridge + step) - effective_ridge(values, n, ridge - step)) / (2 * step)
    found = eigenlearning(values, np.zeros(200), n, ridge)
    assert found.overfitting_coefficient == pytest.approx(n * slope, rel=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.05, 1.0])
def test_gaussian_features_have_the_predicted_losses(ridge, rng):
    """With Gaussian features the theory is right up to O(1/n); 60 draws know the mean to some per cent."""
    count, n, noise, draws = 400, 100, 0.1, 60
    values, powers = power_law(count, 1.5), power_law(count, 1.2)
    found = eigenlearning(values, powers, n, ridge, noise=noise)
    test, train = np.empty(draws), np.empty(draws)
    for draw in range(draws):
        features = rng.standard_normal((n, count))
        signs = np.sqrt(powers) * rng.choice([-1.0, 1.0], count)
        targets = features @ signs + np.sqrt(noise) * rng.standard_normal(n)
        weighted = features * values
        kernel = weighted @ features.T
        coefficients = np.linalg.solve(kernel + ridge * np.eye(n), targets)
        test[draw] = ((weighted.T @ coefficients - signs) ** 2).sum() + noise
        train[draw] = np.mean((kernel @ coefficients - targets) ** 2)
    error = test.std(ddof=1) / draws**0.5
    assert error < 0.03 * test.mean()
    assert abs(found.test_loss[0] - test.mean()) < 3 * error
    if ridge:
        assert abs(found.train_loss[0] - train.mean()) < 3 * train.std(ddof=1) / draws**0.5
    else:
        assert found.train_loss[0] == 0


def test_what_is_no_population_is_refused():
    with pytest.raises(ConfigError, match="not negative"):
        eigenlearning([1.0, -1e-9], [1.0, 1.0], 5, 0.1)
    with pytest.raises(ConfigError, match="powers of shape"):
        eigenlearning([1.0, 0.5], [1.0], 5, 0.1)
    with pytest.raises(ConfigError, match="ridge=-1"):
        effective_ridge([1.0], 5, -1.0)


@pytest.mark.parametrize("ridge", [1e-18, 1e-40, 1e-70])
def test_a_ridge_below_rounding_leaves_numbers(ridge):
    """γ is one there to rounding, and 1 - γ is not taken from it."""
    with np.errstate(all="raise", under="ignore"):
        found = canatar(np.ones(4), np.ones(4), 4, ridge)
    assert 0.0 <= found[0] < 1e-7
