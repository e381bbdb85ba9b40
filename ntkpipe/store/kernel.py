"""One stored kernel as a numpy-like matrix that is read tile by tile. Imports neither torch nor dask."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ntkpipe.base.errors import ResourceError, needed_for
from ntkpipe.base.grid import Grid
from ntkpipe.base.resources import available_memory, format_bytes
from ntkpipe.store.chunks import StoredArray

if TYPE_CHECKING:
    import dask.array
    import xarray

_SHARE_OF_MEMORY = 0.8  # that one read may take; the rest is for the work on what was read


def require_memory(shape: tuple[int, ...], dtype: np.dtype[Any], what: str) -> None:
    """Check that an array fits into the available memory."""
    needed, available = int(np.prod(shape, dtype=object)) * dtype.itemsize, available_memory()
    if needed > _SHARE_OF_MEMORY * available:
        raise ResourceError(
            f"{what} of shape {shape} and dtype {dtype} needs {format_bytes(needed)}; {format_bytes(available)} of "
            f"memory is available (a request may take {_SHARE_OF_MEMORY:.0%}). Read slices, or use .to_dask()"
        )


class Kernel:
    """One kernel of a store, read as the full matrix, although only the upper tiles of a symmetric one are stored.

    Supports numpy's basic slicing and integer or boolean index arrays. Every read verifies the checksums of the tiles
    that it touches. Its memory is the result plus one tile, and is checked against what is available.

    Raises
    ------
    TileError, ResourceError
        On reading, if a tile is missing or damaged (the message names it), or the result does not fit in memory (the
        message has both numbers).
    """

    ndim = 2

    def __init__(self, array: StoredArray, digest: str) -> None:
        assert array.layout.grid is not None
        self._array = array
        self.grid: Grid = array.layout.grid
        self._digest = digest

    @property
    def token(self) -> str:
        """Identifier of the entries and their place, for caches of lazy arrays."""
        return f"{self._digest}-{self._array.medium.identity()}-{self.name.replace('/', '-')}"

    @property
    def name(self) -> str:
        """Name of the array in the store, such as ``kernel/train``."""
        return self._array.layout.name

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns; row = sample * S + covector."""
        return self.grid.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of the stored entries."""
        return self._array.layout.dtype

    @property
    def size(self) -> int:
        """Number of entries of the full matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the full matrix in memory."""
        return self.size * self.dtype.itemsize

    @property
    def num_covectors(self) -> int:
        """Rows per sample, S: the number of outputs for ``kind="ntk"``, else one."""
        return self.grid.rows.num_covectors

    @property
    def is_symmetric(self) -> bool:
        """Whether rows and columns are the same samples."""
        return self.grid.symmetric

    @property
    def chunks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows of each tile along both axes, in the form of dask."""
        axes = (self.grid.rows, self.grid.columns)
        rows, columns = (tuple(len(axis.rows(tile)) for tile in range(axis.num_tiles)) for axis in axes)
        return rows, columns

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<Kernel {self.name} {self.shape[0]} x {self.shape[1]} {self.dtype}, {format_bytes(self.nbytes)}>"

    def read_tile(self, row: int, column: int) -> NDArray[Any]:
        """Read tile (row, column) of the full matrix, read-only; transposed if its mirror image is stored."""
        if self.grid.is_stored(row, column):
            return self._array.read((row, column))
        return self._array.read((column, row)).T

    def read_stored(self, row: int, column: int, buffer: NDArray[np.uint8] | None = None) -> NDArray[Any]:
        """Read a stored tile as it is; with a ``buffer`` of :attr:`tile_bytes` bytes, return a view of that."""
        return self._array.read((row, column), buffer)

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile's file."""
        return self._array.layout.chunk_bytes

    @property
    def root(self) -> Path | str:
        """Path or URL of its store."""
        return self._array.medium.root

    @property
    def is_local(self) -> bool:
        """Whether tiles are files in a file system rather than objects that a server sends."""
        return isinstance(self._array.medium.root, Path)

    @property
    def identity(self) -> str:
        """Identifier of the entries, independent of their place: digest of the manifest and name of the array."""
        return f"{self._digest}/{self.name}"

    def __getitem__(self, key: Any) -> NDArray[Any]:
        if isinstance(key, np.ndarray) and key.ndim == 2:
            raise IndexError("a kernel takes one index an axis; a two-dimensional mask or index array is not supported")
        parts = _one_index_per_axis(key, self.ndim, "a kernel")
        # Let numpy interpret each index: apply it to the numbers of the rows or columns.
        rows, columns = (self._numbers(part, axis) for axis, part in enumerate(parts))
        if rows.ndim == columns.ndim == 1 and not any(isinstance(part, slice) for part in parts):
            return self._read_points(*np.broadcast_arrays(rows, columns))
        if rows.ndim == 2 or columns.ndim == 2:
            if any(isinstance(part, slice) for part in parts):
                raise IndexError("a two-dimensional index array beside a slice is not supported; use numpy.ix_")
            rows, columns = np.atleast_2d(rows), np.atleast_2d(columns)
            if rows.shape[1] == columns.shape[0] == 1:  # numpy.ix_
                return self._read(rows[:, 0], columns[0])
            return self._read_points(*np.broadcast_arrays(rows, columns))
        values = self._read(np.atleast_1d(rows), np.atleast_1d(columns))
        return values.reshape(rows.shape + columns.shape)[()]

    def _numbers(self, part: Any, axis: int) -> NDArray[np.int64]:
        numbers = np.asarray(np.arange(self.shape[axis])[part])
        if numbers.ndim > 2:
            raise IndexError(f"an index of {numbers.ndim} dimensions is not supported")
        return numbers

    def _read(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[Any]:
        """Read the submatrix of ``rows`` and ``columns``, each tile once."""
        require_memory((rows.size, columns.size), self.dtype, "a slice of the kernel")
        values = np.empty((rows.size, columns.size), self.dtype)
        row_edge, column_edge = self.grid.rows.tile_rows, self.grid.columns.tile_rows
        for row_tile, at_rows in _by_tile(rows, row_edge):
            for column_tile, at_columns in _by_tile(columns, column_edge):
                tile = self.read_tile(row_tile, column_tile)
                inside = np.ix_(rows[at_rows] - row_tile * row_edge, columns[at_columns] - column_tile * column_edge)
                values[np.ix_(at_rows, at_columns)] = tile[inside]
        return values

    def _read_points(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[Any]:
        values = np.empty(rows.shape, self.dtype)
        row_edge, column_edge = self.grid.rows.tile_rows, self.grid.columns.tile_rows
        tiles = rows // row_edge * self.grid.columns.num_tiles + columns // column_edge
        for tile in np.unique(tiles):
            row_tile, column_tile = divmod(int(tile), self.grid.columns.num_tiles)
            at = tiles == tile
            data = self.read_tile(row_tile, column_tile)
            values[at] = data[rows[at] - row_tile * row_edge, columns[at] - column_tile * column_edge]
        return values

    def read_entries(self, *indices: NDArray[np.int64]) -> NDArray[Any]:
        """Read entries by row sample, row covector, column sample and column covector: vectors, or of ``numpy.ix_``."""
        row_samples, row_covectors, column_samples, column_covectors = indices
        rows = row_samples * self.num_covectors + row_covectors
        columns = column_samples * self.num_covectors + column_covectors
        if rows.ndim == 1:
            return self[rows, columns]
        return self[np.ix_(rows.ravel(), columns.ravel())].reshape(np.broadcast(rows, columns).shape)

    def diagonal(self) -> NDArray[Any]:
        """Read the diagonal, shape (rows,), from the diagonal tiles alone."""
        if not self.grid.symmetric:
            raise ValueError(f"{self!r} has no diagonal: its rows and columns are different samples")
        return np.concatenate([self.read_tile(i, i).diagonal() for i in range(self.grid.rows.num_tiles)])

    def to_numpy(self) -> NDArray[Any]:
        """Read the whole matrix into memory; raises ResourceError if it does not fit."""
        return self[:, :]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return _as_array(self, dtype, copy)

    def to_dask(self) -> "dask.array.Array":
        """Return a lazy dask array of the full matrix, one chunk per tile."""
        from ntkpipe.store.views import to_dask as views  # keeps dask out of sessions that only read

        return views.to_dask(self)

    def to_xarray(self) -> "xarray.DataArray":
        """Return a lazy :class:`xarray.DataArray` of the full matrix; indexing reads only the tiles that it touches.

        Dimensions are ``(sample, sample_)``, or ``(test_sample, sample_)`` for a test kernel; if a sample has several
        rows, as in a full NTK, ``(sample, output, sample_, output_)``. Values are not cached: ``.load()`` keeps them,
        ``.chunk()`` makes a dask array. :meth:`KernelStore.to_xarray` adds targets and outputs. Without xarray, raises
        ConfigError.
        """
        with needed_for("to_xarray", "xarray"):
            from ntkpipe.store.views import to_xarray as labelled
        return labelled.to_dataarray(self)

    @property
    def blocks(self) -> "KernelBlocks":
        """The kernel as an (N, M, S, S) array: one S x S block per pair of samples."""
        return KernelBlocks(self)


class KernelBlocks:
    """A kernel as (N, M, S, S): ``blocks[i, j]`` is the S x S block of samples i and j, read on access."""

    ndim = 4

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Samples, samples, covectors, covectors."""
        grid = self._kernel.grid
        return grid.rows.num_samples, grid.columns.num_samples, self._kernel.num_covectors, self._kernel.num_covectors

    @property
    def dtype(self) -> np.dtype[Any]:
        """dtype of the stored entries."""
        return self._kernel.dtype

    def __repr__(self) -> str:
        return f"<KernelBlocks {self.shape} {self.dtype}>"

    def __getitem__(self, key: Any) -> NDArray[Any]:
        parts = _one_index_per_axis(key, self.ndim, "a kernel's blocks")
        if any(not isinstance(part, slice | int | np.integer) for part in parts):
            raise IndexError("blocks take integers and slices; for index arrays, index the kernel itself by rows")
        picked = [np.asarray(np.arange(size)[part]) for size, part in zip(self.shape, parts, strict=True)]
        found = self._kernel.read_entries(*np.ix_(*(np.atleast_1d(picked[axis]) for axis in (0, 2, 1, 3))))
        return found.transpose(0, 2, 1, 3).reshape([size for part in picked for size in part.shape])[()]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return _as_array(self, dtype, copy)


def _as_array(kernel: Kernel | KernelBlocks, dtype: DTypeLike | None, copy: bool | None) -> NDArray[Any]:
    if copy is False:
        raise ValueError("a stored kernel becomes an array by reading it, which copies; use copy=None")
    values = kernel[...]
    return values if dtype is None else values.astype(dtype, copy=False)


def _one_index_per_axis(key: Any, num_axes: int, what: str) -> tuple[Any, ...]:
    """Expand a key as numpy does: an ellipsis, or a missing end, stands for whole axes."""
    parts = key if isinstance(key, tuple) else (key,)
    at = next((position for position, part in enumerate(parts) if part is Ellipsis), len(parts))
    before, after = parts[:at], parts[at + 1 :]
    parts = (*before, *[slice(None)] * (num_axes - len(before) - len(after)), *after)
    if len(parts) > num_axes or any(part is None or part is Ellipsis for part in parts):
        raise IndexError(f"too many indices for {what}: {key!r}")
    return parts


def _by_tile(numbers: NDArray[np.int64], edge: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each touched tile with the positions of the numbers that fall into it."""
    tiles = numbers // edge
    for tile in np.unique(tiles):
        yield int(tile), np.flatnonzero(tiles == tile)
