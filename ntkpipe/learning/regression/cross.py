"""Kernels of test samples with train samples: any rectangle, a part at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.store.kernel import Kernel

# Of a part in float64.
_BYTES_AT_ONCE = 2**24


class CrossKernel:
    """A test × train kernel that is read in parts: memory is one part beside what it is made of."""

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
            if not np.isfinite(part).all():
                raise NonFiniteError(f"the test kernel holds NaN or infinity in rows {rows.start} to {rows.stop - 1}")
            found[rows] += part @ block[columns]
        return found

    def sample_blocks(self, most_samples: int | None = None) -> Iterator[tuple[slice, FloatArray]]:
        """``(samples, their rows (m·S, N·S) in float64)``, in order."""
        fitting = max(1, _BYTES_AT_ONCE // (8 * self._num_columns * self._width))
        step = fitting if most_samples is None else max(1, min(fitting, most_samples))
        for start in range(0, self.num_samples, step):
            samples = slice(start, min(start + step, self.num_samples))
            rows = slice(samples.start * self._width, samples.stop * self._width)
            block = np.asarray(self._matrix[rows, :], np.float64)
            if not np.isfinite(block).all():
                raise NonFiniteError(f"the test kernel holds NaN or infinity in rows {rows.start} to {rows.stop - 1}")
            yield samples, block

    def _parts(self) -> Iterator[tuple[slice, slice, FloatArray]]:
        if isinstance(self._matrix, Kernel):
            yield from self._tiles(self._matrix)
            return
        step = max(1, _BYTES_AT_ONCE // (8 * self._num_columns))
        for start in range(0, self.num_rows, step):
            rows = slice(start, min(start + step, self.num_rows))
            yield rows, slice(None), np.asarray(self._matrix[rows], np.float64)

    @staticmethod
    def _tiles(kernel: Kernel) -> Iterator[tuple[slice, slice, FloatArray]]:
        rows, columns = kernel.grid.rows, kernel.grid.columns
        for row in range(rows.num_tiles):
            for column in range(columns.num_tiles):
                at_rows, at_columns = rows.rows(row), columns.rows(column)
                tile = kernel.read_tile(row, column)
                where = slice(at_rows.start, at_rows.stop), slice(at_columns.start, at_columns.stop)
                yield *where, np.asarray(tile, np.float64)
