"""One stored kernel as a numpy-like matrix that is read tile by tile. Imports neither torch nor dask."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ntkpipe.base.errors import ResourceError, needed_for
from ntkpipe.base.resources import available_memory, format_bytes
from ntkpipe.store.chunks import StoredArray

if TYPE_CHECKING:
    import dask.array
    import xarray

_SHARE_OF_MEMORY = 0.8  # that one read may take; the rest is for the work on what was read


def require_memory(
    shape: tuple[int, ...], dtype: np.dtype[Any], what: str, advice: str = "Read slices, or use .to_dask()"
) -> None:
    """Check that an array fits into the available memory."""
    needed, available = int(np.prod(shape, dtype=object)) * dtype.itemsize, available_memory()
    if needed > _SHARE_OF_MEMORY * available:
        raise ResourceError(
            f"{what} of shape {shape} and dtype {dtype} needs {format_bytes(needed)}; {format_bytes(available)} of "
            f"memory is available (a request may take {_SHARE_OF_MEMORY:.0%}). {advice}"
        )


class Kernel:
    """One kernel of a store, read as the full matrix, although only the upper tiles of a symmetric one are stored.

    Supports numpy's basic slicing and integer or boolean index arrays. Every read verifies the checksums of the tiles
    that it touches. Its memory is the result plus one tile, and is checked against what is available.

    Attributes
    ----------
    name
        Name of the array in the store, such as ``kernel/train``.
    root
        Path or URL of the store.
    identity
        Identifier of the entries, independent of their place: digest of the manifest and name of the array.
    shape
        Rows and columns; row = sample * S + covector.
    size, nbytes
        Number of entries of the full matrix, and its bytes in memory.
    dtype
        dtype of the stored entries.
    num_covectors
        Rows per sample, S: the number of outputs for ``kind="ntk"``, else one.
    is_symmetric
        Whether rows and columns are the same samples.
    is_local
        Whether tiles are files in a file system rather than objects that a server sends.
    tile_bytes
        Bytes of one tile's file.

    Raises
    ------
    TileError, ResourceError
        On reading, if a tile is missing or damaged (the message names it), or the result does not fit in memory (the
        message has both numbers).
    """

    ndim = 2

    def __init__(self, array: StoredArray, digest: str) -> None:
        layout, grid = array.layout, array.layout.grid
        assert grid is not None
        self._array, self.grid = array, grid
        self.name, self.root = layout.name, array.medium.root
        self.identity = f"{digest}/{layout.name}"
        self.shape, self.dtype = grid.shape, layout.dtype
        self.size = self.shape[0] * self.shape[1]
        self.nbytes = self.size * self.dtype.itemsize
        self.num_covectors, self.is_symmetric = grid.rows.num_covectors, grid.symmetric
        self.is_local, self.tile_bytes = isinstance(self.root, Path), layout.chunk_bytes

    @property
    def token(self) -> str:
        """Identifier of the entries and their place, for caches of lazy arrays."""
        return f"{self.identity.replace('/', '-')}-{self._array.medium.identity()}"

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

    def __getitem__(self, key: Any) -> NDArray[Any]:
        parts, (rows, columns) = _picked(key, self.shape, "a kernel")
        has_slice = any(isinstance(part, slice) for part in parts)
        if has_slice and max(rows.ndim, columns.ndim) > 1:
            raise IndexError("a two-dimensional index array beside a slice is not supported; use numpy.ix_")
        if has_slice or min(rows.ndim, columns.ndim) == 0:
            return self._read(rows.ravel(), columns.ravel()).reshape(rows.shape + columns.shape)[()]
        if rows.ndim == 2 and rows.shape[1] == len(np.atleast_2d(columns)) == 1:  # numpy.ix_
            return self._read(rows[:, 0], columns.ravel())
        return self._read_points(*np.broadcast_arrays(rows, columns))

    def _read(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[Any]:
        """Read the submatrix of ``rows`` and ``columns``, each tile once."""
        require_memory((rows.size, columns.size), self.dtype, "a slice of the kernel")
        values = np.empty((rows.size, columns.size), self.dtype)
        row_edge, column_edge = self.grid.rows.tile_rows, self.grid.columns.tile_rows
        for row_tile, at_rows in _by_number(rows // row_edge):
            for column_tile, at_columns in _by_number(columns // column_edge):
                tile = self.read_tile(row_tile, column_tile)
                inside = np.ix_(rows[at_rows] % row_edge, columns[at_columns] % column_edge)
                values[np.ix_(at_rows, at_columns)] = tile[inside]
        return values

    def _read_points(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[Any]:
        values = np.empty(rows.shape, self.dtype)
        row_edge, column_edge = self.grid.rows.tile_rows, self.grid.columns.tile_rows
        tiles = rows // row_edge * self.grid.columns.num_tiles + columns // column_edge
        for number, at in _by_number(tiles):
            tile = self.read_tile(*divmod(number, self.grid.columns.num_tiles))
            values.flat[at] = tile[rows.flat[at] % row_edge, columns.flat[at] % column_edge]
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
        grid, width = kernel.grid, kernel.num_covectors
        self._kernel, self.dtype = kernel, kernel.dtype
        self.shape = (grid.rows.num_samples, grid.columns.num_samples, width, width)

    def __repr__(self) -> str:
        return f"<KernelBlocks {self.shape} {self.dtype}>"

    def __getitem__(self, key: Any) -> NDArray[Any]:
        parts, picked = _picked(key, self.shape, "a kernel's blocks")
        if any(not isinstance(part, slice | int | np.integer) for part in parts):
            raise IndexError("blocks take integers and slices; for index arrays, index the kernel itself by rows")
        found = self._kernel.read_entries(*np.ix_(*(np.atleast_1d(picked[axis]) for axis in (0, 2, 1, 3))))
        return found.transpose(0, 2, 1, 3).reshape([size for part in picked for size in part.shape])[()]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return _as_array(self, dtype, copy)


def _as_array(kernel: Kernel | KernelBlocks, dtype: DTypeLike | None, copy: bool | None) -> NDArray[Any]:
    if copy is False:
        raise ValueError("a stored kernel becomes an array by reading it, which copies; use copy=None")
    values = kernel[...]
    return values if dtype is None else values.astype(dtype, copy=False)


def _picked(key: Any, shape: tuple[int, ...], what: str) -> tuple[tuple[Any, ...], list[NDArray[np.int64]]]:
    """One index for each axis, as an ellipsis or a missing end stands for whole axes, and the numbers that it picks."""
    parts = key if isinstance(key, tuple) else (key,)
    at = next((position for position, part in enumerate(parts) if part is Ellipsis), len(parts))
    before, after = parts[:at], parts[at + 1 :]
    parts = (*before, *[slice(None)] * (len(shape) - len(before) - len(after)), *after)
    if len(parts) > len(shape) or any(part is None or part is Ellipsis for part in parts):
        raise IndexError(f"too many indices for {what}: {key!r}")
    return parts, [np.asarray(np.arange(size)[part]) for size, part in zip(shape, parts, strict=True)]


def _by_number(numbers: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each number that occurs with its flat positions."""
    for number in np.unique(numbers):
        yield int(number), np.flatnonzero(numbers == number)
