"""A symmetric matrix that answers products with blocks of columns in float64, and views of one that copy nothing."""

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.errors import ConfigError, NonFiniteError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

# Columns that are asked for at once where only columns are to be had.
_COLUMNS_AT_ONCE = 256


@dataclass(frozen=True)
class Work:
    """What products with an operator have cost. Values add and subtract."""

    # Reads of the whole matrix, whatever the number of columns; single columns count as the part that was read
    passes: float = 0.0
    # Bytes that came from files or object storage; tiles that are kept in memory are not read again
    bytes_read: int = 0
    seconds: float = 0.0  # time in products

    def __add__(self, other: "Work") -> "Work":
        return Work(self.passes + other.passes, self.bytes_read + other.bytes_read, self.seconds + other.seconds)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.passes - other.passes, self.bytes_read - other.bytes_read, self.seconds - other.seconds)


@dataclass(frozen=True)
class Statistics:
    """What one pass says of a matrix beside a product."""

    diagonal: NDArray[np.float64]  # shape (n,), float64
    frobenius: float  # frobenius norm

    @property
    def trace(self) -> float:
        """Sum of the diagonal."""
        return float(self.diagonal.sum())


class Operator(ABC):
    """A symmetric real matrix K of n rows, known by its products.

    Products are float64 whatever the dtype of the stored entries. Solvers need nothing else of a matrix.

    Attributes
    ----------
    num_rows
        n.
    storage_dtype
        dtype that the entries were rounded to, which sets what of them is known: see :meth:`storage_floor`.
    """

    def __init__(self, num_rows: int, storage_dtype: np.dtype[Any]) -> None:
        self.num_rows = num_rows
        self.storage_dtype = storage_dtype
        self._statistics: Statistics | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """n, n."""
        return self.num_rows, self.num_rows

    @property
    def dtype(self) -> np.dtype[Any]:
        """float64, of products."""
        return np.dtype(np.float64)

    @property
    @abstractmethod
    def work(self) -> Work:
        """What has been done since the operator was made."""

    @property
    def buffer_bytes(self) -> int:
        """Memory that reading takes beside what is kept: tiles that are in use or on their way."""
        return 0

    @abstractmethod
    def identity(self) -> str:
        """Names the matrix: equal for equal entries, also in another process. Checkpoints and results hold it."""

    @abstractmethod
    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        """``K @ block`` for a C-contiguous block of shape (n, r)."""

    @abstractmethod
    def _measure(self) -> Statistics:
        """The statistics, in one pass where that is possible."""

    def matmat(self, block: ArrayLike) -> NDArray[np.float64]:
        """``K @ block`` in float64, one pass."""
        values = np.asarray(block)
        if values.ndim not in {1, 2} or values.shape[0] != self.num_rows or values.dtype.kind not in "fiub":
            raise ConfigError(
                f"a block of shape {values.shape} and dtype {values.dtype}; needed ({self.num_rows},) or "
                f"({self.num_rows}, r) of real numbers"
            )
        # Where BLAS does not take it, for its order or address, numpy's own loops would give other bits.
        values = np.require(values, np.float64, ["C", "ALIGNED"])
        if not np.isfinite(values).all():
            raise NonFiniteError("a block that the matrix is multiplied with holds NaN or infinity")
        if values.size == 0:
            return np.zeros_like(values)
        return self._multiply(values.reshape(self.num_rows, -1)).reshape(values.shape)

    def __matmul__(self, block: ArrayLike) -> NDArray[np.float64]:
        return self.matmat(block)

    def columns(self, indices: ArrayLike) -> NDArray[np.float64]:
        """Columns of K, shape (n, len(indices)), float64; reads the tiles that hold them."""
        wanted = np.asarray(indices, np.int64).reshape(-1)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.num_rows:
            raise ConfigError(f"columns {wanted.min()} to {wanted.max()} of a matrix that has 0 to {self.num_rows - 1}")
        return self._columns(wanted)

    def _columns(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """As a product with unit vectors, where the matrix has no entries to be read."""
        unit = np.zeros((self.num_rows, len(indices)))
        unit[indices, np.arange(len(indices))] = 1.0
        return self.matmat(unit)

    def block(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        """Entries ``K[rows, columns]`` of two runs of rows, float64, C-contiguous and new; reads the tiles of them."""
        for run in (rows, columns):
            if run.step not in {None, 1} or not 0 <= (run.start or 0) <= (run.stop or 0) <= self.num_rows:
                raise ConfigError(f"block of {run}; needed slice(start, stop) inside of {self.num_rows} rows")
        return self._block(slice(rows.start or 0, rows.stop), slice(columns.start or 0, columns.stop))

    def _block(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        return np.ascontiguousarray(self._columns(np.arange(columns.start, columns.stop))[rows])

    def statistics(self) -> Statistics:
        """Diagonal and Frobenius norm; one pass over stored tiles at the first call."""
        if self._statistics is None:
            self._statistics = self._measure()
        return self._statistics

    def diagonal(self) -> NDArray[np.float64]:
        """The diagonal, shape (n,), float64; see :meth:`statistics`."""
        return self.statistics().diagonal

    def trace(self) -> float:
        """Sum of the diagonal; see :meth:`statistics`."""
        return self.statistics().trace

    def frobenius(self) -> float:
        """Frobenius norm; see :meth:`statistics`."""
        return self.statistics().frobenius

    def storage_floor(self) -> float:
        """Size of what rounding to :attr:`storage_dtype` did to K, in the spectral norm: ``eps |K|_F / sqrt(n)``.

        Eigenvalues below it are not known. Rounding errors are independent and at most eps/2 of an entry; a symmetric
        matrix of independent entries of variance s² has norm 2 s sqrt(n) (Wigner), which with s = eps |K|_F / (2 n)
        gives the formula; it fits float32 kernels of 2,000 rows.
        """
        eps = float(np.finfo(self.storage_dtype).eps)
        return eps * self.frobenius() / math.sqrt(self.num_rows)

    def shifted(self, shift: float) -> "Operator":
        """``K + shift I``."""
        return self if shift == 0.0 else _Shifted(self, shift)

    def scaled(self, factor: float) -> "Operator":
        """``factor K``."""
        return self if factor == 1.0 else _Scaled(self, factor)

    def centred(self) -> "Operator":
        """``H K H`` with H = I - 11'/n: the kernel of features whose mean is zero."""
        return _Centred(self)

    def kronecker(self, num_outputs: int) -> "Operator":
        """``K ⊗ I_O``: the kernel of O outputs that do not interact, row = sample * O + output."""
        return self if num_outputs == 1 else _Kronecker(self, num_outputs)

    def leading(self, num_rows: int) -> "Operator":
        """The leading block of ``num_rows`` rows and columns."""
        if not 0 < num_rows <= self.num_rows:
            raise ConfigError(f"leading({num_rows}) of a matrix of {self.num_rows} rows")
        return self if num_rows == self.num_rows else self._leading(num_rows)

    def _leading(self, num_rows: int) -> "Operator":
        return _Leading(self, num_rows)

    def aslinearoperator(self) -> "LinearOperator":
        """As a ``scipy.sparse.linalg.LinearOperator``, for solvers of others."""
        from scipy.sparse.linalg import LinearOperator

        def multiply(block: NDArray[Any]) -> NDArray[np.float64]:
            return self.matmat(block)

        return LinearOperator(
            self.shape, matvec=multiply, rmatvec=multiply, matmat=multiply, rmatmat=multiply, dtype=self.dtype
        )

    def close(self) -> None:  # noqa: B027 - most have nothing to let go
        """Let go of what is kept in memory, here or on workers. Products are still possible."""


class _View(Operator):
    """A matrix that is known by products of another one, whose work it shares."""

    def __init__(self, base: Operator, num_rows: int) -> None:
        super().__init__(num_rows, base.storage_dtype)
        self._base = base

    @property
    def work(self) -> Work:
        return self._base.work

    @property
    def buffer_bytes(self) -> int:
        return self._base.buffer_bytes

    def storage_floor(self) -> float:
        return self._base.storage_floor()

    def close(self) -> None:
        self._base.close()


class _Shifted(_View):
    def __init__(self, base: Operator, shift: float) -> None:
        super().__init__(base, base.num_rows)
        self._shift = float(shift)

    def identity(self) -> str:
        return f"shifted({self._base.identity()}, {self._shift!r})"

    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        product = self._base.matmat(block)
        product += self._shift * block
        return product

    def _columns(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        found = self._base.columns(indices)
        found[indices, np.arange(len(indices))] += self._shift
        return found

    def _block(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        found = self._base.block(rows, columns)
        both = np.arange(max(rows.start, columns.start), min(rows.stop, columns.stop))
        found[both - rows.start, both - columns.start] += self._shift
        return found

    def _measure(self) -> Statistics:
        of_base = self._base.statistics()
        squared = of_base.frobenius**2 + self._shift * (2 * of_base.trace + self.num_rows * self._shift)
        return Statistics(of_base.diagonal + self._shift, max(squared, 0.0) ** 0.5)

    def _leading(self, num_rows: int) -> Operator:
        return _Shifted(self._base.leading(num_rows), self._shift)


class _Scaled(_View):
    def __init__(self, base: Operator, factor: float) -> None:
        super().__init__(base, base.num_rows)
        self._factor = float(factor)

    def identity(self) -> str:
        return f"scaled({self._base.identity()}, {self._factor!r})"

    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        product = self._base.matmat(block)
        product *= self._factor
        return product

    def _columns(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        found = self._base.columns(indices)
        found *= self._factor
        return found

    def _block(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        found = self._base.block(rows, columns)
        found *= self._factor
        return found

    def _measure(self) -> Statistics:
        of_base = self._base.statistics()
        return Statistics(of_base.diagonal * self._factor, of_base.frobenius * abs(self._factor))

    def storage_floor(self) -> float:
        return self._base.storage_floor() * abs(self._factor)

    def _leading(self, num_rows: int) -> Operator:
        return _Scaled(self._base.leading(num_rows), self._factor)


class _Centred(_View):
    """``H K H`` without copies; its columns and statistics need K 1, which is one more pass, once."""

    def __init__(self, base: Operator) -> None:
        super().__init__(base, base.num_rows)
        self._sums: NDArray[np.float64] | None = None

    def identity(self) -> str:
        return f"centred({self._base.identity()})"

    def _row_means(self) -> NDArray[np.float64]:
        if self._sums is None:
            self._sums = self._base.matmat(np.full(self.num_rows, 1.0 / self.num_rows))
        return self._sums

    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        product = self._base.matmat(block - block.mean(axis=0))
        product -= product.mean(axis=0)
        return product

    def _columns(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        means = self._row_means()
        found = self._base.columns(indices)
        found -= means[:, None]
        found -= means[indices] - means.mean()
        return found

    def _block(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        means = self._row_means()
        found = self._base.block(rows, columns)
        found -= means[rows, None]
        found -= means[columns] - means.mean()
        return found

    def _measure(self) -> Statistics:
        of_base, means, n = self._base.statistics(), self._row_means(), self.num_rows
        mean = float(means.mean())
        squared = of_base.frobenius**2 - 2 * n * float(means @ means) + (n * mean) ** 2
        return Statistics(of_base.diagonal - 2 * means + mean, max(squared, 0.0) ** 0.5)


class _Kronecker(_View):
    def __init__(self, base: Operator, num_outputs: int) -> None:
        if num_outputs < 1:
            raise ConfigError(f"kronecker({num_outputs}); needed at least one output")
        super().__init__(base, base.num_rows * num_outputs)
        self._num_outputs = num_outputs

    def identity(self) -> str:
        return f"kronecker({self._base.identity()}, {self._num_outputs})"

    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        # Rows of a sample are neighbours, so its outputs are columns beside each other.
        return self._base.matmat(block.reshape(self._base.num_rows, -1)).reshape(block.shape)

    def _columns(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        samples, outputs = np.divmod(indices, self._num_outputs)
        of_base = self._base.columns(samples)
        found = np.zeros((self._base.num_rows, self._num_outputs, len(indices)))
        found[:, outputs, np.arange(len(indices))] = of_base
        return found.reshape(self.num_rows, len(indices))

    def _block(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        size = self._num_outputs
        inner = [slice(run.start // size, -(-run.stop // size)) for run in (rows, columns)]
        of_base = self._base.block(*inner)
        found = np.zeros((rows.stop - rows.start, columns.stop - columns.start))
        for output in range(size):
            # The rows and columns of this output, and the samples that they are of.
            first, second = (-(-(run.start - output) // size) for run in (rows, columns))
            into = found[first * size + output - rows.start :: size, second * size + output - columns.start :: size]
            into[:] = of_base[first - inner[0].start :, second - inner[1].start :][: into.shape[0], : into.shape[1]]
        return found

    def _measure(self) -> Statistics:
        of_base = self._base.statistics()
        diagonal = np.repeat(of_base.diagonal, self._num_outputs)
        return Statistics(diagonal, of_base.frobenius * self._num_outputs**0.5)


class _Leading(_View):
    """Of an operator that cannot leave rows out: a pass of the whole with zeros in the rest."""

    def __init__(self, base: Operator, num_rows: int) -> None:
        super().__init__(base, num_rows)

    def identity(self) -> str:
        return f"leading({self._base.identity()}, {self.num_rows})"

    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        padded = np.zeros((self._base.num_rows, block.shape[1]))
        padded[: self.num_rows] = block
        return np.ascontiguousarray(self._base.matmat(padded)[: self.num_rows])

    def _columns(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.ascontiguousarray(self._base.columns(indices)[: self.num_rows])

    def _block(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        return self._base.block(rows, columns)

    def _measure(self) -> Statistics:
        return measure_by_columns(self)

    def storage_floor(self) -> float:
        return Operator.storage_floor(self)


def measure_by_columns(operator: Operator) -> Statistics:
    """Statistics of an operator that has columns alone, a few hundred at a time."""
    diagonal, squared = np.empty(operator.num_rows), 0.0
    for start in range(0, operator.num_rows, _COLUMNS_AT_ONCE):
        numbers = np.arange(start, min(start + _COLUMNS_AT_ONCE, operator.num_rows))
        found = operator.columns(numbers)
        diagonal[numbers] = found[numbers, numbers - start]
        squared += float(np.vdot(found, found))
    return Statistics(diagonal, squared**0.5)


def digest_of(values: NDArray[Any]) -> str:
    """Names an array by its dtype, shape and entries."""
    digest = hashlib.sha256(f"{values.dtype.str} {values.shape} ".encode())
    digest.update(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()
