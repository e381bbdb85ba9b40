"""Targets mean the same to everything that learns from them or judges it: columns, accuracy and loss by plain numpy."""

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from regressions import Categorical, features

import ntkpipe
from ntkpipe.base.errors import ConfigError

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
    labels: Any = None  # of test samples, and of the classes, where these are not what is written in the targets
    classes: tuple[Any, ...] | None = None

    @property
    def test_labels(self) -> Any:
        return self.test if self.labels is None else self.labels

    @property
    def known_classes(self) -> tuple[Any, ...] | None:
        return self.classes or (None if self.codes is None else tuple(np.unique(self.train).tolist()))


def one_hot(codes: NDArray[Any], count: int) -> NDArray[np.float64]:
    return (codes[:, None] == np.arange(count)).astype(float)


def of_classes(train: Any, test: Any, codes: Any = None, **more: Any) -> Case:
    codes = TEST_CODES if codes is None else codes
    return Case(train, test, one_hot(CODES, 3), one_hot(codes, 3), codes, "3 classes, one-hot", **more)


REAL, TEST_REAL = np.random.default_rng(3).standard_normal((30, 2)), np.random.default_rng(4).standard_normal((9, 2))
WORDS = np.array(["ape", "bee", "cat"])
ANY, SOME, FIRST = np.array([2, 5, 9]), np.where(TEST_CODES == 0, 1, TEST_CODES), np.array([2, 0, 1] + 6 * [0])
NEW = np.where(np.arange(9) < 4, 7, TEST_CODES)
KNOWN = np.where(NEW == 7, -1, NEW)
TWO, TEST_TWO = (SIGNS > 0).astype(int), (TEST_SIGNS > 0).astype(int)
BOTH = one_hot(TWO, 2), one_hot(TEST_TWO, 2), TEST_TWO, "2 classes, one-hot"
REALS = None, "1 real target", "regression"
CASES = {
    "labels from 0": of_classes(CODES, TEST_CODES),
    "labels from 1": of_classes(CODES + 1, TEST_CODES + 1),
    "labels from 1, two of three tested": of_classes(CODES + 1, SOME + 1, SOME),
    "any labels, two of three tested": of_classes(ANY[CODES], ANY[SOME], SOME),
    "negative labels, two of three tested": of_classes(CODES - 3, SOME - 3, SOME),
    "strings, two of three tested": of_classes(WORDS[CODES], WORDS[SOME], SOME),
    "one class tested": of_classes(CODES + 1, np.full(9, 3), np.full(9, 2)),
    "all that are tested differ": of_classes(CODES + 1, np.array([3, 1, 2, 1, 1, 1, 1, 1, 1]), FIRST),
    "labels as floats": of_classes(CODES + 1.0, SOME + 1.0, SOME, task="classification"),
    "categories that are floats": of_classes(
        Categorical(CODES + 0.5), Categorical(SOME + 0.5), SOME, labels=SOME + 0.5, classes=(0.5, 1.5, 2.5)
    ),
    "labels as one-hot columns": of_classes(
        np.eye(3, dtype=np.float32)[CODES], np.eye(3)[SOME], SOME, task="classification", labels=SOME, classes=(0, 1, 2)
    ),
    "lists": of_classes((CODES + 1).tolist(), (SOME + 1).tolist(), SOME),
    "strings": of_classes(WORDS[CODES], WORDS[TEST_CODES]),
    "signs": Case(SIGNS, TEST_SIGNS, *BOTH),
    "booleans": Case(SIGNS > 0, TEST_SIGNS > 0, *BOTH),
    "signs as one column": Case(
        SIGNS, TEST_SIGNS, SIGNS[:, None] * 1.0, TEST_SIGNS[:, None] * 1.0, TEST_TWO, "2 classes, as ±1", "binary"
    ),
    "signs as one column, one of them tested": Case(
        SIGNS, np.ones(9, int), SIGNS[:, None] * 1.0, np.ones((9, 1)), np.ones(9, int), "2 classes, as ±1", "binary"
    ),
    "0 and 1 as one column": Case(
        TWO, np.zeros(9, int), SIGNS[:, None] * 1.0, -np.ones((9, 1)), np.zeros(9, int), "2 classes, as ±1", "binary"
    ),
    "booleans, one of them tested": Case(
        SIGNS > 0, np.ones(9, bool), BOTH[0], one_hot(np.ones(9, int), 2), np.ones(9, int), "2 classes, one-hot"
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
        unknown = set(case.test_labels) - set(case.known_classes or case.test_labels)
        with pytest.warns(match="count as wrong") if unknown else nullcontext():
            assert model.score(kernels[1], case.test) == accuracy
        assert np.mean(model.predict(kernels[1]) == case.test_labels) == accuracy
    assert (model.result_.targets, model.result_.classes) == (case.words, case.known_classes)


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
        assert found.classes == case.known_classes
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


def full(rng: np.random.Generator, num_test: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """A full NTK of 12 train samples and three outputs: train, test × train, and the blocks of test samples."""
    phi = rng.standard_normal((36 + 3 * num_test, 60)) / np.sqrt(1.0 + np.arange(60))
    kernel = phi @ phi.T
    tests = kernel[36:, 36:].reshape(num_test, 3, num_test, 3)
    return kernel[:36, :36], kernel[36:, :36], tests[np.arange(num_test), :, np.arange(num_test)]


FEW = np.arange(12) % 3
FULL = {  # labels of train and of test samples, the classes, and what a message says of test samples
    "from 0": (FEW, [2, 1, 1, 2], (0, 1, 2), ""),
    "from 1": (FEW + 1, [1, 2, 2, 1], (1, 2, 3), ""),
    "any": (ANY[FEW], [9, 5, 5, 9], (2, 5, 9), ""),
    "negative": (FEW - 1, [-1, -1, 0, 0], (-1, 0, 1), ""),
    "strings": (WORDS[FEW], ["bee", "cat", "bee", "cat"], ("ape", "bee", "cat"), ""),
    "the last is missing": (FEW % 2, [0, 2, 2, 1], (0, 1, 2), "2 test samples are of classes of which there is no"),
    "the middle is missing": (FEW % 2 * 2, [0, 2, 2, 1], (0, 1, 2), "1 test samples are of classes of which there is"),
    "unknown": (FEW, [0, 1, 3, 3], (0, 1, 2), "2 test samples of classes that training does not have count as wrong"),
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_ntk_has_an_output_for_each_class(name: str, rng: np.random.Generator) -> None:
    labels, test, classes, note = FULL[name]
    kernel, test_kernel, blocks = full(rng, len(test))
    columns = np.array([classes.index(label) for label in np.asarray(labels).tolist()])
    coefficients = np.linalg.solve(kernel + RIDGE * np.eye(36), one_hot(columns, 3).reshape(-1))
    outputs = (test_kernel @ coefficients).reshape(-1, 3)
    wanted = np.array([classes.index(label) if label in classes else -1 for label in test])
    accuracy, loss = np.mean(outputs.argmax(axis=1) == wanted), np.mean((outputs - one_hot(wanted, 3)) ** 2)
    how: dict[str, Any] = {"ridge": RIDGE, "test_kernel": test_kernel}
    posterior = ntkpipe.gaussian_process(kernel, labels, test_diagonal=blocks, **how)
    judged = ntkpipe.calibration(posterior, test)
    path = ntkpipe.ridge_path(kernel, labels, ridges=[RIDGE], test_kernel=test_kernel, test_targets=test)
    model = ntkpipe.KernelRegression(RIDGE, tol=1e-12).fit(kernel, labels)
    solution = ntkpipe.solve(kernel, labels, ridge=RIDGE, tol=1e-12)
    np.testing.assert_allclose(posterior.mean, outputs, atol=1e-10)
    np.testing.assert_allclose(solution.coefficients, coefficients, atol=1e-10)
    with pytest.warns(match=note) if note else nullcontext():
        assert judged.mean_accuracy == path.test_accuracy[0] == model.score(test_kernel, test) == accuracy
    assert path.test_loss[0] == pytest.approx(loss, rel=1e-10)
    np.testing.assert_array_equal(model.predict(test_kernel), np.array(classes)[outputs.argmax(axis=1)])
    for found in (posterior, judged, path, model.result_, solution):
        assert (found.classes, found.targets) == (classes, "3 classes, one-hot")
    assert note in path.message
    if "of which" not in note:  # a posterior knows classes, and not how many samples they had
        assert note in judged.message


def test_what_is_not_said_of_a_posterior_is_not_read_from_the_test_set(kernels: Any) -> None:
    options = {"ridge": RIDGE, "test_kernel": kernels[1], "test_diagonal": kernels[2]}
    named = ntkpipe.gaussian_process(kernels[0], CODES + 1, **options)
    old = replace(named, classes=None, targets="")
    columns = ntkpipe.gaussian_process(kernels[0], np.eye(3)[CODES], **options)
    right = ntkpipe.calibration(named, SOME + 1)
    assert right.mean_accuracy == np.mean(named.mean.argmax(axis=1) == SOME)
    for posterior in (old, columns):
        for test in (SOME + 1, SOME, np.full(9, 2), WORDS[SOME]):
            with pytest.raises(ConfigError, match="give the labels in the order of the outputs as classes="):
                ntkpipe.calibration(posterior, test)
        found = ntkpipe.calibration(posterior, SOME + 1, classes=[1, 2, 3])
        assert found.mean_accuracy == right.mean_accuracy
        assert found.expected_calibration_error == right.expected_calibration_error
    for classes in ([1, 2], [1, 2, 2], [[1, 2, 3]]):
        with pytest.raises(ConfigError, match=r"classes=.*for 3 outputs; needed another label for each"):
            ntkpipe.calibration(old, SOME + 1, classes=classes)
    # In the order of the outputs, whatever that is.
    swapped = replace(old, mean=old.mean[:, ::-1].copy())
    assert ntkpipe.calibration(swapped, SOME + 1, classes=[3, 2, 1]).mean_accuracy == right.mean_accuracy
    with pytest.raises(ConfigError, match=r"task='regression' for a posterior of 3 classes, one-hot.*at the fit"):
        ntkpipe.calibration(named, SOME + 1, task="regression")


def test_numbers_are_judged_as_numbers_however_few_they_are(kernels: Any) -> None:
    ages = np.random.default_rng(5).integers(18, 56, 30)
    options = {"ridge": RIDGE, "test_kernel": kernels[1][:2], "test_diagonal": kernels[2][:2], "task": "regression"}
    posterior = ntkpipe.gaussian_process(kernels[0], ages, **options)
    mean = kernels[1][:2] @ np.linalg.solve(kernels[0] + RIDGE * np.eye(30), ages)
    for test in ([0, 1], [40, 40], [18, 55]):
        found = ntkpipe.calibration(posterior, test)
        squares = (np.array(test) - mean) ** 2 / posterior.predictive_variance[:, 0]
        assert found.mean_standardized_squared_residual == pytest.approx(squares.mean(), rel=1e-8)
        assert (found.targets, found.classes) == ("1 real target", None)


def test_results_say_how_to_have_targets_taken_for_something_else(kernels: Any) -> None:
    kernel = kernels[0]
    for task, others in (("auto", "task='regression' takes numbers"), ("classification", "")):
        for found in (
            ntkpipe.solve(kernel, CODES, ridge=RIDGE, task=task),
            ntkpipe.solve_path(kernel, CODES, [RIDGE], task=task),
            ntkpipe.dynamics(kernel, CODES, times=[1.0], task=task),
            ntkpipe.ridge_path(kernel, CODES, ridges=[RIDGE], task=task),
            ntkpipe.alignment(kernel, CODES, task=task),
            ntkpipe.learning_curve(kernel, CODES, sizes=[10], ridges=[RIDGE], task=task),
            ntkpipe.gaussian_process(kernel, CODES, ridge=RIDGE, task=task),
            ntkpipe.KernelRegression(RIDGE, task=task).fit(kernel, CODES).result_,
            ntkpipe.influence(ntkpipe.KernelRegression(RIDGE, task=task).fit(kernel, CODES), kernels[1]),
        ):
            assert (found.targets, found.classes) == ("3 classes, one-hot", (0, 1, 2))
            assert ("3 classes, one-hot" in str(found), others in str(found)) == (True, True)
            assert ("task=" in str(found)) == (task == "auto")
            restored = type(found).from_saved({**found.to_json(), **found.arrays()})
            assert (restored.classes, restored.is_binary) == (found.classes, False)
    assert "task='classification' takes labels" in str(ntkpipe.solve(kernel, REAL, ridge=RIDGE))


def test_a_full_ntk_without_samples_of_the_first_class_says_how_labels_are_counted(rng: np.random.Generator) -> None:
    kernel, test_kernel, _ = full(rng, 4)
    labels = FEW % 2 + 1
    coefficients = np.linalg.solve(kernel + RIDGE * np.eye(36), one_hot(labels, 3).reshape(-1))
    for fit in (
        lambda: ntkpipe.solve(kernel, labels, ridge=RIDGE, tol=1e-12).coefficients,
        lambda: ntkpipe.KernelRegression(RIDGE, tol=1e-12).fit(kernel, labels).dual_coef_,
    ):
        with pytest.warns(
            UserWarning, match="from 1 to 2 for 3 outputs.*if these labels count from 1, give labels - 1"
        ):
            np.testing.assert_allclose(fit(), coefficients, atol=1e-10)
    with pytest.raises(ConfigError, match=r"labels of 2 classes \(1, 3\) for 3 outputs"):
        ntkpipe.KernelRegression(RIDGE).fit(kernel, 2 * labels - 1)
    for floats in (FEW * 1.0, labels * 1.0):
        with pytest.warns(UserWarning, match="different integers"), pytest.raises(ConfigError, match="task='class"):
            ntkpipe.KernelRegression(RIDGE).fit(kernel, floats)
    np.testing.assert_array_equal(
        ntkpipe.KernelRegression(RIDGE, task="classification").fit(kernel, FEW * 1.0).predict(test_kernel),
        ntkpipe.KernelRegression(RIDGE).fit(kernel, FEW).predict(test_kernel),
    )


def test_other_targets_than_were_counted_keep_their_classes(kernels: Any) -> None:
    kernel, test_kernel, _ = kernels
    flow = ntkpipe.dynamics(kernel, ANY[CODES], times=[2.0, np.inf], tol=1e-10)
    outputs = flow.predict(test_kernel)[-1]
    expected = test_kernel @ np.linalg.solve(kernel, one_hot(CODES, 3))
    np.testing.assert_array_equal(np.array(flow.classes)[outputs.argmax(axis=1)], ANY[expected.argmax(axis=1)])
    kinds = {"targets": WORDS[CODES], "test_targets": WORDS[SOME], "test_kernels": (test_kernel, test_kernel)}
    compared = ntkpipe.compare_kernels(kernel, kernel, k=2, ridge=RIDGE, **kinds)
    assert compared.classes == ("ape", "bee", "cat")
    assert "task='regression' takes numbers" in str(compared)
    # A subset of the samples may lack a class: columns are those of all of them.
    sizes = {"sizes": [3], "ridges": [RIDGE], "num_subsets": 2}
    curve = ntkpipe.learning_curve(kernel, ANY[CODES], **sizes)
    written = ntkpipe.learning_curve(kernel, one_hot(CODES, 3), **sizes)
    np.testing.assert_allclose(curve.left_out_loss, written.left_out_loss, rtol=1e-12)
    assert curve.classes == (2, 5, 9)


@pytest.mark.parametrize("binary", [False, True])
def test_scores_of_folds_are_those_of_dense_regressions(binary: bool, rng: np.random.Generator) -> None:
    """A fold may lack a class: those of the fit count, and not those of the samples that are scored."""
    selection = pytest.importorskip("sklearn.model_selection")
    kernel, _, _ = features(rng)
    labels = np.sort(SIGNS) if binary else np.sort(CODES) + 4
    splits = list(selection.KFold(5).split(kernel))
    model = ntkpipe.KernelRegression(RIDGE, task="classification")
    expected = []
    for train, test in splits:
        known = np.unique(labels[train])
        columns = (labels[train, None] == known).astype(float)
        inner = kernel[np.ix_(train, train)] + RIDGE * np.eye(len(train))
        outputs = kernel[np.ix_(test, train)] @ np.linalg.solve(inner, columns)
        expected.append(np.mean(known[outputs.argmax(axis=1)] == labels[test]))
    np.testing.assert_array_equal(selection.cross_val_score(model, kernel, labels, cv=splits), expected)
