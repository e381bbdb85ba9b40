"""Targets of a regression: class labels become one-hot columns, and a full NTK has a row for each output."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.errors import ConfigError, NonFiniteError

Task = Literal["auto", "classification", "regression"]
_TASKS = ("auto", "classification", "regression")


@dataclass(frozen=True)
class Labels:
    """Targets of samples."""

    matrix: NDArray[np.float64]  # shape (N, O), float64: one-hot for classes
    classes: NDArray[Any] | None  # labels in the order of columns, shape (O,); None for real targets
    codes: NDArray[np.int64] | None  # column of each sample's label, shape (N,); None for real targets
    is_flat: bool  # whether the targets were real and of shape (N,)

    def rows(self, width: int) -> NDArray[np.float64]:
        """Targets as right-hand sides of a kernel with ``width`` rows per sample; see :func:`as_rows`."""
        return as_rows(self.matrix, width)

    def accuracy(self, outputs: NDArray[np.float64]) -> float | None:
        """Fraction of samples whose largest output, of shape (N, O), is their class; None for real targets."""
        return None if self.codes is None else float(np.mean(outputs.argmax(axis=1) == self.codes))

    def loss(self, outputs: NDArray[np.float64]) -> float:
        """Mean squared error over samples and outputs."""
        return float(np.mean((outputs - self.matrix) ** 2))


def as_rows(matrix: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Reshape (N, O) to the rows of a kernel: (N·O, 1) if that has O rows per sample, unchanged if it has one."""
    rows = target_rows(matrix, width)
    if rows is None:
        raise ConfigError(
            f"targets of {matrix.shape[1]} columns for a kernel of {width} rows a sample; needed a column for each row "
            "of a sample, as a full NTK has an output for each"
        )
    return rows


def target_rows(matrix: NDArray[np.float64], width: int) -> NDArray[np.float64] | None:
    """Reshape as :func:`as_rows`, but return None if a full NTK has another number of outputs than targets."""
    if width == 1:
        return matrix
    return matrix.reshape(-1, 1) if matrix.shape[1] == width else None


def as_samples(rows: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Reverse :func:`as_rows`: reshape (N·O, 1) to (N, O)."""
    return rows if width == 1 else rows.reshape(-1, width)


def encode(
    targets: ArrayLike, *, num_outputs: int | None = None, classes: NDArray[Any] | None = None, task: Task = "auto"
) -> Labels:
    """Convert labels, of the given classes or of those found, or real targets to a matrix."""
    if task not in _TASKS:
        raise ConfigError(f"task={task!r}; needed one of {', '.join(map(repr, _TASKS))}")
    values = np.asarray(targets)
    if values.ndim not in {1, 2} or not values.size:
        raise ConfigError(f"targets of shape {values.shape}; needed (N,) or (N, O)")
    if classes is not None or (task != "regression" and _are_labels(values, task)):
        return _one_hot(values, _classes_of(values, num_outputs) if classes is None else classes)
    if values.dtype.kind not in "fiub":
        raise ConfigError(f"real targets of dtype {values.dtype}; needed real numbers, or labels of classes, (N,)")
    matrix = target_matrix(values, None)
    if not np.isfinite(matrix).all():
        raise NonFiniteError("targets hold NaN or infinity")
    return Labels(matrix, None, None, values.ndim == 1)


def _are_labels(values: NDArray[Any], task: Task) -> bool:
    if task == "classification":
        if values.ndim == 2:
            raise ConfigError(f"task='classification' and targets of shape {values.shape}; needed labels, shape (N,)")
        return True
    return values.ndim == 1 and values.dtype.kind in "iubUSO" and len(np.unique(values)) < max(2, len(values))


def _classes_of(values: NDArray[Any], num_outputs: int | None) -> NDArray[Any]:
    """Labels in the order of columns; integers from 0 may lack some of ``num_outputs`` classes."""
    classes = np.unique(values)
    if num_outputs is None or num_outputs == len(classes):
        return classes
    if values.dtype.kind in "iu" and classes[0] >= 0 and classes[-1] < num_outputs:
        return np.arange(num_outputs, dtype=values.dtype)
    shown = ", ".join(map(repr, classes[:5].tolist())) + (", …" if len(classes) > 5 else "")
    raise ConfigError(
        f"targets are labels of {len(classes)} classes ({shown}) for {num_outputs} outputs; needed a class for each, "
        f"integers from 0 to {num_outputs - 1}, or real targets of {num_outputs} columns"
    )


def _one_hot(values: NDArray[Any], classes: NDArray[Any]) -> Labels:
    if values.ndim == 2:
        raise ConfigError(f"targets of shape {values.shape} where labels of classes are needed, shape (N,)")
    column = {label: number for number, label in enumerate(classes.tolist())}
    codes = np.array([column.get(label, -1) for label in values.tolist()], np.int64)
    if (codes < 0).any():
        unknown = np.unique(values[codes < 0])[:5].tolist()
        raise ConfigError(f"labels {', '.join(map(repr, unknown))} are none of the {len(classes)} classes of training")
    return Labels(target_matrix(codes, len(classes)), classes, codes, False)


def num_classes_of(targets: NDArray[Any]) -> int | None:
    """Number of classes if targets are class numbers: integers from 0, fewer classes than samples."""
    is_class = targets.ndim == 1 and targets.dtype.kind in "iu" and 0 <= targets.min() <= targets.max() < len(targets)
    return int(targets.max()) + 1 if is_class else None


def target_matrix(targets: NDArray[Any], num_classes: int | None) -> NDArray[np.float64]:
    """Targets as (N, O): one-hot for class numbers, columns as they are for real targets."""
    if num_classes is not None:
        return np.asarray(np.eye(num_classes)[targets], np.float64)
    return targets.reshape(len(targets), -1).astype(np.float64)
