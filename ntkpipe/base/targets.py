"""Targets of samples, encoded in one way everywhere: labels of classes become columns, numbers stay what they are.

Integers, booleans, text and categoricals of shape (N,) are labels; every different one is a class, whatever the numbers
are, and becomes a one-hot column, in sorted order. Floats, and everything with columns, are real targets. That is
decided once, by the targets of the train samples; those of others are encoded as these were.
"""

import warnings
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.arrays import require_range
from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.base.given import as_array
from ntkpipe.base.paths import said

# `binary` is one column of -1 for the first of two classes and +1 for the second, in place of two one-hot columns.
Task = Literal["auto", "classification", "regression", "binary"]
Label = bool | int | float | str  # of a class, as results have it
# Floats that are all integers are taken for numbers, with a warning if there are as few different ones as this.
_MOST_CLASSES_OF_FLOATS = 100
# Of fewer samples each may well have a class of its own.
_FEWEST_DOUBTFUL = 20
# More classes than these are counted, 0 to C - 1 or 1 to C; ages, years and counts have gaps or begin elsewhere.
_MOST_UNCOUNTED = 10
_LEAST_DENSITY = 0.8  # share of the numbers up to the largest that is there, at least: a train set may lack some
_MISSING = {"NoneType", "NAType", "NaTType"}


@dataclass(frozen=True)
class Targets:
    """Targets of samples, encoded."""

    matrix: NDArray[np.float64]  # shape (N, c), float64
    classes: NDArray[Any] | None  # labels of classes, sorted: in the order of one-hot columns; None for real targets
    codes: NDArray[np.int64] | None  # number of each sample's class, shape (N,), -1 if training has none; or None
    is_flat: bool  # whether targets were real and of shape (N,)
    is_binary: bool = False  # whether the two classes share a column, of -1 and +1
    note: str = ""  # of test samples: what a message adds where no train sample has their class

    @property
    def words(self) -> str:
        """What the targets were taken for."""
        count = self.matrix.shape[1]
        if self.classes is None:
            return f"{count} real target{'s'[: count != 1]}"
        encoded = "as ±1" if self.is_binary else "one-hot"
        return f"{len(self.classes)} class{'es'[: 2 * (len(self.classes) != 1)]}, {encoded}"

    @property
    def fields(self) -> dict[str, Any]:
        """What a result says of them: see :class:`ntkpipe.solvers.result.OfTargets`."""
        classes = None if self.classes is None else tuple(self.classes.tolist())
        return {"targets": self.words, "classes": classes, "is_binary": self.is_binary}

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
            "of a sample, as a full NTK has an output for each, or labels of classes, as floats with "
            "task='classification'"
        )
    return matrix.reshape(-1, 1)


