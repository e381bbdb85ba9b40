"""Paths of ridges: leave-one-out against refits, cross-validation written out, streamed against exact."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from regressions import NUM_OUTPUTS, features, make_store
from sklearn.kernel_ridge import KernelRidge

import ntkpipe
from ntkpipe import ridge_path
from ntkpipe.base.errors import ConfigError

METHODS = ("eigh", "cholesky", "streamed")
RIDGES = (0.3, 1e-3, 20.0)


def refits(kernel: NDArray[Any], targets: NDArray[Any], ridge: float, width: int = 1) -> NDArray[np.float64]:
    """Predictions of each sample, with all of its rows, from a fit to all others."""
    found = np.empty_like(targets)
    for sample in range(len(kernel) // width):
        out = np.arange(sample * width, (sample + 1) * width)
        rest = np.setdiff1d(np.arange(len(kernel)), out)
        inner = kernel[np.ix_(rest, rest)]
        if ridge:
            coefficients = np.linalg.solve(inner + ridge * np.eye(len(rest)), targets[rest])
        else:
            coefficients = np.linalg.pinv(inner, rcond=1e-10, hermitian=True) @ targets[rest]
        found[out] = kernel[np.ix_(out, rest)] @ coefficients
    return found


@pytest.mark.parametrize("method", METHODS)
def test_leave_one_out_is_n_refits(rng: np.random.Generator, method: str) -> None:
    kernel, _, _ = features(rng)
    targets = rng.standard_normal((30, 2))
    path = ridge_path(kernel, targets, ridges=RIDGES, method=method, tol=1e-12)
    assert path.is_converged
    assert path.num_left_out == 30
    for index, ridge in enumerate(RIDGES):
        expected = np.mean((targets - refits(kernel, targets, ridge)) ** 2)
        assert path.leave_one_out_loss[index] == pytest.approx(expected, rel=1e-8)
    assert not path.leave_one_out_loss_error.any()
    np.testing.assert_allclose(path.ridges, RIDGES)


@pytest.mark.parametrize("method", METHODS)
def test_everything_else_is_its_formula(rng: np.random.Generator, method: str) -> None:
    kernel, test_kernel, _ = features(rng)
    targets, test_targets = rng.standard_normal((30, 2)), rng.standard_normal((9, 2))
    options = {"test_kernel": test_kernel, "test_targets": test_targets}
    path = ridge_path(kernel, targets, ridges=RIDGES, method=method, tol=1e-12, **options)
    for index, ridge in enumerate(RIDGES):
        fit = KernelRidge(alpha=ridge, kernel="precomputed").fit(kernel, targets)
        hat = kernel @ np.linalg.inv(kernel + ridge * np.eye(30))
        train_loss = np.mean((targets - fit.predict(kernel)) ** 2)
        expected = {
            "train_loss": train_loss,
            "test_loss": np.mean((test_targets - fit.predict(test_kernel)) ** 2),
            "effective_dimension": np.trace(hat),
            "generalised_cross_validation": train_loss / (1.0 - np.trace(hat) / 30) ** 2,
            "norm": np.sum(fit.dual_coef_ * (kernel @ fit.dual_coef_)),
        }
        for name, value in expected.items():
            assert getattr(path, name)[index] == pytest.approx(value, rel=1e-8), name
    assert np.isnan(path.train_accuracy).all()
    assert np.isnan(path.leave_one_out_accuracy).all()
    assert path.best.ridge == RIDGES[int(np.argmin(path.leave_one_out_loss))]
    assert path.best_by("test_loss").value == path.test_loss.min()


@pytest.mark.parametrize("method", METHODS)
def test_a_full_ntk_leaves_all_rows_of_a_sample_out(tmp_path: Path, method: str) -> None:
    store = make_store(tmp_path / "k.zarr", kind="ntk")
    kernel = store.train.to_numpy()
    options = {"ridge_scale": "mean_diagonal", "method": method, "tol": 1e-12}
    options |= {"initial_outputs": store.outputs, "test_initial_outputs": store.test_outputs}
    options |= {"test_kernel": store.test_train, "test_targets": store.test_targets}
    path = ridge_path(store.train, store.targets, ridges=[1e-2], **options)
    one_hot = np.eye(NUM_OUTPUTS)[store.targets]
    goal = (one_hot - store.outputs).reshape(-1, 1)
    ridge = 1e-2 * kernel.diagonal().mean()
    predicted = refits(kernel, goal, ridge, NUM_OUTPUTS).reshape(-1, NUM_OUTPUTS) + store.outputs
    assert path.leave_one_out_loss[0] == pytest.approx(np.mean((one_hot - predicted) ** 2), rel=1e-8)
    assert path.leave_one_out_accuracy[0] == np.mean(predicted.argmax(axis=1) == store.targets)
    fit = KernelRidge(alpha=ridge, kernel="precomputed").fit(kernel, goal)
    outputs = fit.predict(store.test_train.to_numpy()).reshape(-1, NUM_OUTPUTS) + store.test_outputs
    assert path.test_accuracy[0] == np.mean(outputs.argmax(axis=1) == store.test_targets)
    assert path.test_loss[0] == pytest.approx(np.mean((outputs - np.eye(3)[store.test_targets]) ** 2), rel=1e-8)
    train = fit.predict(kernel).reshape(-1, NUM_OUTPUTS) + store.outputs
    assert path.train_accuracy[0] == np.mean(train.argmax(axis=1) == store.targets)


@pytest.mark.parametrize("width", [1, 2])
def test_ridgeless_leave_one_out_of_singular_kernels(rng: np.random.Generator, width: int) -> None:
    """Minimum-norm refits: some rows are decided by the others, some have a direction of their own."""
    phi = rng.standard_normal((12, 7))
    phi[:4, 5:] = 0.0
    phi[4:, 5:] *= np.arange(16).reshape(8, 2) == 0  # one row has a direction alone
    kernel = phi @ phi.T
    targets = rng.standard_normal((12, 1)) if width == 1 else rng.standard_normal((6, 2))
    path = ridge_path(kernel, targets, ridges=[0.0])
    rows = targets.reshape(-1, 1)
    assert path.leave_one_out_loss[0] == pytest.approx(
        np.mean((rows - refits(kernel, rows, 0.0, width)) ** 2), rel=1e-8
    )
    rank = np.linalg.matrix_rank(kernel)
    assert path.effective_dimension[0] == rank < 12
    left = rows - kernel @ np.linalg.pinv(kernel, rcond=1e-10, hermitian=True) @ rows
    assert path.train_loss[0] == pytest.approx(np.mean(left**2), rel=1e-8)
    assert path.generalised_cross_validation[0] == pytest.approx(np.mean(left**2) / (1 - rank / 12) ** 2, rel=1e-8)


def test_ridgeless_leave_one_out_of_a_regular_kernel(rng: np.random.Generator) -> None:
    kernel, _, _ = features(rng)
    labels = rng.integers(0, 3, 30)
    path = ridge_path(kernel, labels, ridges=[0.0])
    predicted = refits(kernel, np.eye(3)[labels], 0.0)
    assert path.leave_one_out_loss[0] == pytest.approx(np.mean((np.eye(3)[labels] - predicted) ** 2), rel=1e-8)
    assert path.leave_one_out_accuracy[0] == np.mean(predicted.argmax(axis=1) == labels)
    assert path.train_accuracy[0] == 1.0


def test_given_eigenpairs_are_used(rng: np.random.Generator) -> None:
    kernel, _, _ = features(rng)
    targets = rng.standard_normal(30)
    path = ridge_path(kernel, targets, ridges=RIDGES, eigenpairs=ntkpipe.eigh(kernel))
    assert "were given" in path.why
    np.testing.assert_allclose(
        path.leave_one_out_loss, ridge_path(kernel, targets, ridges=RIDGES).leave_one_out_loss, rtol=1e-12
    )
    with pytest.raises(ConfigError, match="needed all"):
        ridge_path(kernel, targets, ridges=RIDGES, eigenpairs=ntkpipe.eigsh(kernel, k=3))


def test_streamed_a_singular_kernel_without_a_ridge_says_so(rng: np.random.Generator) -> None:
    factor = rng.standard_normal((60, 20))
    found = ridge_path(factor @ factor.T, rng.integers(0, 3, 60), ridges=[0.0, 1.0], method="streamed", num_left_out=7)
    assert found.status == found.statuses[0] == "indefinite at storage precision"
    assert np.isnan(found.leave_one_out_loss[0])
    assert found.statuses[1] == "converged"


def test_streamed_in_a_tenth_of_the_kernel(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no estimate is equal; estimates have error bars that hold."""
    monkeypatch.setattr("ntkpipe.base.config.process_memory", lambda: 0)
    kernel, test_kernel, _ = features(rng, num_train=500, num_test=50, size=600)
    labels, test_labels = (part[:, :7].argmax(axis=1) % 3 for part in (kernel, test_kernel))
    options: dict[str, Any] = {"ridges": [0.05, 0.5], "ridge_scale": "mean_diagonal"}
    options |= {"test_kernel": test_kernel, "test_targets": test_labels}
    exact = ridge_path(kernel, labels, method="eigh", **options)
    found = ridge_path(kernel, labels, memory_limit=kernel.nbytes // 10, num_left_out=50, **options)
    assert (exact.method, found.method) == ("eigh", "streamed")
    for name in ("train_loss", "test_loss", "norm"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), rtol=1e-6)
    for name in ("train_accuracy", "test_accuracy", "ridges"):
        np.testing.assert_array_equal(getattr(found, name), getattr(exact, name))
    estimated = ("effective_dimension", "generalised_cross_validation", "leave_one_out_loss", "leave_one_out_accuracy")
    for name in estimated:
        error = getattr(found, f"{name}_error")
        assert (error > 0).all(), name
        assert (np.abs(getattr(found, name) - getattr(exact, name)) < 3 * error).all(), name
        assert (error < 0.1 * getattr(exact, name)).all(), name
    assert "±" in str(found)


