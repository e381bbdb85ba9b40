"""Kernel regression: against scikit-learn, and as an estimator of scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
from regressions import NUM_OUTPUTS, NUM_TEST, features, make_store
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, cross_val_score

from ntkpipe import KernelRegression
from ntkpipe.base.config import Budget
from ntkpipe.base.errors import ConfigError, NonFiniteError, NotConvergedWarning, ResourceError
from ntkpipe.operators.opening import as_operator

METHODS = ("auto", "cholesky", "eigh", "pcg", "block_cg")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(30,), (30, 4)])
def test_real_targets_as_kernel_ridge(rng: np.random.Generator, method: str, shape: tuple[int, ...]) -> None:
    kernel, test_kernel, _ = features(rng)
    targets = rng.standard_normal(shape)
    ours = KernelRegression(0.2, method=method, tol=1e-12).fit(kernel, targets)
    theirs = KernelRidge(alpha=0.2, kernel="precomputed").fit(kernel, targets)
    assert ours.result_.is_converged
    assert ours.dual_coef_.shape == theirs.dual_coef_.shape
    np.testing.assert_allclose(ours.dual_coef_, theirs.dual_coef_, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours.predict(test_kernel), theirs.predict(test_kernel), rtol=1e-9, atol=1e-9)
    wanted = rng.standard_normal((9, *shape[1:]))
    assert ours.score(test_kernel, wanted) == pytest.approx(r2_score(wanted, theirs.predict(test_kernel)), rel=1e-9)


@pytest.mark.parametrize("as_what", [np.asarray, as_operator])
def test_ridge_scale_is_the_mean_diagonal(rng: np.random.Generator, as_what) -> None:
    kernel, _, _ = features(rng)
    fitted = KernelRegression(0.5, ridge_scale="mean_diagonal").fit(as_what(kernel), rng.standard_normal(30))
    assert fitted.ridge_ == pytest.approx(0.5 * np.trace(kernel) / 30, rel=1e-12)
    assert f"{fitted.ridge_:.4g}" in str(fitted.result_)


@pytest.mark.parametrize("labels", [["no", "perhaps", "yes"], [-1, 0, 7], [False, True, True], [2.0, 3.0, 9.0]])
def test_labels_of_any_dtype(rng: np.random.Generator, labels: list[object]) -> None:
    kernel, test_kernel, _ = features(rng)
    y = np.array(labels)[rng.integers(0, 3, 30)]
    task = "classification" if y.dtype.kind == "f" else "auto"
    fitted = KernelRegression(0.1, task=task).fit(kernel, y)
    np.testing.assert_array_equal(fitted.classes_, np.unique(y))
    one_hot = (y[:, None] == np.unique(y)).astype(float)
    expected = KernelRidge(alpha=0.1, kernel="precomputed").fit(kernel, one_hot).predict(test_kernel)
    np.testing.assert_allclose(fitted.predict_outputs(test_kernel), expected, atol=1e-9)
    predicted = fitted.predict(test_kernel)
    assert predicted.dtype == (y.dtype if y.dtype.kind != "f" else np.int64)
    np.testing.assert_array_equal(predicted, np.unique(y)[expected.argmax(axis=1)])
    decision = expected[:, 1] - expected[:, 0] if len(np.unique(y)) == 2 else expected
    np.testing.assert_allclose(fitted.decision_function(test_kernel), decision, atol=1e-9)
    wanted = np.unique(y)[rng.integers(0, len(np.unique(y)), 9)]
    assert fitted.score(test_kernel, wanted) == np.mean(predicted == wanted)


def test_a_task_that_is_named_is_taken(rng: np.random.Generator) -> None:
    kernel, test_kernel, _ = features(rng)
    y = rng.integers(0, 3, 30)
    assert not hasattr(KernelRegression(0.1, task="regression").fit(kernel, y), "classes_")
    both = KernelRegression(0.1).fit(kernel, y)
    assert hasattr(both, "classes_")
    with pytest.warns(UserWarning, match="3 different integers"):
        both.fit(kernel, y.astype(float))
    assert not hasattr(both, "classes_")
    with pytest.raises(AttributeError, match="predict gives real"):
        both.decision_function(test_kernel)


def test_scikit_learn_clones_searches_and_validates(rng: np.random.Generator) -> None:
    kernel, _, _ = features(rng, num_train=60)
    targets = kernel[:, :3].sum(axis=1) + rng.standard_normal(60)
    model = KernelRegression(1.0, task="regression")
    copy = clone(model)
    assert copy is not model
    assert copy.get_params() == model.get_params()
    assert is_regressor(model)
    assert is_classifier(KernelRegression(task="classification"))
    ridge = KernelRidge(alpha=1.0, kernel="precomputed")
    np.testing.assert_allclose(
        cross_val_score(model, kernel, targets), cross_val_score(ridge, kernel, targets), rtol=1e-8
    )
    ridges = [1e-2, 1.0, 100.0]
    ours = GridSearchCV(model, {"ridge": ridges}).fit(kernel, targets)
    theirs = GridSearchCV(ridge, {"alpha": ridges}).fit(kernel, targets)
    assert ours.best_params_["ridge"] == theirs.best_params_["alpha"]
    np.testing.assert_allclose(ours.cv_results_["mean_test_score"], theirs.cv_results_["mean_test_score"], rtol=1e-8)
    classes = np.where(targets > 0, "up", "down")
    assert cross_val_score(KernelRegression(0.1, task="classification"), kernel, classes).mean() > 0.6


def test_parameters_by_name() -> None:
    model = KernelRegression(0.5, tol=1e-8)
    assert model.set_params(ridge=2.0) is model
    assert repr(model) == "KernelRegression(ridge=2.0, tol=1e-08)"
    with pytest.raises(ConfigError, match="no option 'alpha'"):
        model.set_params(alpha=1.0)
    with pytest.raises(TypeError, match=r"KernelRegression\(\) has no argument 'rigde'; the nearest is 'ridge'"):
        KernelRegression(rigde=1.0)
    with pytest.raises(ConfigError, match=r"ridge='1'; needed a number"):
        KernelRegression("1").fit(np.eye(3), np.zeros(3))
    for limit in ("8GiB", Budget(2**33)):
        assert KernelRegression(1.0, memory_limit=limit).fit(np.eye(3), np.ones(3)).result_.is_converged
    with pytest.raises(ConfigError, match="memory_limit='much'"):
        KernelRegression(1.0, memory_limit="much").fit(np.eye(3), np.ones(3))


@pytest.mark.parametrize("method", ["auto", "eigh"])
def test_singular_kernels_have_the_minimum_norm_solution(rng: np.random.Generator, method: str) -> None:
    kernel, _, _ = features(rng, size=11)
    targets = rng.standard_normal((30, 2))
    fitted = KernelRegression(method=method).fit(kernel, targets)
    expected = np.linalg.pinv(kernel, rcond=1e-10, hermitian=True) @ targets
    np.testing.assert_allclose(fitted.dual_coef_, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())
    assert fitted.result_.method == "eigh"
    assert fitted.result_.options["rank"] == 11
    assert "smallest norm" in fitted.result_.message
    left = np.linalg.norm(targets - kernel @ expected, axis=0) / np.linalg.norm(targets, axis=0)
    np.testing.assert_allclose(fitted.result_.residuals, left, rtol=1e-8)


def test_the_cut_off_is_that_of_storage(rng: np.random.Generator) -> None:
    """What float32 made of eigenvalues that are zero is not inverted."""
    kernel, _, _ = features(rng, size=11)
    targets = kernel @ rng.standard_normal(30)
    fitted = KernelRegression().fit(kernel.astype(np.float32), targets)
    assert fitted.result_.options["rank"] == 11
    expected = np.linalg.pinv(kernel, rcond=1e-10, hermitian=True) @ targets
    np.testing.assert_allclose(fitted.dual_coef_, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_interpolation_of_a_kernel_that_is_well_conditioned_needs_no_eigenpairs(rng: np.random.Generator) -> None:
    kernel, _, _ = features(rng)
    targets = rng.standard_normal(30)
    fitted = KernelRegression().fit(kernel, targets)
    assert fitted.result_.method == "cholesky"
    np.testing.assert_allclose(kernel @ fitted.dual_coef_, targets, atol=1e-9)


def test_what_did_not_converge_is_never_silent(rng: np.random.Generator) -> None:
    kernel, _, _ = features(rng)
    indefinite = kernel - 5.0 * np.eye(30)
    with pytest.warns(NotConvergedWarning, match="indefinite"):
        KernelRegression(method="eigh").fit(indefinite, rng.standard_normal(30))
    singular, _, _ = features(rng, size=5)
    with pytest.warns(NotConvergedWarning):
        fitted = KernelRegression(method="pcg").fit(singular, rng.standard_normal(30))
    assert not fitted.result_.is_converged
    assert np.isfinite(fitted.dual_coef_).all()


@pytest.mark.parametrize("kind", ["pntk", "ntk", "trace", "output:1"])
@pytest.mark.parametrize("targets", ["classes", "real"])
@pytest.mark.parametrize("centre", [None, "initial_outputs"])
def test_a_store_is_fitted_by_itself(tmp_path: Path, kind: str, targets: str, centre: str | None) -> None:
    store = make_store(tmp_path / "k.zarr", kind=kind, targets=targets)
    model = KernelRegression(0.05, ridge_scale="mean_diagonal", centre=centre).fit(store)
    kernel, test_kernel = store.train.to_numpy(), store.test_train.to_numpy()
    y = np.eye(NUM_OUTPUTS)[store.targets] if targets == "classes" else store.targets
    offset, test_offset = (store.outputs, store.test_outputs) if centre else (0.0, 0.0)
    goal = (y - offset).reshape(len(kernel), -1)
    ridge = KernelRidge(alpha=0.05 * kernel.diagonal().mean(), kernel="precomputed").fit(kernel, goal)
    expected = ridge.predict(test_kernel).reshape(NUM_TEST, NUM_OUTPUTS) + test_offset
    np.testing.assert_allclose(model.predict_outputs(store), expected, atol=1e-9)
    if targets == "classes":
        assert model.score(store) == np.mean(expected.argmax(axis=1) == store.test_targets)
    else:
        assert model.score(store) == pytest.approx(r2_score(store.test_targets, expected), rel=1e-9)
    initial = {} if centre is None else {"initial_outputs": store.outputs}
    of_arrays = KernelRegression(0.05, ridge_scale="mean_diagonal", centre=centre).fit(kernel, store.targets, **initial)
    test_initial = {} if centre is None else {"initial_outputs": store.test_outputs}
    np.testing.assert_allclose(of_arrays.predict_outputs(test_kernel, **test_initial), expected, atol=1e-9)


def test_full_kernel_keeps_a_column_for_a_class_that_is_missing(tmp_path: Path) -> None:
    store = make_store(tmp_path / "k.zarr", kind="ntk")
    labels = np.minimum(store.targets, 1)
    fitted = KernelRegression(0.1).fit(store.train, labels)
    np.testing.assert_array_equal(fitted.classes_, [0, 1, 2])
    assert fitted.predict_outputs(store).shape == (NUM_TEST, 3)
    with pytest.raises(ConfigError, match="2 classes"):
        KernelRegression(0.1).fit(store.train, np.where(labels, "a", "b"))


def test_wrong_input_is_named(rng: np.random.Generator, tmp_path: Path) -> None:
    kernel, test_kernel, _ = features(rng)
    y = rng.standard_normal(30)
    with pytest.raises(ConfigError, match="not fitted yet"):
        KernelRegression().predict(test_kernel)
    with pytest.raises(ConfigError, match="ridge=-1"):
        KernelRegression(-1.0).fit(kernel, y)
    with pytest.raises(ConfigError, match="method='svd'"):
        KernelRegression(method="svd").fit(kernel, y)
    with pytest.raises(ConfigError, match="29 samples"):
        KernelRegression().fit(kernel, y[:29])
    with pytest.raises(ConfigError, match="no initial_outputs of the train"):
        KernelRegression(centre="initial_outputs").fit(kernel, y)
    with pytest.raises(ConfigError, match="centre=None and given"):
        KernelRegression().fit(kernel, y, initial_outputs=y)
    with pytest.raises(NonFiniteError, match="targets"):
        KernelRegression().fit(kernel, np.full(30, np.nan))
    with pytest.raises(ConfigError, match="fit\\(store\\)"):
        KernelRegression().fit(kernel)
    fitted = KernelRegression(0.1).fit(kernel, np.arange(30) % 3)
    with pytest.raises(ConfigError, match=r"shape \(9, 29\)"):
        fitted.predict(test_kernel[:, 1:])
    with pytest.warns(UserWarning, match="9 test samples of classes that training does not have count as wrong"):
        assert fitted.score(test_kernel, np.full(9, 5)) == 0.0
    with pytest.raises(NonFiniteError, match="test kernel"):
        fitted.predict(np.full((2, 30), np.inf))
    store = make_store(tmp_path / "k.zarr", kind="diagonal")
    with pytest.raises(ConfigError, match=r"\.output\(k\)"):
        KernelRegression().fit(store)
    assert KernelRegression(0.1).fit(store.output(1)).predict(store.output(1)).shape == (NUM_TEST,)


def test_memory_that_does_not_hold_a_factor(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the kernel: λ = 0 and a ridge are solved by passes, and equal what LAPACK finds."""
    monkeypatch.setattr("ntkpipe.base.config.process_memory", lambda: 0)
    kernel, test_kernel, _ = features(rng, num_train=1000, size=400)
    kernel += np.eye(1000)
    targets = rng.standard_normal((1000, 2))
    limit = kernel.nbytes // 10
    for ridge in (0.0, 0.5):
        exact = KernelRegression(ridge, method="eigh").fit(kernel, targets)
        with pytest.raises(ResourceError):
            KernelRegression(ridge, method="eigh", memory_limit=limit).fit(kernel, targets)
        passes = KernelRegression(ridge, tol=1e-10, memory_limit=limit).fit(kernel, targets)
        assert passes.result_.method == "block_cg"
        np.testing.assert_allclose(passes.predict(test_kernel), exact.predict(test_kernel), atol=1e-8)
