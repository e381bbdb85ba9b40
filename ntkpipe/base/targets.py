"""Targets of samples, encoded in one way everywhere: labels of classes become columns, numbers stay what they are.

Integers, booleans and strings of shape (N,) are labels; every different one is a class, whatever the numbers are, and
becomes a one-hot column, in sorted order. Floats, and everything with columns, are real targets.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.arrays import require_range
from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.base.paths import said

# `binary` is one column of -1 for the first of two classes and +1 for the second, in place of two one-hot columns.
Task = Literal["auto", "classification", "regression", "binary"]
# Floats that are all integers are taken for numbers, with a warning if there are as few different ones as this.
_MOST_CLASSES_OF_FLOATS = 100
# Of fewer samples each may well have a class of its own.
_FEWEST_DOUBTFUL = 20
_NUMBERS = (bool, int, float, np.number, np.bool_)


@dataclass(frozen=True)
class Targets:
    """Targets of samples, encoded."""

    matrix: NDArray[np.float64]  # shape (N, c), float64
    classes: NDArray[Any] | None  # labels of classes, sorted: in the order of one-hot columns; None for real targets
    codes: NDArray[np.int64] | None  # number of each sample's class, shape (N,), -1 if training has none; or None
    is_flat: bool  # whether targets were real and of shape (N,)
    is_binary: bool = False  # whether the two classes share a column, of -1 and +1

    @property
    def words(self) -> str:
        """What the targets were taken for."""
        count = self.matrix.shape[1]
        if self.classes is None:
            return f"{count} real target{'s'[: count != 1]}"
        encoded = "as ±1" if self.is_binary else "one-hot"
        return f"{len(self.classes)} class{'es'[: 2 * (len(self.classes) != 1)]}, {encoded}"

    def rows(self, width: int) -> NDArray[np.float64]:
        """Targets as right-hand sides of a kernel with ``width`` rows per sample; see :func:`as_rows`."""
        return as_rows(self.matrix, width)

    def predicted(self, outputs: NDArray[np.float64]) -> NDArray[np.int64]:
        """Number of the class that outputs of shape (M, c) predict: of the largest, or by the sign of a shared one."""
        return (outputs[:, 0] > 0).astype(np.int64) if self.is_binary else outputs.argmax(axis=1)

    def accuracy(self, outputs: NDArray[np.float64]) -> float | None:
        """Share of samples whose class is the predicted one; None for real targets. Unknown classes are wrong."""
        return None if self.codes is None else float(np.mean(self.predicted(outputs) == self.codes))

    def loss(self, outputs: NDArray[np.float64]) -> float:
        """Mean squared error over samples and outputs."""
        return float(np.mean((outputs - self.matrix) ** 2))


def as_rows(matrix: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Reshape (N, O) to the rows of a kernel: (N·O, 1) if that has O rows per sample, unchanged if it has one."""
    if width == 1:
        return matrix
    if matrix.shape[1] != width:
        raise ConfigError(
            f"targets of {matrix.shape[1]} columns for a kernel of {width} rows a sample; needed a column for each row "
            "of a sample, as a full NTK has an output for each"
        )
    return matrix.reshape(-1, 1)


