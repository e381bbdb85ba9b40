"""Learning curves: numbers by hand, and a population where the theory is right."""

import numpy as np
import pytest

from ntkpipe.analysis.eigenlearning import eigenlearning, learning_curve
from ntkpipe.base.errors import ConfigError, ResourceError


def population(num_samples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    features = rng.standard_normal((num_samples, 150)) * np.arange(1, 151) ** -0.6
    return features @ features.T + 1e-3 * np.eye(num_samples), features @ rng.standard_normal((150, 2))


@pytest.mark.parametrize("width", [1, 2])
def test_numbers_are_those_of_fits_by_hand(width, rng):
    kernel, targets = population(60, rng)
    targets = targets[: 60 // width]
    found = learning_curve(kernel, targets, sizes=[7, 12], ridges=[0.1, 2.0], num_subsets=3, seed=4)
    rows = targets if width == 1 else targets.reshape(-1, 1)
    values, vectors = np.linalg.eigh(kernel)
    draw = np.random.default_rng(4)
    for place, size in enumerate([7, 12]):
        losses = []
        for _ in range(3):
            samples = np.sort(draw.permutation(60 // width)[:size])
            inside = np.concatenate([np.arange(i * width, (i + 1) * width) for i in samples])
            outside = np.setdiff1d(np.arange(60), inside)
            inverse = np.linalg.inv(kernel[np.ix_(inside, inside)] + 2.0 * np.eye(len(inside)))
            squares = (kernel[:, inside] @ inverse @ rows[inside] - rows) ** 2
            kare = len(inside) ** 2 * np.mean((inverse @ rows[inside]) ** 2) / np.trace(inverse) ** 2
            losses.append([squares.mean(), squares[outside].mean(), kare])
        for name, of_draws in zip(("population_loss", "left_out_loss", "kare"), np.transpose(losses), strict=True):
            assert getattr(found, name)[place, 1] == pytest.approx(of_draws.mean(), rel=1e-9)
            error = of_draws.std(ddof=1) / 3**0.5
            assert getattr(found, f"{name}_error")[place, 1] == pytest.approx(error, rel=1e-7)
        expected = eigenlearning(values / 60, (vectors.T @ rows) ** 2 / 60, size * width, 2.0)
        assert found.eigenlearning[place, 1] == pytest.approx(expected.test_loss.mean(), rel=1e-9)
        assert found.kappa[place, 1] == pytest.approx(expected.kappa, rel=1e-9)
    np.testing.assert_allclose(found.canatar, found.eigenlearning, rtol=1e-10)
    np.testing.assert_allclose(found.kare_ratio, found.kare / found.left_out_loss)


def test_prediction_is_the_measured_loss_of_the_population(rng):
    kernel, targets = population(500, rng)
    found = learning_curve(kernel, targets, sizes=[25, 60], ridges=[0.0, 0.3, 5.0], num_subsets=30)
    relative = found.population_loss_error / found.population_loss
    assert relative.max() < 0.04
    assert np.all(np.abs(found.eigenlearning_ratio - 1) < 0.02 + 3 * relative)
    assert np.all(np.diff(found.population_loss, axis=0) < 0)


def test_defaults_and_what_is_refused(rng):
    kernel, targets = population(64, rng)
    found = learning_curve(kernel, targets)
    assert found.sizes.tolist() == [2, 4, 8, 16]
    assert found.ridges == pytest.approx(np.array([0, 0.01, 0.1, 1, 10]) * kernel.diagonal().mean())
    assert "of the population" in str(found)
    with pytest.raises(ConfigError, match="size=64"):
        learning_curve(kernel, targets, sizes=[64])
    with pytest.raises(ConfigError, match="num_subsets=1"):
        learning_curve(kernel, targets, num_subsets=1)
    with pytest.raises(ResourceError):
        learning_curve(kernel, targets, memory_limit=1)
