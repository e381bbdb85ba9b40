"""Targets as right-hand sides: classes become one-hot columns, and a full kernel has a row for each output."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def num_classes_of(targets: NDArray[Any]) -> int | None:
    """Number of classes if targets are class numbers: integers from 0, fewer classes than samples."""
    is_class = targets.ndim == 1 and targets.dtype.kind in "iu" and 0 <= targets.min() <= targets.max() < len(targets)
    return int(targets.max()) + 1 if is_class else None


def target_matrix(targets: NDArray[Any], num_classes: int | None) -> NDArray[np.float64]:
    """Targets as (n, c): one-hot for classes."""
    if num_classes is not None:
        return np.asarray(np.eye(num_classes)[targets], np.float64)
    return targets.reshape(len(targets), -1).astype(np.float64)


def target_rows(matrix: NDArray[np.float64], width: int) -> NDArray[np.float64] | None:
    """Targets in the kernel's rows; none if a full NTK has another number of outputs than targets."""
    if width == 1:
        return matrix
    return matrix.reshape(-1, 1) if matrix.shape[1] == width else None
