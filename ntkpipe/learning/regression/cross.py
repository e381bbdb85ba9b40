"""Kernels of test samples with train samples: any rectangle, a part at a time."""

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.base.targets import as_samples, encode_test
from ntkpipe.learning.regression.sources import TrainTargets
from ntkpipe.store.kernel import Kernel

# Size of a part in float64.
_BYTES_AT_ONCE = 2**24


class CrossKernel:
    """A test × train kernel that is read in parts, one of which is in memory at a time."""

    def __init__(self, matrix: Any, num_columns: int, width: int) -> None:
        self._matrix = matrix if isinstance(matrix, Kernel) or hasattr(matrix, "shape") else np.asarray(matrix)
        shape = tuple(self._matrix.shape)
        if len(shape) != 2 or shape[1] != num_columns or not shape[0] or shape[0] % width:
            samples = f", {width} rows a sample" if width > 1 else ""
            raise ConfigError(
                f"a test kernel of shape {shape}; needed (test rows, {num_columns}), a column for each row of the "
                f"train kernel{samples}"
            )
        self.num_rows = shape[0]
        self.num_samples = shape[0] // width
        self._num_columns = num_columns
        self._width = width

    def times(self, block: FloatArray) -> FloatArray:
        """``K_test @ block`` in float64, block (N·S, c); one read of the whole."""
        found = np.zeros((self.num_rows, block.shape[1]))
        for rows, columns, part in self._parts():
            found[rows] += _finite(part, rows) @ block[columns]
        return found

    def sample_blocks(self, most_samples: int = sys.maxsize) -> Iterator[tuple[slice, FloatArray]]:
        """``(samples, their rows (m·S, N·S) in float64)``, in order."""
        fitting = max(1, _BYTES_AT_ONCE // (8 * self._num_columns * self._width))
        for samples in runs(self.num_samples, max(1, min(fitting, most_samples))):
            rows = slice(samples.start * self._width, samples.stop * self._width)
            yield samples, _finite(np.asarray(self._matrix[rows, :], np.float64), rows)

    def _parts(self) -> Iterator[tuple[slice, slice, FloatArray]]:
        if not isinstance(self._matrix, Kernel):
            for rows in runs(self.num_rows, max(1, _BYTES_AT_ONCE // (8 * self._num_columns))):
                yield rows, slice(None), np.asarray(self._matrix[rows], np.float64)
            return
        of_rows, of_columns = self._matrix.grid.rows, self._matrix.grid.columns
        for row, column in product(range(of_rows.num_tiles), range(of_columns.num_tiles)):
            tile = np.asarray(self._matrix.read_tile(row, column), np.float64)
            at_rows, at_columns = of_rows.rows(row), of_columns.rows(column)
            yield slice(at_rows.start, at_rows.stop), slice(at_columns.start, at_columns.stop), tile


def _finite(part: FloatArray, rows: slice) -> FloatArray:
    if not np.isfinite(part).all():
        raise NonFiniteError(f"the test kernel holds NaN or infinity in rows {rows.start} to {rows.stop - 1}")
    return part


class HeldOut:
    """Test samples with targets, for predictors whose coefficients are in the rows of the train kernel."""

    def __init__(self, kernel: Any, targets: Any, train: TrainTargets) -> None:
        self.targets = encode_test(targets, train.targets)
        self._cross = CrossKernel(kernel, len(train.rhs), train.width)
        self._width = train.width
        self.shape = self._cross.num_samples, train.targets.matrix.shape[1]
        if self.targets.matrix.shape != self.shape:
            raise ConfigError(
                f"test targets of shape {np.shape(targets)}; needed {self.shape} by kernel and train targets"
            )

    @classmethod
    def of(cls, kernel: Any, targets: Any, train: TrainTargets) -> "HeldOut | None":
        """The test set, if there is one."""
        if (kernel is None) != (targets is None):
            raise ConfigError("a test kernel without test targets, or these without it; needed both or none")
        return None if kernel is None else cls(kernel, targets, train)

    def predict(self, coefficients: Sequence[FloatArray]) -> list[FloatArray]:
        """Predictions (M, O) of several predictors, by one read of the test kernel."""
        predicted = self._cross.times(np.concatenate(coefficients, axis=1))
        return [as_samples(part, self._width) for part in np.split(predicted, len(coefficients), axis=1)]
