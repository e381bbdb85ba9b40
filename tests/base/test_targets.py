"""What targets are taken for, whatever container and dtype they come in; test targets are taken for the same."""

import warnings
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from regressions import Categorical

from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.base.targets import encode, encode_test

CODES = np.arange(24) % 3
REAL = np.linspace(-1.0, 2.0, 24)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (REAL.astype(object), "1 real target"),
        (np.stack([REAL, REAL], axis=1).astype(object), "2 real targets"),
        ((np.arange(24) % 3).astype(object), "3 classes, one-hot"),
        (np.array([b"a", b"b"] * 12), "2 classes, one-hot"),
        (["a", "b"] * 12, "2 classes, one-hot"),
        (torch.arange(24) % 4, "4 classes, one-hot"),
        ((np.arange(24) % 2).astype(np.uint8), "2 classes, one-hot"),
        (range(3), "3 classes, one-hot"),
        (np.array(["ab", "c"] * 12, np.dtypes.StringDType()), "2 classes, one-hot"),
        (np.array(["a", "b"] * 12)[:, None], "2 classes, one-hot"),
        ([True, False] * 12, "2 classes, one-hot"),
        ([b"a", b"b"] * 12, "2 classes, one-hot"),
        ([Decimal(1) / 4, Fraction(1, 3)] * 12, "1 real target"),
        ([2**70, -(2**70)] * 12, "2 classes, one-hot"),
        (torch.linspace(0, 1, 24, requires_grad=True), "1 real target"),
        (torch.linspace(0, 1, 24).bfloat16(), "1 real target"),
        (np.ma.array(CODES, mask=False), "3 classes, one-hot"),
    ],
)
def test_containers_and_dtypes_do_not_change_what_targets_are(targets: Any, words: str) -> None:
    assert encode(targets).words == words