def as_samples(rows: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Reverse :func:`as_rows`: reshape (N·O, 1) to (N, O)."""
    return rows if width == 1 else rows.reshape(-1, width)


def encode(targets: ArrayLike, *, task: Task = "auto", num_outputs: int | None = None) -> Targets:
    """Encode the targets of train samples, shape (N,) or (N, c); raises ConfigError for what is neither kind.

    ``auto`` is as above; ``classification`` takes labels, also as floats or in a single column, ``binary`` the same, of
    two classes, and ``regression`` numbers, also integers. Where ``num_outputs`` columns are needed, integers from 0
    may lack some of the classes.
    """
    values = _values(targets)
    if task != "regression" and _are_labels(values, task):
        labels = values.reshape(-1)
        if labels.dtype.kind == "f":
            labels = labels.astype(np.int64)
        return _encoded(labels, _classes_of(labels, num_outputs, task), is_binary=task == "binary")
    return _real(values, warns=task == "auto")


def encode_test(targets: ArrayLike, train: Targets) -> Targets:
    """Encode the targets of test samples as those of the train samples were."""
    values = _values(targets)
    if train.classes is None:
        found = _real(values, warns=False)
        if found.matrix.shape[1] != train.matrix.shape[1]:
            shown, needed = found.matrix.shape[1], train.matrix.shape[1]
            raise ConfigError(f"test targets have {shown} columns, and train targets {needed}; they must match")
        return found
    if values.size != len(values):
        raise ConfigError(f"test targets of shape {values.shape} where labels of classes are needed, shape (M,)")
    return _encoded(values.reshape(-1), train.classes, is_binary=train.is_binary)


def note_on_unknown(test: Targets) -> str:
    """What a message adds where the test set has classes that training does not have; else nothing."""
    count = 0 if test.codes is None else int((test.codes < 0).sum())
    if not count:
        return ""
    return f"; {count} test samples of classes that training does not have count as wrong"


def as_values(targets: ArrayLike) -> NDArray[Any]:
    """Targets as an array: of objects that are all numbers one of numbers, of bytes one of text."""
    try:
        values = np.asarray(targets)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"targets that are no array ({said(error)}); needed numbers or labels, (N,) or (N, O)"
        ) from None
    if values.dtype.kind == "S":
        return values.astype(np.str_)
    if values.dtype.kind == "O" and all(isinstance(one, _NUMBERS) for one in values.reshape(-1).tolist()):
        narrow = np.array(values.tolist(), None if values.ndim == 1 else np.float64)
        return narrow if narrow.shape == values.shape else values
    return values


def _values(targets: ArrayLike) -> NDArray[Any]:
    values = as_values(targets)
    if values.ndim not in {1, 2} or not values.size:
        raise ConfigError(f"targets of shape {values.shape}; needed (N,) or (N, O)")
    return values


def _are_labels(values: NDArray[Any], task: Task) -> bool:
    is_column = values.size == len(values)
    if task in {"classification", "binary"}:
        if not is_column or (values.dtype.kind == "f" and not _are_integers(values)):
            raise ConfigError(f"task={task!r} and targets of shape {values.shape}; needed labels, shape (N,)")
        return True
    if values.ndim != 1 or values.dtype.kind not in "iubUSO":
        return False
    if values.dtype.kind in "iu" and len(values) > _FEWEST_DOUBTFUL and len(np.unique(values)) == len(values):
        raise ConfigError(
            f"{len(values)} integers as targets, all of them different: classes, or numbers? Give "
            "task='classification' or task='regression'"
        )
    return True


def _are_integers(values: NDArray[Any]) -> bool:
    # Larger ones are no labels, and int64 may not hold them.
    is_small = np.isfinite(values).all() and np.abs(values).max() < 2**53
    return bool(is_small and (values == np.round(values)).all())


def _real(values: NDArray[Any], *, warns: bool) -> Targets:
    if values.dtype.kind not in "fiub":
        raise ConfigError(f"real targets of dtype {values.dtype}; needed real numbers, or labels of classes, (N,)")
    matrix = values.reshape(len(values), -1).astype(np.float64)
    if not np.isfinite(matrix).all():
        raise NonFiniteError("targets hold NaN or infinity")
    require_range("the largest target", float(np.abs(matrix).max(initial=0.0)))
    found = Targets(matrix, None, None, values.ndim == 1)
    if warns and matrix.shape[1] == 1 and len(matrix) > 2 and _are_integers(matrix):
        count = len(np.unique(matrix))
        if 1 < count <= min(_MOST_CLASSES_OF_FLOATS, len(matrix) // 2):
            warnings.warn(
                f"targets of dtype {values.dtype} and shape {values.shape} are {count} different integers, and are "
                "taken as one real target; for classes give integers of shape (N,), or task='classification'",
                stacklevel=2,
            )
    return found


def _classes_of(labels: NDArray[Any], num_outputs: int | None, task: Task) -> NDArray[Any]:
    """Labels in the order of columns; integers from 0 may lack some of ``num_outputs`` classes."""
    try:
        classes = np.unique(labels)
    except TypeError as error:
        raise ConfigError(f"labels of several types ({said(error)}); needed all integers, or all text") from None
    if task == "binary":
        if len(classes) != 2:
            raise ConfigError(f"task='binary' and {len(classes)} classes; needed labels of two")
        return classes
    if num_outputs is None or num_outputs == len(classes):
        return classes
    if labels.dtype.kind in "iu" and classes[0] >= 0 and classes[-1] < num_outputs:
        return np.arange(num_outputs, dtype=labels.dtype)
    shown = ", ".join(map(repr, classes[:5].tolist())) + (", …" if len(classes) > 5 else "")
    raise ConfigError(
        f"targets are labels of {len(classes)} classes ({shown}) for {num_outputs} outputs; needed a class for each, "
        f"integers from 0 to {num_outputs - 1}, or real targets of {num_outputs} columns"
    )


def _encoded(labels: NDArray[Any], classes: NDArray[Any], *, is_binary: bool) -> Targets:
    number = {label: place for place, label in enumerate(classes.tolist())}
    codes = np.array([number.get(label, -1) for label in labels.tolist()], np.int64)
    if is_binary:
        matrix = np.where(codes < 0, 0.0, 2.0 * codes - 1.0)[:, None]
    else:
        matrix = np.eye(len(classes) + 1)[codes][:, :-1]  # a class that is unknown has no column
    return Targets(np.ascontiguousarray(matrix), classes, codes, False, is_binary)
