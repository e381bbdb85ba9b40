"""Stored kernels in scikit-learn equal explicit features: the kernel of a linear model is that of its inputs."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.cluster import SpectralClustering
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA, KernelPCA
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, WhiteKernel
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.svm import SVC

import ntkpipe
from ntkpipe.base.errors import ConfigError
from ntkpipe.store.kernel_store import KernelStore

N, M = 90, 40
PLAIN = DotProduct(sigma_0=0.0, sigma_0_bounds="fixed")


class Digits(NamedTuple):
    """Digits as features, and the stored kernel of a linear function of them."""

    features: NDArray[np.float64]
    labels: NDArray[np.int64]
    test_features: NDArray[np.float64]
    test_labels: NDArray[np.int64]
    store: KernelStore


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    features, labels = load_digits(n_class=3, return_X_y=True)
    features = features[: N + M] / 16
    store = ntkpipe.compute_kernel(
        torch.nn.Linear(64, 1, bias=False, dtype=torch.float64).eval(),
        features[:N],
        targets=labels[:N],
        test_inputs=features[N:],
        test_targets=labels[N : N + M],
        store=tmp_path_factory.mktemp("digits") / "k.zarr",
        compute_dtype="float64",
        tile=32,
        progress=False,
    )
    return Digits(features[:N], labels[:N], features[N:], labels[N : N + M], store)


class Wide(NamedTuple):
    """Jacobians of a network as features, one row a (sample, output) pair, and its full NTK."""

    rows: NDArray[np.float64]
    targets: NDArray[np.float64]
    test_rows: NDArray[np.float64]
    store: KernelStore


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 12), torch.nn.Tanh(), torch.nn.Linear(12, 2)).double().eval()
    inputs, targets = rng.standard_normal((26, 4)), rng.standard_normal((20, 2))
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, torch.from_numpy(inputs)))(parameters)
    features = torch.cat([part.flatten(2) for part in jacobian.values()], dim=2).reshape(52, -1).numpy()
    store = ntkpipe.compute_kernel(
        model,
        inputs[:20],
        test_inputs=inputs[20:],
        store=tmp_path_factory.mktemp("wide") / "k.zarr",
        kind="ntk",
        compute_dtype="float64",
        tile=8,
        progress=False,
    )
    return Wide(features[:40], targets, features[40:], store)


def test_support_vectors_take_stored_kernels_as_they_are(digits: Digits) -> None:
    plain = SVC(kernel="linear", C=0.1, tol=1e-8).fit(digits.features, digits.labels)
    ours = SVC(kernel="precomputed", C=0.1, tol=1e-8).fit(digits.store.train, digits.labels)
    np.testing.assert_array_equal(ours.support_, plain.support_)
    np.testing.assert_allclose(
        ours.decision_function(digits.store.test_train), plain.decision_function(digits.test_features), atol=1e-8
    )


def test_cross_validation_cuts_both_axes(digits: Digits) -> None:
    folds = StratifiedKFold(3)
    search = {"C": [1e-4, 1e-2, 1.0]}
    ours = GridSearchCV(SVC(kernel="precomputed"), search, cv=folds).fit(digits.store.train, digits.labels)
    plain = GridSearchCV(SVC(kernel="linear"), search, cv=folds).fit(digits.features, digits.labels)
    scores = plain.cv_results_["mean_test_score"]
    assert scores.min() < scores.max()
    np.testing.assert_array_equal(ours.cv_results_["mean_test_score"], scores)
    assert ours.score(digits.store.test_train, digits.test_labels) == plain.score(
        digits.test_features, digits.test_labels
    )
    np.testing.assert_array_equal(
        cross_val_score(SVC(kernel="precomputed", C=1e-2), digits.store.train, digits.labels, cv=folds),
        cross_val_score(SVC(kernel="linear", C=1e-2), digits.features, digits.labels, cv=folds),
    )


def test_principal_components_are_those_of_the_features(digits: Digits) -> None:
    plain = PCA(3, svd_solver="full").fit(digits.features)
    ours = KernelPCA(3, kernel="precomputed").fit(digits.store.train)
    signs = np.sign(np.sum(ours.transform(digits.store.train) * plain.transform(digits.features), axis=0))
    np.testing.assert_allclose(
        signs * ours.transform(digits.store.test_train), plain.transform(digits.test_features), atol=1e-8
    )


def cosines(kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """As the guide has it."""
    norms = np.sqrt(np.diagonal(kernel))
    return np.clip(kernel / np.outer(norms, norms), -1.0, 1.0)


@pytest.mark.parametrize("affinity", ["precomputed", "precomputed_nearest_neighbors"])
def test_clusters_of_affinities_and_distances_made_of_a_kernel(digits: Digits, affinity: str) -> None:
    near = cosines(digits.store.train.to_numpy())
    given = np.maximum(near, 0.0) if affinity == "precomputed" else np.sqrt(2 - 2 * near)
    options: dict[str, Any] = {"n_clusters": 3, "affinity": affinity, "n_neighbors": 20, "random_state": 0}
    found = SpectralClustering(**options).fit_predict(given)
    assert adjusted_rand_score(digits.labels, found) > 0.7
    unit = digits.features / np.linalg.norm(digits.features, axis=1, keepdims=True)
    if affinity == "precomputed":
        plain = SpectralClustering(3, affinity="linear", random_state=0).fit_predict(unit)
    else:
        plain = SpectralClustering(3, affinity="nearest_neighbors", n_neighbors=20, random_state=0).fit_predict(unit)
    assert adjusted_rand_score(plain, found) == 1.0


def test_regression_equals_that_of_the_features(digits: Digits) -> None:
    kernel = ntkpipe.PrecomputedKernel.from_store(digits.store)
    targets = np.eye(3)[digits.labels]
    ours = GaussianProcessRegressor(kernel, alpha=0.3).fit(kernel.train_rows, targets)
    plain = GaussianProcessRegressor(PLAIN, alpha=0.3).fit(digits.features, targets)
    found, expected = (
        ours.predict(kernel.test_rows, return_std=True),
        plain.predict(digits.test_features, return_std=True),
    )
    np.testing.assert_allclose(found[0], expected[0], atol=1e-8)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-8)
    assert ours.log_marginal_likelihood_value_ == pytest.approx(plain.log_marginal_likelihood_value_, rel=1e-10)
    both = np.concatenate([kernel.test_rows[3:5], kernel.train_rows[[7, 0]]])
    inputs = np.concatenate([digits.test_features[3:5], digits.features[[7, 0]]])
    np.testing.assert_allclose(ours.predict(both), plain.predict(inputs), atol=1e-8)


def test_scale_and_noise_are_learned_around_it(digits: Digits) -> None:
    kernel = ntkpipe.PrecomputedKernel(digits.store.train.to_numpy(), digits.store.test_train.to_numpy())
    targets = digits.labels - digits.labels.mean()
    scale, noise = ConstantKernel(0.5, (1e-4, 1e4)), WhiteKernel(0.5, (1e-6, 1e2))
    ours = GaussianProcessRegressor(scale * kernel + noise).fit(kernel.train_rows, targets)
    plain = GaussianProcessRegressor(scale * PLAIN + noise).fit(digits.features, targets)
    np.testing.assert_allclose(ours.kernel_.theta, plain.kernel_.theta, rtol=1e-5)
    np.testing.assert_allclose(ours.predict(kernel.test_rows), plain.predict(digits.test_features), atol=1e-5)
    assert ours.kernel_.k1.k2.train is kernel.train  # clones share it


def test_classification_equals_that_of_the_features(digits: Digits) -> None:
    kernel = ntkpipe.PrecomputedKernel.from_store(digits.store)
    ours = GaussianProcessClassifier(kernel, optimizer=None).fit(kernel.train_rows, digits.labels)
    plain = GaussianProcessClassifier(PLAIN, optimizer=None).fit(digits.features, digits.labels)
    expected = plain.predict_proba(digits.test_features)
    np.testing.assert_allclose(ours.predict_proba(kernel.test_rows), expected, atol=1e-8)
    assert np.mean(expected.argmax(axis=1) == digits.test_labels) > 0.9


def test_cross_validation_of_processes_cuts_row_numbers(digits: Digits) -> None:
    kernel = ntkpipe.PrecomputedKernel.from_store(digits.store)
    targets = digits.labels.astype(np.float64)
    ours = cross_val_score(GaussianProcessRegressor(kernel, alpha=0.3), kernel.train_rows, targets, cv=3)
    plain = cross_val_score(GaussianProcessRegressor(PLAIN, alpha=0.3), digits.features, targets, cv=3)
    np.testing.assert_allclose(ours, plain, rtol=1e-8)


def test_a_full_ntk_has_a_row_for_each_output(wide: Wide) -> None:
    kernel = ntkpipe.PrecomputedKernel.from_store(wide.store)
    assert (kernel.train_rows.shape, kernel.test_rows.shape) == ((40, 1), (12, 1))
    ours = GaussianProcessRegressor(kernel, alpha=0.1).fit(kernel.train_rows, wide.targets.ravel())
    plain = GaussianProcessRegressor(PLAIN, alpha=0.1).fit(wide.rows, wide.targets.ravel())
    for part, total in zip(
        ours.predict(kernel.test_rows, return_std=True), plain.predict(wide.test_rows, return_std=True), strict=True
    ):
        np.testing.assert_allclose(part, total, atol=1e-8)
    # The outputs of one test sample have a covariance; two samples' is not stored.
    one, expected = kernel.test_rows[4:6], wide.test_rows[4:6]
    np.testing.assert_allclose(
        ours.predict(one, return_cov=True)[1], plain.predict(expected, return_cov=True)[1], atol=1e-8
    )
    with pytest.raises(ConfigError, match="ask for return_std=True rather than return_cov=True"):
        ours.predict(kernel.test_rows[3:5], return_cov=True)


def test_what_it_is_among_kernels(digits: Digits) -> None:
    kernel = ntkpipe.PrecomputedKernel.from_store(digits.store)
    assert repr(kernel) == f"PrecomputedKernel({N} train rows, {M} test rows)"
    assert clone(kernel) == kernel
    assert clone(kernel) is not kernel
    assert kernel != ntkpipe.PrecomputedKernel(kernel.train)
    assert kernel != PLAIN
    assert not kernel.is_stationary()
    values, gradient = kernel(kernel.train_rows[:3], eval_gradient=True)
    assert (values.shape, gradient.shape) == ((3, 3), (3, 3, 0))
    np.testing.assert_array_equal(kernel.diag(kernel.train_rows), digits.store.train.diagonal())
    np.testing.assert_array_equal(
        kernel(kernel.train_rows[:3], kernel.test_rows), digits.store.test_train.to_numpy()[:, :3].T
    )


def test_values_are_float64_whatever_is_stored(digits: Digits) -> None:
    kernel = ntkpipe.PrecomputedKernel(digits.store.train.to_numpy().astype(np.float32))
    assert kernel(kernel.train_rows[:2]).dtype == np.float64
    assert kernel.diag(kernel.train_rows[:2]).dtype == np.float64


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (np.arange(3), "shape \\(3,\\)"),
        (np.zeros((3, 2)), "as one column"),
        (np.array([[0.5]]), "whole row numbers below 130"),
        (np.array([[-1]]), "from -1 to -1"),
        (np.array([[N + M]]), "not to be scaled"),
        (np.array([[np.nan]]), "whole row numbers"),
        (np.array([["a"]]), "dtype <U1"),
    ],
)
def test_inputs_that_are_no_row_numbers_are_refused(digits: Digits, inputs: NDArray[Any], words: str) -> None:
    kernel = ntkpipe.PrecomputedKernel.from_store(digits.store)
    for call in (kernel, kernel.diag):
        with pytest.raises(ConfigError, match=words):
            call(inputs)


def test_what_was_not_given_is_named(digits: Digits) -> None:
    train, test_train = digits.store.train.to_numpy(), digits.store.test_train.to_numpy()
    with pytest.raises(ConfigError, match="has no test rows; give test_train"):
        ntkpipe.PrecomputedKernel(train).test_rows  # noqa: B018
    kernel = ntkpipe.PrecomputedKernel(train, test_train)
    with pytest.raises(ConfigError, match="has no test_diagonal"):
        kernel.diag(kernel.test_rows)
    with pytest.raises(ConfigError, match=r"shape \(3,\); needed \(40,\)"):
        ntkpipe.PrecomputedKernel(train, test_train, np.ones(3)).diag(kernel.test_rows)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ntkpipe, "PrecomputedKernel")  # which is kept once it was imported
    monkeypatch.delitem(sys.modules, "ntkpipe.learning.regression.sklearn_gp", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn.gaussian_process.kernels", None)
    with pytest.raises(ConfigError, match=r"PrecomputedKernel needs .*pip install 'ntkpipe\[scikit-learn\]'"):
        ntkpipe.PrecomputedKernel  # noqa: B018


def test_a_store_without_test_samples_has_train_rows_alone(tmp_path: Path) -> None:
    store = ntkpipe.compute_kernel(
        torch.nn.Linear(2, 1).eval(), np.eye(2), store=tmp_path / "k.zarr", kind="ntk", progress=False
    )
    assert repr(ntkpipe.PrecomputedKernel.from_store(store)) == "PrecomputedKernel(2 train rows)"