def test_error_bars_are_one_standard_error(rng: np.random.Generator) -> None:
    """Over many choices of samples the error is as large as its bar says."""
    kernel, _, _ = features(rng, num_train=120, size=80)
    targets = kernel[:, :2] + 0.3 * rng.standard_normal((120, 2))
    exact = ridge_path(kernel, targets, ridges=[0.2])
    names = ("effective_dimension", "generalised_cross_validation", "leave_one_out_loss")
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(30):
        found = ridge_path(kernel, targets, ridges=[0.2], method="streamed", num_left_out=25, seed=seed)
        for name in names:
            gap = getattr(found, name)[0] - getattr(exact, name)[0]
            ratios[name].append(gap / getattr(found, f"{name}_error")[0])
    for name in names:
        assert 0.6 < np.std(ratios[name]) < 1.6, name
        assert abs(np.mean(ratios[name])) < 0.6, name


def test_ridges_that_cannot_be_solved_are_named(rng: np.random.Generator) -> None:
    kernel, _, _ = features(rng)
    indefinite = kernel - (0.2 + np.linalg.eigvalsh(kernel)[0]) * np.eye(30)
    for method in ("eigh", "cholesky"):
        path = ridge_path(indefinite, rng.standard_normal(30), ridges=[0.1, 1.0], method=method)
        assert path.status == "indefinite at storage precision"
        assert path.statuses == ("indefinite at storage precision", "converged")
        assert "λ = 0.1" in path.message
        assert path.best.ridge == 1.0
        assert "indefinite" in str(path)