@pytest.mark.parametrize(
    ("targets", "task", "words"),
    [
        ([[1.0], [1.0, 2.0]], "auto", "targets: a list that NumPy does not take"),
        (torch.zeros(3, device="meta"), "auto", "targets: a Tensor that NumPy does not take"),
        (np.array([1, "a", None], object), "auto", "labels of several types"),
        ([1, "a", 2], "auto", r"labels of several types.*\(int, str\)"),
        ([datetime(2020, 1, 1), datetime(2021, 1, 1)], "auto", r"none that is known \(datetime\)"),
        (np.array(["2020-01-01", "2021-01-01"], "M8[D]"), "auto", "dtype datetime64"),
        (CODES * 1j, "auto", "dtype complex128"),
        (np.array(["a", "b"]), "regression", "dtype <U1"),
        (REAL, "classification", "other floats are no labels"),
        (np.stack([REAL, REAL], axis=1), "classification", "one-hot columns"),
        (np.zeros((5, 1, 1)), "auto", r"shape \(5, 1, 1\)"),
        (np.where(REAL > 0, 2.0**63, -(2.0**63)), "classification", "needed labels"),
        (np.arange(30), "auto", "all of them different"),
        (np.arange(30) % 3, "binary", "3 classes; needed labels of two"),
    ],
)
def test_what_is_neither_is_refused_with_words(targets: Any, task: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        encode(targets, task=task)


@pytest.mark.parametrize("values", [CODES + 0.5, CODES + 1.0, CODES + 1, np.array(list("abc"), object)[CODES]])
def test_categories_are_classes_also_where_they_are_floats(values: Any) -> None:
    found = encode(Categorical(values))
    assert found.words == "3 classes, one-hot"
    np.testing.assert_array_equal(found.matrix, np.eye(3)[CODES])
    assert encode_test(Categorical(values[1:3]), found).codes.tolist() == [1, 2]


@pytest.mark.parametrize(
    "targets",
    [
        ["a", None, "b"],
        ["a", float("nan"), "b"],
        np.array(["a", np.nan, "b"], object),
        [1, None, 2],
        np.array([1.5, None, 2.5], object),
        [[1.0, 2.0], [None, 1.0], [0.0, 1.0]],
        [1.0, np.nan, 2.0],
        np.ma.array([1, 2, 3], mask=[0, 1, 0]),
        Categorical(np.array([0.5, np.nan, 1.5])),
        Categorical(np.array(["a", None, "b"], object)),
    ],
)
@pytest.mark.parametrize("task", ["auto", "regression"])
def test_what_is_missing_is_refused_and_never_a_class(targets: Any, task: Any) -> None:
    with pytest.raises((NonFiniteError, ConfigError), match=r"sample 1|1 entries are masked"):
        encode(targets, task=task)


def test_pandas_and_xarray() -> None:
    pandas = pytest.importorskip("pandas")
    text = np.array(list("abc"))[CODES]
    for one in (
        pandas.Series(text),
        pandas.Series(text).astype("category"),
        pandas.Series(CODES + 1, dtype="Int64"),
        pandas.Series(CODES + 0.5).astype("category"),
        pandas.cut(pandas.Series(CODES), 3),
        pandas.DataFrame({"y": text}),
        pytest.importorskip("xarray").DataArray(CODES - 1),
    ):
        found = encode(one)
        np.testing.assert_array_equal(found.matrix, np.eye(3)[CODES])
        np.testing.assert_array_equal(encode_test(one[:2], found).codes, CODES[:2])
    for values, dtype in ((["a", None], None), ([1, None], "Int64"), (["a", None], "category")):
        with pytest.raises(NonFiniteError, match="sample 1"):
            encode(pandas.Series(values, dtype=dtype))
    assert encode(pandas.DataFrame({"y": REAL, "z": REAL})).words == "2 real targets"


def drawn(low: int, high: int, size: int = 200) -> Any:
    return np.random.default_rng(0).integers(low, high, size)


@pytest.mark.parametrize(
    "integers",
    [
        pytest.param(drawn(18, 56), id="ages"),
        pytest.param(drawn(1990, 2021, 100), id="years"),
        pytest.param(np.random.default_rng(0).poisson(30, 200), id="counts"),
        pytest.param(drawn(0, 200, 60), id="many of few"),
        pytest.param(drawn(-20, 21), id="temperatures"),
        pytest.param(drawn(18, 90, 15), id="ages of few"),
        pytest.param(100 * drawn(10, 40), id="prices"),
        pytest.param(drawn(18, 56).astype(np.uint8), id="bytes"),
        pytest.param(drawn(18, 56).tolist(), id="list"),
    ],
)
def test_integers_that_may_be_numbers_are_doubted_by_name(integers: Any) -> None:
    with pytest.warns(UserWarning, match=r"integers as targets, .* of \d+ classes.*task='regression'"):
        found = encode(integers)
    assert found.words == f"{len(np.unique(integers))} classes, one-hot"
    for task, words in (("regression", "1 real target"), ("classification", found.words)):
        assert encode(integers, task=task).words == words


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(np.arange(500) % 100, id="100 from 0"),
        pytest.param(np.arange(500) % 100 + 1, id="100 from 1"),
        pytest.param(np.delete(np.arange(500) % 100, [7, 107, 207, 307, 407]), id="one of 100 is missing"),
        pytest.param(np.array([2, 5, 9])[CODES], id="three anyhow"),
        pytest.param(2 * (CODES > 0) - 1, id="signs"),
        pytest.param(np.arange(24) % 10, id="digits of few"),
        pytest.param(np.arange(3), id="few shots"),
        pytest.param(np.array([0, 1]), id="two samples"),
        pytest.param(np.array([2018, 2019, 2020])[CODES], id="three years"),
        pytest.param(np.full(30, 7), id="one class"),
    ],
)
def test_labels_are_not_doubted(labels: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = encode(labels)
    np.testing.assert_array_equal(found.matrix, labels[:, None] == np.unique(labels))


@pytest.mark.parametrize(
    ("labels", "task", "words"),
    [
        (drawn(18, 56), "auto", "38 classes.*task='regression'"),
        (CODES % 2, "auto", "task='binary'"),
        (np.array(["a", "b"])[CODES % 2], "auto", "task='binary'"),
    ],
)
def test_classes_for_one_output_are_refused_with_the_option(labels: Any, task: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        encode(labels, task=task, num_outputs=1)


def test_labels_that_lack_the_first_class_say_what_they_are_taken_for() -> None:
    with pytest.warns(UserWarning, match="count from 0; if these labels count from 1, give labels - 1"):
        found = encode([1, 2, 1], num_outputs=3)
    assert found.classes.tolist() == [0, 1, 2]
    for clear in ([1, 2, 3], [0, 2, 0], [0, 1], [2, 5, 9], ["a", "b", "c"]):
        assert len(encode(clear, num_outputs=3).classes) == 3
    for wrong in ([1, 3], [-1, 1], ["a", "b"]):
        with pytest.raises(ConfigError, match=r"classes .* for 3 outputs"):
            encode(wrong, num_outputs=3)


TRAINS = {
    "from 1": (CODES + 1, [1, 2, 1], [0, 1, 0]),
    "two anyhow": (np.array([2, 5, 9])[CODES], [9, 5], [2, 1]),
    "negative": (CODES - 2, [-1, 0, -1], [1, 2, 1]),
    "text": (np.array(list("abc"))[CODES], ["c", "b"], [2, 1]),
    "bool": (CODES > 0, [True, True], [1, 1]),
    "all differ": (CODES, [2, 0, 1], [2, 0, 1]),
    "two samples": (CODES, [0, 1], [0, 1]),
    "one": (CODES, [2], [2]),
    "a column": (CODES, [[2], [1]], [2, 1]),
    "floats for integers": (CODES + 1, [3.0, 1.0], [2, 0]),
    "one-hot columns for labels": (CODES + 1, np.eye(3, dtype=np.float32)[[2, 0]], [2, 0]),
    "unknown": (CODES, [1, 7], [1, -1]),
}


@pytest.mark.parametrize("name", TRAINS)
def test_the_train_set_says_what_test_labels_are(name: str) -> None:
    labels, test, codes = TRAINS[name]
    train = encode(labels)
    found = encode_test(test, train)
    assert found.codes.tolist() == codes
    rows = np.concatenate([np.eye(len(train.classes)), np.zeros((1, len(train.classes)))])
    np.testing.assert_array_equal(found.matrix, rows[codes])
    assert found.words == train.words
    note = "; 1 test samples of classes that training does not have count as wrong"
    assert found.note == (note if name == "unknown" else "")


@pytest.mark.parametrize("test", [[0, 1, 2], [3, 3, 3], [0, 1], [True, False], [1.0, 2.0]])
def test_numbers_stay_numbers(test: list[Any]) -> None:
    train = encode(drawn(0, 9), task="regression")
    np.testing.assert_array_equal(encode_test(test, train).matrix[:, 0], np.asarray(test, float))


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (CODES, ["0", "1"], "'0'.*3 classes, one-hot.*same type"),
        (np.array(list("abc"))[CODES], [0, 1], "3 classes, one-hot .'a'"),
        (CODES, [0.5, 1.0], "0.5.*task='regression' at the fit"),
        (CODES, np.zeros((2, 4)), "a one-hot column for each of 3"),
        (CODES, np.array([[0.5, 0.5, 0.0]]), "a one-hot column for each of 3"),
        (CODES, np.array([[1, 1, 0]]), "a one-hot column for each of 3"),
        (CODES, np.eye(2)[[0, 1]], "a one-hot column for each of 3"),
        (REAL, ["a", "b"], "taken as 1 real target"),
        (np.eye(3)[CODES], [0, 1], "taken as 3 real targets.*task='classification'"),
    ],
)
def test_test_targets_of_another_kind_are_refused(train: Any, test: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        encode_test(test, encode(train))


def test_nan_is_no_test_label() -> None:
    with pytest.raises(NonFiniteError, match="labels of no class"):
        encode_test([0.0, np.nan], encode(CODES))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, bool])
