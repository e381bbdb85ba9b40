"""An array in memory as an operator."""

import contextlib
from collections.abc import Iterator
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray, SquareSum, require_matrix_range
from ntkpipe.base.blas import Pool
from ntkpipe.base.given import as_real, require_square, require_symmetric
from ntkpipe.base.operator import Operator, Statistics, Work, digest_of

_ROWS_AT_ONCE = 256  # rows of float32 upcast at a time: with 2,048 columns they are 4 MiB, which stay in the cache
_WORTH_THREADS = 10**8  # multiplications, some milliseconds, from which on threads are worth their start


class DenseOperator(Operator):
    """A symmetric array in memory.

    Products of a float32 array are float64: its rows are upcast a few at a time, never all at once. Threads take runs
    of rows; no bit depends on their number.
    """

    work = Work()

    def __init__(self, matrix: Any, *, storage_dtype: np.dtype[Any] | None = None, name: str = "the matrix") -> None:
        values = as_real(name, matrix)
        require_square(name, values.shape)
        self._largest = require_symmetric(name, values)
        super().__init__(len(values), storage_dtype or values.dtype)
        self._matrix = values
        self._identity: str | None = None

    def identity(self) -> str:
        """See :meth:`Operator.identity`: the digest of the entries."""
        if self._identity is None:
            self._identity = digest_of(self._matrix)
        return self._identity

    @contextlib.contextmanager
    def _counted(self, passes: float) -> Iterator[None]:
        start = perf_counter()
        yield
        self.work += Work(passes, 0, perf_counter() - start)

    def _multiply(self, block: FloatArray) -> FloatArray:
        product = np.empty_like(block)

        def multiply(first: int) -> None:
            rows = slice(first, first + _ROWS_AT_ONCE)
            np.matmul(self._matrix[rows].astype(np.float64, copy=False), block, out=product[rows])

        is_worth_threads = self.num_rows**2 * block.shape[1] >= _WORTH_THREADS
        with self._counted(1.0), Pool.open(None if is_worth_threads else 1) as pool:
            pool.each(multiply, range(0, self.num_rows, _ROWS_AT_ONCE))
        return product

    def _columns(self, indices: NDArray[np.int64]) -> FloatArray:
        with self._counted(len(indices) / self.num_rows):
            return self._matrix[:, indices].astype(np.float64)

    def _block(self, rows: slice, columns: slice) -> FloatArray:
        values = self._matrix[rows, columns]
        with self._counted(values.size / self.num_rows**2):
            return np.array(values, np.float64, order="C")

    def _measure(self) -> Statistics:
        squared = SquareSum()
        with self._counted(1.0):
            for first in range(0, self.num_rows, _ROWS_AT_ONCE):
                rows = self._matrix[first : first + _ROWS_AT_ONCE].astype(np.float64, copy=False)
                squared.add(partial(iter, [rows]))
        return Statistics(self._matrix.diagonal().astype(np.float64), squared.root)

    def require_range(self) -> None:
        """See :meth:`Operator.require_range`; nothing is read."""
        require_matrix_range(self._largest)

    def _leading(self, num_rows: int) -> Operator:
        return DenseOperator(self._matrix[:num_rows, :num_rows], storage_dtype=self.storage_dtype)