def test_ties_go_to_the_larger_ridge_and_criteria_have_names(rng: np.random.Generator) -> None:
    kernel, _, _ = features(rng)
    path = ridge_path(kernel, np.zeros(30), ridges=[1.0, 3.0, 2.0])
    assert path.best.ridge == 3.0
    with pytest.raises(ConfigError, match="test_loss is not known"):
        path.best_by("test_loss")
    with pytest.raises(ConfigError, match="criterion='aic'"):
        path.best_by("aic")


def test_default_ridges_are_counted_in_the_mean_diagonal(rng: np.random.Generator) -> None:
    kernel, _, _ = features(rng)
    path = ridge_path(kernel, rng.integers(0, 2, 30))
    assert path.ridges[0] == 0.0
    assert path.ridges[-1] == pytest.approx(10 * np.trace(kernel) / 30)
    assert path.options["ridge_scale"] == "mean_diagonal"


def test_wrong_input_is_named(rng: np.random.Generator) -> None:
    kernel, test_kernel, _ = features(rng)
    targets = rng.standard_normal(30)
    for options, words in (
        ({"ridges": []}, "no ridge"),
        ({"ridges": [-1.0]}, "ridges=-1"),
        ({"method": "svd"}, "method='svd'"),
        ({"test_kernel": test_kernel}, "without test targets"),
        ({"test_kernel": test_kernel, "test_targets": np.zeros(8)}, r"needed \(9, 1\)"),
        ({"num_left_out": 1}, "num_left_out=1"),
        ({"initial_outputs": np.zeros((30, 2))}, r"needed \(30, 1\)"),
        (
            {"test_kernel": test_kernel, "test_targets": np.zeros(9), "initial_outputs": np.zeros(30)},
            "one of train and test",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            ridge_path(kernel, targets, **{"ridges": [1.0], **options})
