"""A symmetric matrix known by its products with blocks of columns in float64, and views that copy nothing."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.arrays import column_norms, power_of_two, require_matrix_range, runs
from ntkpipe.base.arrays import digest_of as digest_of
from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.base.given import as_real

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

_NOT_LESS = 1.001  # norms of a part and of the whole may differ by rounding
_COLUMNS_AT_ONCE = 256  # by operators that have no other access to entries


@dataclass(frozen=True)
class Work:
    """Cost of products with an operator. Supports ``+`` and ``-``."""

    passes: float = 0.0  # reads of the whole matrix, for any number of columns; partial reads count as fractions
    bytes_read: int = 0  # from files or object storage; tiles that stay in memory are read once
    seconds: float = 0.0  # time in products

    def __add__(self, other: "Work") -> "Work":
        return Work(self.passes + other.passes, self.bytes_read + other.bytes_read, self.seconds + other.seconds)

    def __sub__(self, other: "Work") -> "Work":
        return Work(self.passes - other.passes, self.bytes_read - other.bytes_read, self.seconds - other.seconds)


@dataclass(frozen=True)
class Statistics:
    """Properties of a matrix that one pass yields."""

    diagonal: NDArray[np.float64]  # shape (n,), float64
    frobenius: float  # Frobenius norm

    @property
    def trace(self) -> float:
        """Sum of the diagonal."""
        return float(self.diagonal.sum())


class Operator(ABC):
    """A symmetric real matrix K of n = ``num_rows`` rows, known by its products; all that solvers need of a matrix.

    Products are float64. Entries were rounded to ``storage_dtype``, which limits their accuracy; see
    :meth:`storage_floor`.
    """

    dtype = np.dtype(np.float64)  # of products
    rows_per_sample: int | None = None  # S where K is a stored kernel; none where nobody knows
    buffer_bytes = 0  # of tiles being read or used, beside those kept in memory

    def __init__(self, num_rows: int, storage_dtype: np.dtype[Any]) -> None:
        self.num_rows, self.shape = num_rows, (num_rows, num_rows)
        self.storage_dtype = storage_dtype
        self._statistics: Statistics | None = None
        # Bounds of the smallest eigenvalue, and the norm, once somebody found them
        self.lowest: tuple[float, float, float] | None = None

    @property
    @abstractmethod
    def work(self) -> Work:
        """Work since the operator was created."""

    @abstractmethod
    def identity(self) -> str:
        """Identifier of the matrix in checkpoints and results; equal for equal entries, also in other processes."""

    @abstractmethod
    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        """``K @ block`` for a C-contiguous block of shape (n, r)."""

    def _measure(self) -> Statistics:
        """Compute the statistics, in one pass if possible; here by all columns."""
        diagonal, squared = np.empty(self.num_rows), 0.0
        for run in runs(self.num_rows, _COLUMNS_AT_ONCE):
            found = self.columns(np.arange(run.start, run.stop))
            diagonal[run] = found[run].diagonal()
            squared += float(np.vdot(found, found))
        return Statistics(diagonal, squared**0.5)

    def matmat(self, block: ArrayLike) -> NDArray[np.float64]:
        """Compute ``K @ block`` in float64, in one pass."""
        values = as_real("a block", block)
        if values.ndim not in {1, 2} or values.shape[0] != self.num_rows:
            raise ConfigError(f"a block of shape {values.shape}; needed ({self.num_rows},) or ({self.num_rows}, r)")
        # For an order or alignment that BLAS does not take, numpy's own loops would give other bits.
        values = np.require(values, np.float64, ["C", "ALIGNED"])
        if not np.isfinite(values).all():
            raise NonFiniteError("a block that the matrix is multiplied with holds NaN or infinity")
        shape = values.shape
        return self._multiply(values.reshape(self.num_rows, -1)).reshape(shape) if values.size else np.zeros(shape)

    def __matmul__(self, block: ArrayLike) -> NDArray[np.float64]:
        return self.matmat(block)

    def columns(self, indices: ArrayLike) -> NDArray[np.float64]:
        """Return columns of K, shape (n, len(indices)), float64; reads the tiles that hold them."""
        wanted = np.asarray(indices, np.int64).reshape(-1)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < self.num_rows:
            raise ConfigError(f"columns {wanted.min()} to {wanted.max()} of a matrix that has 0 to {self.num_rows - 1}")
        return self._columns(wanted)

    def _columns(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Multiply with unit vectors, for matrices without readable entries."""
        unit = np.zeros((self.num_rows, len(indices)))
        unit[indices, np.arange(len(indices))] = 1.0
        return self.matmat(unit)

    def block(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        """Return ``K[rows, columns]`` of two slices as a new C-contiguous float64 array; reads its tiles."""
        for run in (rows, columns):
            if run.step not in {None, 1} or not 0 <= (run.start or 0) <= (run.stop or 0) <= self.num_rows:
                raise ConfigError(f"block of {run}; needed slice(start, stop) within {self.num_rows} rows")
        return self._block(slice(rows.start or 0, rows.stop), slice(columns.start or 0, columns.stop))

    def _block(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        return np.ascontiguousarray(self._columns(np.arange(columns.start, columns.stop))[rows])

    def statistics(self) -> Statistics:
        """Return diagonal and Frobenius norm; the first call is one pass over stored tiles."""
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
        """Estimate the spectral norm of the error from rounding to :attr:`storage_dtype`: ``eps |K|_F / sqrt(n)``."""
        # Eigenvalues below it are unknown. A symmetric matrix of independent errors of variance s² has norm 2 s sqrt(n)
        # (Wigner), here with s = eps |K|_F / (2 n). This agrees with measurements on float32 kernels of 2,000 rows.
        eps = float(np.finfo(self.storage_dtype).eps)
        return eps * self.frobenius() / math.sqrt(self.num_rows)

    @property
    def unshifted(self) -> "tuple[Operator, float]":
        """K0 and s of a view ``K0 + s I``; of others K itself and zero."""
        return self, 0.0

    def require_range(self) -> None:
        """Refuse entries whose squares leave float64; a look at the statistics unless they are stored in float32."""
        if self.storage_dtype.itemsize > 4:
            size, of_diagonal = self.frobenius(), float(column_norms(self.diagonal()[:, None])[0])
            require_matrix_range(max(size, of_diagonal))
            if of_diagonal > _NOT_LESS * size:  # of operators that others write
                what = f"an operator of Frobenius norm {size:.3g}, whose diagonal alone has {of_diagonal:.3g}"
                raise ConfigError(f"{what}; its frobenius(), diagonal() or statistics() are to be corrected")

    def shifted(self, shift: float) -> "Operator":
        """Return a view ``K + shift I``."""
        return self if shift == 0.0 else _Shifted(self, float(shift))

    def scaled(self, factor: float) -> "Operator":
        """Return a view ``factor K``."""
        return self if factor == 1.0 else _Scaled(self, float(factor))

    def centred(self) -> "Operator":
        """Return a view ``H K H`` with H = I - 11'/n: the kernel of centred features."""
        return _Centred(self)

    def kronecker(self, num_outputs: int) -> "Operator":
        """Return a view ``K ⊗ I_O``: the kernel of O independent outputs, row = sample * O + output."""
        if num_outputs < 1:
            raise ConfigError(f"kronecker({num_outputs}); needed at least one output")
        return self if num_outputs == 1 else _Kronecker(self, num_outputs, self.num_rows * num_outputs)

    def leading(self, num_rows: int) -> "Operator":
        """Return a view of the leading block of ``num_rows`` rows and columns."""
        if not 0 < num_rows <= self.num_rows:
            raise ConfigError(f"leading({num_rows}) of a matrix of {self.num_rows} rows")
        return self if num_rows == self.num_rows else self._leading(num_rows)

    def _leading(self, num_rows: int) -> "Operator":
        return _Leading(self, num_rows, num_rows)

    def aslinearoperator(self) -> "LinearOperator":
        """Convert to a ``scipy.sparse.linalg.LinearOperator``, for solvers of other libraries."""
        from scipy.sparse.linalg import LinearOperator

        multiply = self.matmat
        return LinearOperator(
            self.shape, matvec=multiply, rmatvec=multiply, matmat=multiply, rmatmat=multiply, dtype=self.dtype
        )

    def close(self) -> None:  # noqa: B027 - most have nothing to release
        """Release tiles kept in memory, here or on workers. Products are still possible."""


class _View(Operator):
    """A matrix that is computed from another one, whose work it shares, and perhaps a number."""

    def __init__(self, base: Operator, number: Any = None, num_rows: int | None = None) -> None:
        super().__init__(num_rows or base.num_rows, base.storage_dtype)
        self._base, self._number, self.buffer_bytes = base, number, base.buffer_bytes

    def identity(self) -> str:
        of = self._base.identity() if self._number is None else f"{self._base.identity()}, {self._number}"
        return f"{type(self).__name__[1:].lower()}({of})"

    @property
    def work(self) -> Work:
        return self._base.work

    def storage_floor(self) -> float:
        return self._base.storage_floor()

    def require_range(self) -> None:
        self._base.require_range()

    def close(self) -> None:
        self._base.close()


class _Elementwise(_View):
    """A view whose entries are those of the base, each changed by itself."""

    def _columns(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        found = self._base.columns(indices)
        self._change(found, slice(0, self.num_rows), indices)
        return found

    def _block(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        found = self._base.block(rows, columns)
        self._change(found, rows, np.arange(columns.start, columns.stop))
        return found

    @abstractmethod
    def _change(self, found: NDArray[np.float64], rows: slice, columns: NDArray[np.int64]) -> None:
        """Turn entries ``K[rows, columns]`` of the base into those of the view, in place."""


class _ByNumber(_Elementwise):
    def _leading(self, num_rows: int) -> Operator:
        return type(self)(self._base.leading(num_rows), self._number)


class _Shifted(_ByNumber):
    @property
    def unshifted(self) -> tuple[Operator, float]:
        base, shift = self._base.unshifted
        return base, shift + self._number

    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        product = self._base.matmat(block)
        product += self._number * block
        return product

    def _change(self, found: NDArray[np.float64], rows: slice, columns: NDArray[np.int64]) -> None:
        at = np.flatnonzero((rows.start <= columns) & (columns < rows.stop))
        found[columns[at] - rows.start, at] += self._number

    def _measure(self) -> Statistics:
        of_base = self._base.statistics()
        # Powers of two keep squares in range and change no digit.
        scale = power_of_two(max(of_base.frobenius, abs(self._number)))
        number, trace = self._number / scale, float((of_base.diagonal / scale).sum())
        squared = (of_base.frobenius / scale) ** 2 + number * (2 * trace + self.num_rows * number)
        return Statistics(of_base.diagonal + self._number, max(squared, 0.0) ** 0.5 * scale)


class _Scaled(_ByNumber):
    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        product = self._base.matmat(block)
        product *= self._number
        return product

    def _change(self, found: NDArray[np.float64], rows: slice, columns: NDArray[np.int64]) -> None:
        found *= self._number

    def _measure(self) -> Statistics:
        of_base = self._base.statistics()
        return Statistics(of_base.diagonal * self._number, of_base.frobenius * abs(self._number))

    def storage_floor(self) -> float:
        return float(self._base.storage_floor() * abs(self._number))

    def require_range(self) -> None:
        if self.storage_dtype.itemsize > 4 or not 2.0**-50 <= abs(self._number) <= 2.0**50:
            require_matrix_range(self.frobenius())


class _Centred(_Elementwise):
    """``H K H`` without copies; its entries and statistics need K 1, one extra pass in all."""

    @cached_property
    def _row_means(self) -> NDArray[np.float64]:
        return self._base.matmat(np.full(self.num_rows, 1.0 / self.num_rows))

    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        product = self._base.matmat(block - block.mean(axis=0))
        product -= product.mean(axis=0)
        return product

    def _change(self, found: NDArray[np.float64], rows: slice, columns: NDArray[np.int64]) -> None:
        means = self._row_means
        found -= means[rows, None]
        found -= means[columns] - means.mean()

    def _measure(self) -> Statistics:
        of_base, means, n = self._base.statistics(), self._row_means, self.num_rows
        mean, scale = float(means.mean()), power_of_two(of_base.frobenius)
        scaled = means / scale
        squared = (of_base.frobenius / scale) ** 2 - 2 * n * float(scaled @ scaled) + (n * (mean / scale)) ** 2
        return Statistics(of_base.diagonal - 2 * means + mean, max(squared, 0.0) ** 0.5 * scale)


class _Kronecker(_View):
    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        # Rows of a sample are adjacent, so its outputs become adjacent columns.
        return self._base.matmat(block.reshape(self._base.num_rows, -1)).reshape(block.shape)

    def _columns(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        samples, outputs = np.divmod(indices, self._number)
        of_base = self._base.columns(samples)
        found = np.zeros((self._base.num_rows, self._number, len(indices)))
        found[:, outputs, np.arange(len(indices))] = of_base
        return found.reshape(self.num_rows, len(indices))

    def _block(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        size = self._number
        inner = [slice(run.start // size, -(-run.stop // size)) for run in (rows, columns)]
        of_base = self._base.block(*inner)
        found = np.zeros((rows.stop - rows.start, columns.stop - columns.start))
        for output in range(size):
            # First samples at or after the start that have rows and columns of this output in the block.
            first, second = (-(-(run.start - output) // size) for run in (rows, columns))
            into = found[first * size + output - rows.start :: size, second * size + output - columns.start :: size]
            into[:] = of_base[first - inner[0].start :, second - inner[1].start :][: into.shape[0], : into.shape[1]]
        return found

    def _measure(self) -> Statistics:
        of_base = self._base.statistics()
        diagonal = np.repeat(of_base.diagonal, self._number)
        return Statistics(diagonal, of_base.frobenius * self._number**0.5)


class _Leading(_View):
    """The leading block of an operator that cannot skip rows, by a pass over the whole with zeros in the rest."""

    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        padded = np.zeros((self._base.num_rows, block.shape[1]))
        padded[: self.num_rows] = block
        return np.ascontiguousarray(self._base.matmat(padded)[: self.num_rows])

    def _columns(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.ascontiguousarray(self._base.columns(indices)[: self.num_rows])

    def _block(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        return self._base.block(rows, columns)

    def storage_floor(self) -> float:
        return Operator.storage_floor(self)
