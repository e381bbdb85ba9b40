"""Gaussian processes: against scikit-learn, dense formulas, and each other; calibration of targets that are drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from regressions import NUM_OUTPUTS, NUM_TEST, features, make_store
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct

import ntkpipe
from ntkpipe import calibration, gaussian_process
from ntkpipe.base.errors import ConfigError, IndefiniteError
from ntkpipe.learning.gaussian.calibration import largest_of_independent

METHODS = ("cholesky", "streamed")


def dense(kernel: NDArray[Any], cross: NDArray[Any], blocks: NDArray[Any], noise: float) -> NDArray[np.float64]:
    """Posterior covariance of each sample, by an inverse."""
    inverse = np.linalg.inv(kernel + noise * np.eye(len(kernel)))
    rows = cross.reshape(len(blocks), -1, len(kernel))
    return blocks - rows @ inverse @ rows.transpose(0, 2, 1)


@pytest.mark.parametrize("shape", [(30,), (30, 3)])
def test_as_scikit_learn(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    phi, phi_test = rng.standard_normal((30, 50)) / 5, rng.standard_normal((9, 50)) / 5
    targets = rng.standard_normal(shape)
    theirs = GaussianProcessRegressor(DotProduct(0.0, "fixed"), alpha=0.3, optimizer=None).fit(phi, targets)
    mean, deviation = theirs.predict(phi_test, return_std=True)
    ours = gaussian_process(
        phi @ phi.T, targets, ridge=0.3, test_kernel=phi_test @ phi.T, test_diagonal=(phi_test**2).sum(axis=1)
    )
    np.testing.assert_allclose(ours.mean.reshape(mean.shape), mean, atol=1e-10)
    np.testing.assert_allclose(np.broadcast_to(ours.variance, ours.mean.shape).reshape(deviation.shape), deviation**2)
    assert ours.log_marginal_likelihood == pytest.approx(theirs.log_marginal_likelihood_value_, rel=1e-10)
    assert ours.log_marginal_likelihood_error == 0.0
    with_noise = theirs.predict(phi_test, return_std=True)[1] ** 2 + 0.3
    np.testing.assert_allclose(ours.predictive_variance[:, 0], with_noise.reshape(9, -1)[:, 0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["pntk", "ntk"])
def test_variances_are_the_dense_formula(tmp_path: Path, kind: str, method: str) -> None:
    store = make_store(tmp_path / "k.zarr", kind=kind)
    kernel, cross = store.train.to_numpy(), store.test_train.to_numpy()
    options: dict[str, Any] = {"test_kernel": store.test_train, "test_diagonal": store.test_diagonal, "method": method}
    options |= {"initial_outputs": store.outputs, "test_initial_outputs": store.test_outputs}
    found = gaussian_process(store.train, store.targets, ridge=0.01, ridge_scale="mean_diagonal", tol=1e-11, **options)
    assert found.noise == pytest.approx(0.01 * kernel.diagonal().mean())
    expected = dense(kernel, cross, store.test_diagonal, found.noise)
    np.testing.assert_allclose(found.covariance, expected, atol=1e-8 * kernel.diagonal().mean())
    np.testing.assert_allclose(found.variance, np.diagonal(found.covariance, axis1=1, axis2=2))
    goal = (np.eye(NUM_OUTPUTS)[store.targets] - store.outputs).reshape(len(kernel), -1)
    model = ntkpipe.KernelRegression(0.01, ridge_scale="mean_diagonal", centre="initial_outputs").fit(store)
    np.testing.assert_allclose(found.mean, model.predict_outputs(store), atol=1e-8)
    inverse = np.linalg.inv(kernel + found.noise * np.eye(len(kernel)))
    form = np.trace(goal.T @ inverse @ goal)
    assert found.data_fit == pytest.approx(-form / 2, rel=1e-9)
    assert found.scale == pytest.approx(form / goal.size, rel=1e-9)
    assert found.mean.shape == (NUM_TEST, NUM_OUTPUTS)
    assert found.variance.shape == (NUM_TEST, NUM_OUTPUTS if kind == "ntk" else 1)


def test_streamed_in_a_tenth_of_the_kernel(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkpipe.base.config.process_memory", lambda: 0)
    kernel, cross, diagonal = features(rng, num_train=500, num_test=20, size=600)
    targets = kernel[:, :2] + rng.standard_normal((500, 2))
    options: dict[str, Any] = {"ridge": 0.1, "test_kernel": cross, "test_diagonal": diagonal}
    exact = gaussian_process(kernel, targets, **options)
    found = gaussian_process(kernel, targets, memory_limit=kernel.nbytes // 10, **options)
    assert (exact.method, found.method) == ("cholesky", "streamed")
    np.testing.assert_allclose(found.mean, exact.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.variance, exact.variance, rtol=1e-6)
    assert found.data_fit == pytest.approx(exact.data_fit, rel=1e-6)
    gap = abs(found.log_marginal_likelihood - exact.log_marginal_likelihood)
    assert 0 < gap < 3 * found.log_marginal_likelihood_error
    assert found.log_marginal_likelihood_error < 0.1 * abs(exact.complexity)
    assert "±" in str(found)


def test_a_factor_in_files_is_the_same(rng: np.random.Generator, tmp_path: Path) -> None:
    kernel, cross, diagonal = features(rng)
    options: dict[str, Any] = {"ridge": 0.1, "test_kernel": cross, "test_diagonal": diagonal}
    targets = rng.standard_normal(30)
    there = gaussian_process(kernel, targets, path=tmp_path / "factor", **options)
    np.testing.assert_allclose(there.variance, gaussian_process(kernel, targets, **options).variance, rtol=1e-10)
    assert "factor" in there.why


def test_without_test_samples_there_is_the_likelihood(rng: np.random.Generator) -> None:
    kernel, _, _ = features(rng)
    found = gaussian_process(kernel, rng.standard_normal(30), ridge=0.1)
    assert found.mean.shape == (0, 1)
    assert found.complexity == pytest.approx(-0.5 * np.linalg.slogdet(kernel + 0.1 * np.eye(30))[1])
    with pytest.raises(ConfigError, match="no test samples"):
        calibration(found, np.zeros(0))


def test_what_is_singular_without_noise_is_refused(rng: np.random.Generator) -> None:
    kernel, _, _ = features(rng, size=7)
    with pytest.raises(IndefiniteError, match="ridge of at least"):
        gaussian_process(kernel, rng.standard_normal(30), ridge=0.0)


def drawn(seed: int, factor: float = 1.0) -> tuple[Any, NDArray[np.float64]]:
    """A posterior, and test targets that the process itself has drawn with all of its variances times a factor."""
    rng = np.random.default_rng(seed)
    phi = rng.standard_normal((600, 60)) / np.sqrt(1.0 + np.arange(60))
    noise = 0.05
    values = phi @ rng.standard_normal((60, 3)) + noise**0.5 * rng.standard_normal((600, 3))
    values *= factor**0.5
    kernel = phi @ phi.T
    found = gaussian_process(
        kernel[:100, :100],
        values[:100],
        ridge=noise,
        test_kernel=kernel[100:, :100],
        test_diagonal=kernel.diagonal()[100:],
    )
    return found, values[100:]


def test_targets_of_the_process_itself_are_covered() -> None:
    posterior, targets = drawn(0)
    found = calibration(posterior, targets)
    np.testing.assert_allclose(found.coverage, found.levels, atol=0.06)
    assert found.mean_standardized_squared_residual == pytest.approx(1.0, abs=0.15)
    squares = (targets - posterior.mean) ** 2 / posterior.predictive_variance
    assert found.mean_standardized_squared_residual == pytest.approx(squares.mean(), rel=1e-12)
    density = 0.5 * np.log(2 * np.pi * posterior.predictive_variance) + squares / 2
    assert found.negative_log_predictive_density == pytest.approx(density.mean(), rel=1e-12)
    without = calibration(posterior, targets, include_noise=False)
    assert without.mean_standardized_squared_residual > found.mean_standardized_squared_residual
    assert not len(found.counts)


def test_the_scale_of_the_likelihood_mends_variances_of_another_size() -> None:
    posterior, targets = drawn(1, factor=100.0)
    assert calibration(posterior, targets).mean_standardized_squared_residual > 50
    assert posterior.scale == pytest.approx(100.0, rel=0.25)
    found = calibration(posterior, targets, scale="likelihood")
    assert found.mean_standardized_squared_residual == pytest.approx(1.0, abs=0.25)
    assert f"times {posterior.scale:.4g}" in str(found)


def test_probabilities_of_the_largest(rng: np.random.Generator) -> None:
    mean, variance = rng.standard_normal((6, 4)), rng.uniform(0.1, 3.0, 6)
    found = largest_of_independent(mean, variance)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-6)
    draws = mean + np.sqrt(variance)[:, None] * rng.standard_normal((100_000, 6, 4))
    for output in range(4):
        np.testing.assert_allclose(found[:, output], (draws.argmax(axis=2) == output).mean(axis=0), atol=0.01)


@pytest.mark.parametrize("kind", ["pntk", "ntk"])
def test_reliability_of_classes(tmp_path: Path, kind: str) -> None:
    store = make_store(tmp_path / "k.zarr", kind=kind)
    options: dict[str, Any] = {"test_kernel": store.test_train, "test_diagonal": store.test_diagonal}
    posterior = gaussian_process(store.train, store.targets, ridge=1e-3, ridge_scale="mean_diagonal", **options)
    found = calibration(posterior, store.test_targets, bins=5, num_draws=100_000)
    assert found.counts.sum() == NUM_TEST
    predicted = posterior.mean.argmax(axis=1)
    assert found.mean_accuracy == np.mean(predicted == store.test_targets)
    rng = np.random.default_rng(5)
    noisy = posterior.covariance + posterior.noise * np.eye(posterior.covariance.shape[1])
    if kind == "pntk":
        noisy = noisy * np.eye(NUM_OUTPUTS)
    draws = [rng.multivariate_normal(m, c, 20_000) for m, c in zip(posterior.mean, noisy, strict=True)]
    shares = np.array([np.mean(d.argmax(axis=1) == p) for d, p in zip(draws, predicted, strict=True)])
    assert found.mean_confidence == pytest.approx(shares.mean(), abs=0.01)
    filled = found.counts > 0
    gaps = np.abs(found.accuracy - found.confidence)[filled] @ found.counts[filled] / NUM_TEST
    assert found.expected_calibration_error == pytest.approx(gaps)
    assert (found.edges[:-1][filled] <= found.confidence[filled]).all()
    assert (found.confidence[filled] <= found.edges[1:][filled]).all()
    assert "expected calibration error" in str(found)


def test_wrong_input_is_named(rng: np.random.Generator, tmp_path: Path) -> None:
    kernel, cross, diagonal = features(rng)
    targets = rng.standard_normal(30)
    for options, words in (
        ({"method": "lu"}, "method='lu'"),
        ({"ridge": -1.0}, "ridge=-1"),
        ({"test_kernel": cross}, "without the diagonal"),
        ({"test_kernel": cross, "test_diagonal": diagonal[1:]}, "test_diagonal of shape"),
        ({"test_kernel": cross, "test_diagonal": diagonal - 100.0}, "test_diagonal reaches -.*needed variances"),
        ({"method": "streamed", "path": tmp_path}, "path is an option"),
        ({"test_kernel": cross, "test_diagonal": diagonal, "initial_outputs": np.zeros(30)}, "one of train and test"),
    ):
        with pytest.raises(ConfigError, match=words):
            gaussian_process(kernel, targets, **{"ridge": 0.1, **options})
    found = gaussian_process(kernel, targets, ridge=0.1, test_kernel=cross, test_diagonal=diagonal)
    with pytest.raises(ConfigError, match=r"for predictions \(9, 1\)"):
        calibration(found, np.zeros(8))
    with pytest.raises(ConfigError, match="levels=2"):
        calibration(found, np.zeros(9), levels=[2.0])
    with pytest.raises(ConfigError, match=r"classes: 'names\.npy' is text or a path"):
        calibration(found, np.zeros(9), classes="names.npy")
