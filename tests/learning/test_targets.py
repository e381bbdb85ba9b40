"""Targets mean the same to everything that learns from them or judges it: columns, accuracy and loss by plain numpy."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from regressions import features

import ntkpipe

RIDGE = 0.3
CODES, TEST_CODES = np.arange(30) % 3, np.array([0, 1, 2, 2, 1, 0, 0, 2, 1])
SIGNS, TEST_SIGNS = 2 * (np.arange(30) % 2) - 1, np.array([1, -1, 1, -1, -1, 1, 1, 1, -1])


@dataclass(frozen=True)
class Case:
    """Targets, and what they are, written out."""

    train: Any
    test: Any
    matrix: NDArray[np.float64]
    test_matrix: NDArray[np.float64]
    codes: NDArray[np.int64] | None  # of test samples, -1 for classes that are unknown
    words: str
    task: str = "auto"
    note: str = ""


def one_hot(codes: NDArray[Any], count: int) -> NDArray[np.float64]:
    return (codes[:, None] == np.arange(count)).astype(float)


def of_classes(train: Any, test: Any) -> Case:
    return Case(train, test, one_hot(CODES, 3), one_hot(TEST_CODES, 3), TEST_CODES, "3 classes, one-hot")


REAL, TEST_REAL = np.random.default_rng(3).standard_normal((30, 2)), np.random.default_rng(4).standard_normal((9, 2))
WORDS = np.array(["ape", "bee", "cat"])
NEW = np.where(np.arange(9) < 4, 7, TEST_CODES)
KNOWN = np.where(NEW == 7, -1, NEW)
TWO, TEST_TWO = (SIGNS > 0).astype(int), (TEST_SIGNS > 0).astype(int)
BOTH = one_hot(TWO, 2), one_hot(TEST_TWO, 2), TEST_TWO, "2 classes, one-hot"
REALS = None, "1 real target", "regression"
CASES = {
    "labels from 0": of_classes(CODES, TEST_CODES),
    "labels from 1": of_classes(CODES + 1, TEST_CODES + 1),
    "strings": of_classes(WORDS[CODES], WORDS[TEST_CODES]),
    "signs": Case(SIGNS, TEST_SIGNS, *BOTH),
    "booleans": Case(SIGNS > 0, TEST_SIGNS > 0, *BOTH),
    "signs as one column": Case(
        SIGNS, TEST_SIGNS, SIGNS[:, None] * 1.0, TEST_SIGNS[:, None] * 1.0, TEST_TWO, "2 classes, as ±1", "binary"
    ),
    "floats": Case(REAL, TEST_REAL, REAL, TEST_REAL, None, "2 real targets"),
    "one column of floats": Case(REAL[:, :1], TEST_REAL[:, :1], REAL[:, :1], TEST_REAL[:, :1], None, "1 real target"),
    "integers as numbers": Case(CODES, TEST_CODES, CODES[:, None] * 1.0, TEST_CODES[:, None] * 1.0, *REALS),
    "a class of the test set alone": Case(
        CODES, NEW, one_hot(CODES, 3), one_hot(KNOWN, 3), KNOWN, "3 classes, one-hot", "auto", "4 test samples of"
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def kernels(rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    return features(rng)


def expected(case: Case, kernels: Any) -> tuple[NDArray[np.float64], NDArray[np.float64], float, float | None]:
    """Coefficients, predictions, loss and accuracy on the test set."""
    coefficients = np.linalg.solve(kernels[0] + RIDGE * np.eye(30), case.matrix)
    outputs = kernels[1] @ coefficients
    loss = float(np.mean((outputs - case.test_matrix) ** 2))
    if case.codes is None:
        return coefficients, outputs, loss, None
    predicted = (outputs[:, 0] > 0).astype(int) if outputs.shape[1] == 1 else outputs.argmax(axis=1)
    return coefficients, outputs, loss, float(np.mean(predicted == case.codes))


def test_solve(case: Case, kernels: Any) -> None:
    found = ntkpipe.solve(kernels[0], case.train, ridge=RIDGE, task=case.task)
    coefficients = expected(case, kernels)[0]
    np.testing.assert_allclose(found.coefficients.reshape(coefficients.shape), coefficients, atol=1e-8)
    assert found.targets == case.words


def test_kernel_regression(case: Case, kernels: Any) -> None:
    model = ntkpipe.KernelRegression(RIDGE, task=case.task, tol=1e-10).fit(kernels[0], case.train)
    coefficients, outputs, _, accuracy = expected(case, kernels)
    np.testing.assert_allclose(model.dual_coef_.reshape(coefficients.shape), coefficients, atol=1e-8)
    assert model.targets_ == case.words
    if accuracy is None:
        np.testing.assert_allclose(model.predict(kernels[1]).reshape(outputs.shape), outputs, atol=1e-8)
    else:
        assert model.score(kernels[1], case.test) == accuracy
        assert np.mean(model.predict(kernels[1]) == case.test) == accuracy


@pytest.mark.parametrize("method", ["eigh", "cholesky", "streamed"])
def test_ridge_path(case: Case, kernels: Any, method: str) -> None:
    test = {"test_kernel": kernels[1], "test_targets": case.test}
    how = {"ridges": [RIDGE], "task": case.task, "method": method, "tol": 1e-11}
    found = ntkpipe.ridge_path(kernels[0], case.train, **how, **test)
    _, _, loss, accuracy = expected(case, kernels)
    assert found.test_loss[0] == pytest.approx(loss, rel=1e-7)
    assert found.test_accuracy[0] == pytest.approx(np.nan if accuracy is None else accuracy, nan_ok=True)
    left_out = np.empty_like(case.matrix)
    for sample in range(30):
        rest = np.delete(np.arange(30), sample)
        inner = kernels[0][np.ix_(rest, rest)] + RIDGE * np.eye(29)
        left_out[sample] = kernels[0][sample, rest] @ np.linalg.solve(inner, case.matrix[rest])
    if accuracy is not None:
        shared = case.matrix.shape[1] == 1
        right = (left_out > 0) == (case.matrix > 0) if shared else left_out.argmax(axis=1) == case.matrix.argmax(axis=1)
        assert found.leave_one_out_accuracy[0] == np.mean(right)
    assert found.targets == case.words
    assert case.words in str(found)
    assert case.note in found.message


@pytest.mark.parametrize("method", ["cholesky", "streamed"])
def test_gaussian_process_and_calibration(case: Case, kernels: Any, method: str) -> None:
    kernel, test_kernel, diagonal = kernels
    how = {"ridge": RIDGE, "task": case.task, "method": method, "tol": 1e-11}
    posterior = ntkpipe.gaussian_process(kernel, case.train, test_kernel=test_kernel, test_diagonal=diagonal, **how)
    _, outputs, _, accuracy = expected(case, kernels)
    np.testing.assert_allclose(posterior.mean, outputs, atol=1e-7)
    restored = type(posterior).from_saved({**posterior.to_json(), **posterior.arrays()})
    for one in (posterior, restored):
        found = ntkpipe.calibration(one, case.test)
        squares = (case.test_matrix - outputs) ** 2 / posterior.predictive_variance
        assert found.mean_standardized_squared_residual == pytest.approx(squares.mean(), rel=1e-6)
        assert found.targets == posterior.targets == case.words
        assert case.note in found.message
        if accuracy is None:
            assert not len(found.counts)
        else:
            assert found.mean_accuracy == pytest.approx(accuracy)
            assert accuracy == 0 or 1 / max(2, case.matrix.shape[1]) < found.mean_confidence <= 1


@pytest.mark.parametrize("method", ["exact", "streamed"])
def test_alignment(case: Case, kernels: Any, method: str) -> None:
    found = ntkpipe.alignment(kernels[0], case.train, task=case.task, method=method, k=5)
    assert found.num_outputs == case.matrix.shape[1]
    ideal = case.matrix @ case.matrix.T
    cosine = np.sum(kernels[0] * ideal) / (np.linalg.norm(kernels[0]) * np.linalg.norm(ideal))
    assert found.alignment == pytest.approx(cosine, rel=1e-10)
    assert found.targets == case.words


@pytest.mark.parametrize("method", ["exact", "streamed"])
def test_generalisation(case: Case, kernels: Any, method: str) -> None:
    test = {"test_kernel": kernels[1], "test_targets": case.test}
    how = {"ridges": [RIDGE], "task": case.task, "method": method, "tol": 1e-11}
    found = ntkpipe.generalisation(kernels[0], case.train, **how, **test)
    assert found.num_outputs == case.matrix.shape[1]
    assert found.test_loss[0] == pytest.approx(expected(case, kernels)[2], rel=1e-7)
    assert found.targets == case.words
    assert case.note in found.message


def test_learning_curve_and_comparison(case: Case, kernels: Any) -> None:
    kernel, test_kernel, _ = kernels
    curve = ntkpipe.learning_curve(kernel, case.train, sizes=[10], ridges=[RIDGE], task=case.task)
    written = ntkpipe.learning_curve(kernel, case.matrix, sizes=[10], ridges=[RIDGE], task="regression")
    assert curve.population_loss[0, 0] == pytest.approx(written.population_loss[0, 0], rel=1e-12)
    targets = {"targets": case.train, "test_targets": case.test, "task": case.task}
    found = ntkpipe.compare_kernels(
        kernel, kernel, k=2, ridge=RIDGE, test_kernels=(test_kernel, test_kernel), **targets
    )
    _, _, loss, accuracy = expected(case, kernels)
    assert found.test_loss_a == pytest.approx(loss, rel=1e-7)
    assert found.test_accuracy_b == accuracy
    assert curve.targets == found.targets == case.words
    assert case.note in str(found)


def test_influence_names_the_classes(case: Case, kernels: Any) -> None:
    model = ntkpipe.KernelRegression(RIDGE, task=case.task).fit(kernels[0], case.train)
    found = ntkpipe.influence(model, kernels[1])
    assert found.targets == case.words
    if case.codes is None:
        assert found.classes is None
    else:
        assert found.classes == tuple(np.unique(case.train).tolist())
        np.testing.assert_array_equal(np.array(found.classes)[found.predicted], model.predict(kernels[1]))


def test_binary_alignment_is_that_with_y_y_transposed(kernels: Any) -> None:
    ideal = np.outer(SIGNS, SIGNS)
    by_hand = np.sum(kernels[0] * ideal) / np.linalg.norm(kernels[0]) / np.linalg.norm(ideal)
    assert ntkpipe.alignment(kernels[0], SIGNS, task="binary").alignment == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("shape", [(30,), (30, 1)])
def test_floats_that_look_like_classes_warn_once(kernels: Any, shape: tuple[int, ...]) -> None:
    targets = CODES.astype(float).reshape(shape)
    test = {"test_kernel": kernels[1], "test_targets": TEST_CODES.astype(float).reshape(9, *shape[1:])}
    for fit in (
        lambda: ntkpipe.KernelRegression(RIDGE, method="pcg").fit(kernels[0], targets),
        lambda: ntkpipe.ridge_path(kernels[0], targets, method="streamed", **test),
        lambda: ntkpipe.generalisation(kernels[0], targets, method="streamed", ridges=[RIDGE], **test),
        lambda: ntkpipe.alignment(kernels[0], targets),
        lambda: ntkpipe.learning_curve(kernels[0], targets),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit()
        words = [str(one.message) for one in caught if "different integers" in str(one.message)]
        assert len(words) == 1
        assert "task='classification'" in words[0]