def as_samples(rows: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Reverse :func:`as_rows`: reshape (N·O, 1) to (N, O)."""
    return rows if width == 1 else rows.reshape(-1, width)


def encode(targets: ArrayLike, *, task: Task = "auto", num_outputs: int | None = None) -> Targets:
    """Encode the targets of train samples, shape (N,) or (N, c); raises ConfigError for what is neither kind.

    ``auto`` is as above; ``classification`` takes labels, also as floats or in a single column, and one-hot columns,
    whose classes are their numbers; ``binary`` the same, of two classes, and ``regression`` numbers, also integers.
    Where ``num_outputs`` columns are needed, integers from 0 may lack some of the classes.
    """
    values = _values(targets)
    if task != "regression" and _are_labels(values, task):
        codes = _of_one_hot(values)
        labels = values.reshape(-1) if codes is None else codes
        if labels.dtype.kind == "f":
            labels = labels.astype(np.int64)
        classes = _classes_of(labels if codes is None else np.arange(values.shape[1]), num_outputs, task)
        return _encoded(labels, classes, is_binary=task == "binary")
    return _real(values, warns=task == "auto")


def encode_test(targets: ArrayLike, train: Targets) -> Targets:
    """Encode the targets of test samples as those of the train samples were."""
    values = _values(targets)
    if train.classes is None:
        return _real_as(values, train)
    codes = _of_one_hot(values)
    if codes is not None and values.shape[1] == len(train.classes):
        labels = train.classes[codes]
    elif values.size == len(values):
        labels = values.reshape(-1)
        _require_alike(labels, train)
    else:
        raise ConfigError(
            f"test targets of shape {values.shape} where labels of classes are needed, shape (M,), or a one-hot column "
            f"for each of {len(train.classes)}, since train targets were taken as {train.words}"
        )
    found = _encoded(labels, train.classes, is_binary=train.is_binary)
    assert found.codes is not None
    unknown, note = int((found.codes < 0).sum()), ""
    if unknown:
        note = f"; {unknown} test samples of classes that training does not have count as wrong"
    if train.codes is not None and (lacking := int((~np.isin(found.codes, train.codes)).sum()) - unknown):
        note += f"; {lacking} test samples are of classes of which there is no train sample"
    return replace(found, note=note)


def as_values(targets: Any, name: str = "targets") -> NDArray[Any]:
    """Targets as an array of numbers or text, or one of objects that are the categories of a categorical.

    Objects that are all numbers become numbers. Raises ConfigError for other objects, NonFiniteError for missing ones.
    """
    values = as_array(name, targets)
    if values.dtype.kind in "ST":
        values = values.astype(np.str_ if values.dtype.kind == "S" else object)
    if values.dtype.kind == "U" and not hasattr(targets, "dtype"):
        # NumPy makes text of everything that is beside text in a list.
        objects = np.asarray(targets, object)
        values = values if all(isinstance(one, str) for one in objects.reshape(-1).tolist()) else objects
    if hasattr(getattr(targets, "dtype", None), "categories") and values.dtype.kind not in "biu":
        values = values.astype(object)
        _require_all(values)
        return values
    return _narrowed(values) if values.dtype.kind == "O" else values


def _narrowed(values: NDArray[Any]) -> NDArray[Any]:
    """Objects that are all text, or integers beyond int64, and that are all there."""
    flat = values.reshape(-1).tolist()
    there = [one for one in flat if not _is_missing(one)]
    if not any(all(isinstance(one, kind) for one in there) for kind in (str | bytes, Number)):
        names = ", ".join(sorted({type(one).__name__ for one in flat}))
        raise ConfigError(f"labels of several types, or none that is known ({names}); needed all integers, or all text")
    if len(there) < len(flat):
        _require_all(values)
    if any(isinstance(one, bytes) for one in flat):
        return np.array([one.decode() if isinstance(one, bytes) else one for one in flat]).reshape(values.shape)
    return values


def _is_missing(one: Any) -> bool:
    return type(one).__name__ in _MISSING or (isinstance(one, float | np.floating) and bool(np.isnan(one)))


def _require_all(values: NDArray[Any]) -> None:
    missing = [
        place for place, one in enumerate(values.reshape(len(values), -1).tolist()) if any(map(_is_missing, one))
    ]
    if missing:
        raise NonFiniteError(
            f"targets of {len(missing)} samples are missing (None, NaN or NA), the first of sample {missing[0]}; leave "
            "these samples out"
        )


def _values(targets: ArrayLike) -> NDArray[Any]:
    values = as_values(targets)
    if values.ndim not in {1, 2} or not values.size:
        raise ConfigError(f"targets of shape {values.shape}; needed (N,) or (N, O)")
    return values


def _are_labels(values: NDArray[Any], task: Task) -> bool:
    is_column = values.size == len(values)
    if task in {"classification", "binary"}:
        if is_column and (values.dtype.kind in "biuUO" or _are_integers(values)):
            return True
        if _of_one_hot(values) is None:
            how = "one-hot columns" if not is_column else "integers or text: other floats are no labels"
            raise ConfigError(
                f"task={task!r} and targets of shape {values.shape} and dtype {values.dtype}; needed labels, shape "
                f"(N,), or {how}"
            )
        return True
    if values.dtype.kind in "UO":
        return is_column
    return values.ndim == 1 and values.dtype.kind in "iub"


def _doubt(classes: NDArray[Any], size: int) -> None:
    """Say so where labels may as well be numbers: integers such as ages, years or counts, and text of any numbers."""
    count, least, most = len(classes), classes[0], classes[-1]
    what, otherwise = "texts", "convert them, with numpy.asarray(targets, float)"
    is_many, is_counted = size > _FEWEST_DOUBTFUL and 2 * count > size, True
    if not isinstance(least, str):
        what, otherwise = "integers", "give task='regression'"
        is_counted = least in {0, 1} and count > _LEAST_DENSITY * (int(most) + 1 - int(least))
    if not is_many and (count <= _MOST_UNCOUNTED or is_counted):
        return
    if is_many and count == size:
        raise ConfigError(
            f"{size} {what} as targets, all of them different: classes, or numbers? For classes give "
            f"task='classification', for numbers {otherwise}"
        )
    warnings.warn(
        f"{size} {what} as targets, from {least} to {most}, are taken as labels of {count} classes; if they are "
        f"numbers, {otherwise}, and if not, give task='classification'",
        stacklevel=4,
    )


def _are_integers(values: NDArray[Any]) -> bool:
    # Larger ones are no labels, and int64 may not hold them.
    is_small = values.dtype.kind in "biuf" and np.isfinite(values).all() and np.abs(values).max() < 2**53
    return bool(is_small and (values == np.round(values)).all())


def _of_one_hot(values: NDArray[Any]) -> NDArray[np.int64] | None:
    """The number of the column that is 1 where all others are 0; None of other values."""
    if values.ndim != 2 or values.shape[1] < 2 or values.dtype.kind not in "biuf":
        return None
    is_one = values == 1
    is_one_hot = (is_one | (values == 0)).all() and (is_one.sum(axis=1) == 1).all()
    return is_one.argmax(axis=1) if is_one_hot else None


def _require_alike(labels: NDArray[Any], train: Targets) -> None:
    """Refuse test labels that cannot be any of the train set's: text for numbers, numbers for text, fractions."""
    assert train.classes is not None
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise NonFiniteError("test targets hold NaN or infinity, which are labels of no class")
    are_text = [array.dtype.kind == "U" or isinstance(array.tolist()[0], str) for array in (labels, train.classes)]
    is_fraction = labels.dtype.kind == "f" and train.classes.dtype.kind in "biu" and not _are_integers(labels)
    if labels.dtype.kind not in "biufUO" or are_text[0] != are_text[1] or is_fraction:
        shown = ", ".join(map(repr, train.classes.tolist()[:5])) + (", …" if len(train.classes) > 5 else "")
        raise ConfigError(
            f"test targets of dtype {labels.dtype}, such as {labels.tolist()[0]!r}, and train targets that were taken "
            f"as {train.words} ({shown}); needed labels of the same type, or task='regression' at the fit"
        )


def _real_as(values: NDArray[Any], train: Targets) -> Targets:
    """Test targets of a predictor of numbers."""
    shown, needed = values.size // len(values), train.matrix.shape[1]
    if values.dtype.kind not in "biuf" or shown != needed:
        raise ConfigError(
            f"test targets have {shown} columns of dtype {values.dtype}, and train targets {needed}, taken as "
            f"{train.words}; they must match. For classes, give labels or one-hot columns with task='classification' "
            "at the fit"
        )
    return _real(values, warns=False)


def _real(values: NDArray[Any], *, warns: bool) -> Targets:
    if values.dtype.kind not in "fiub":
        raise ConfigError(f"real targets of dtype {values.dtype}; needed real numbers, or labels of classes, (N,)")
    matrix = values.reshape(len(values), -1).astype(np.float64)
    if not np.isfinite(matrix).all():
        first = int(np.flatnonzero(~np.isfinite(matrix).all(axis=1))[0])
        raise NonFiniteError(f"targets hold NaN or infinity, first in sample {first}; leave such samples out")
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
        if task == "auto" and labels.dtype.kind != "b":
            _doubt(classes, len(labels))
        return classes
    if labels.dtype.kind in "iu" and classes[0] >= 0 and classes[-1] < num_outputs:
        if classes[0]:
            warnings.warn(
                f"labels from {classes[0]} to {classes[-1]} for {num_outputs} outputs are taken as numbers of outputs, "
                "which count from 0; if these labels count from 1, give labels - 1",
                stacklevel=2,
            )
        return np.arange(num_outputs, dtype=labels.dtype)
    shown = ", ".join(map(repr, classes[:5].tolist())) + (", …" if len(classes) > 5 else "")
    others = f"real targets of {num_outputs} columns (task='regression')"
    if num_outputs == 1:
        others = "task='regression' for numbers, task='binary' for labels of two"
    raise ConfigError(
        f"targets are labels of {len(classes)} classes ({shown}) for {num_outputs} outputs; needed a class for each, "
        f"integers from 0 to {num_outputs - 1}, or {others}"
    )


def _encoded(labels: NDArray[Any], classes: NDArray[Any], *, is_binary: bool) -> Targets:
    number = {label: place for place, label in enumerate(classes.tolist())}
    codes = np.array([number.get(label, -1) for label in labels.tolist()], np.int64)
    if is_binary:
        matrix = np.where(codes < 0, 0.0, 2.0 * codes - 1.0)[:, None]
    else:
        matrix = np.eye(len(classes) + 1)[codes][:, :-1]  # a class that is unknown has no column
    return Targets(np.ascontiguousarray(matrix), classes, codes, False, is_binary)