def test_one_hot_columns_are_numbers_unless_they_are_called_classes(dtype: Any) -> None:
    columns = np.eye(3)[CODES].astype(dtype)
    real, classes = encode(columns), encode(columns, task="classification")
    assert (real.words, classes.words) == ("3 real targets", "3 classes, one-hot")
    np.testing.assert_array_equal(real.matrix, classes.matrix)
    np.testing.assert_array_equal(classes.codes, CODES)
    assert encode_test(columns[1:2], classes).codes.tolist() == [1]
    # A column without a sample is a class all the same.
    assert encode(columns[:2], task="classification").classes.tolist() == [0, 1, 2]


def test_text_that_may_be_numbers() -> None:
    """As a file is read that has text for its numbers."""
    numbers = np.random.default_rng(1).standard_normal(40)
    with pytest.raises(ConfigError, match=r"40 texts as targets, all of them different.*numpy.asarray"):
        encode(numbers.astype(str))
    np.testing.assert_array_equal(encode(np.asarray(numbers.astype(str), float)).matrix[:, 0], numbers)
    assert len(encode(numbers.astype(str), task="classification").classes) == 40
    with pytest.warns(UserWarning, match="40 texts as targets, from .* 30 classes; if they are numbers, convert them"):
        encode([f"{number % 30}" for number in range(40)])
    for clear in (np.array(list("abc"))[np.arange(40) % 3], [f"class {number}" for number in range(15)]):
        encode(clear)
