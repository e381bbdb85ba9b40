"""Reading a store: kernels as numpy-like matrices, outputs, targets, progress. Imports neither torch nor dask."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ntkpipe.base.errors import ConfigError, ResourceError, StoreError
from ntkpipe.base.extras import needed_for
from ntkpipe.base.grid import Grid
from ntkpipe.base.kinds import get_kind
from ntkpipe.base.planes import array_of, prefix_of
from ntkpipe.base.resources import available_memory, format_bytes
from ntkpipe.store.chunks import Store, StoredArray
from ntkpipe.store.manifest import Manifest

if TYPE_CHECKING:
    import dask.array
    import xarray

# What a request may take of the memory that is free; the rest is for the work that it is read for.
_SHARE_OF_MEMORY = 0.8


def _require_memory(shape: tuple[int, ...], dtype: np.dtype[Any], what: str) -> None:
    needed, available = int(np.prod(shape, dtype=object)) * dtype.itemsize, available_memory()
    if needed > _SHARE_OF_MEMORY * available:
        raise ResourceError(
            f"{what} of shape {shape} and dtype {dtype} needs {format_bytes(needed)}; {format_bytes(available)} of "
            f"memory is available (a request may take {_SHARE_OF_MEMORY:.0%}). Read slices, or use .to_dask()"
        )


class Kernel:
    """One kernel of a store, read as the full matrix although a symmetric one stores its upper tiles only.

    Supports numpy's basic slicing and integer or boolean index arrays. Every read verifies the checksums of the tiles
    that it touches; its memory is the result plus one tile, and it is checked against what is available.

    Raises
    ------
    TileError
        On reading, if a tile is missing or damaged; the message names it.
    ResourceError
        If the result does not fit in memory, with both numbers.
    """

    ndim = 2

    def __init__(self, array: StoredArray, digest: str) -> None:
        assert array.layout.grid is not None
        self._array = array
        self._grid: Grid = array.layout.grid
        self._digest = digest

    @property
    def token(self) -> str:
        """Names the entries and where they are, for caches of lazy arrays."""
        return f"{self._digest}-{self._array.medium.identity()}-{self.name.replace('/', '-')}"

    @property
    def name(self) -> str:
        """The array in the store, as ``kernel/train``."""
        return self._array.layout.name

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns; row = sample * S + covector."""
        return self._grid.shape

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
        """Rows a sample, S."""
        return self._grid.rows.num_covectors

    @property
    def is_symmetric(self) -> bool:
        """Whether rows and columns are the same samples."""
        return self._grid.symmetric

    @property
    def grid(self) -> Grid:
        """The tiles."""
        return self._grid

    @property
    def chunks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows of each tile along both axes, as dask writes them."""
        rows, columns = self._grid.rows, self._grid.columns
        return (
            tuple(len(rows.rows(tile)) for tile in range(rows.num_tiles)),
            tuple(len(columns.rows(tile)) for tile in range(columns.num_tiles)),
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<Kernel {self.name} {self.shape[0]} x {self.shape[1]} {self.dtype}, {format_bytes(self.nbytes)}>"

    def read_tile(self, row: int, column: int) -> NDArray[Any]:
        """Tile (row, column) of the full matrix, read-only, transposed from its mirror where that is what is stored."""
        stored_row, stored_column, mirrored = self._grid.locate(row, column)
        tile = self._array.read((stored_row, stored_column))
        return tile.T if mirrored else tile

    def read_stored(self, row: int, column: int, buffer: NDArray[np.uint8] | None = None) -> NDArray[Any]:
        """A tile that is stored, as it is there; with a ``buffer`` of :attr:`tile_bytes` bytes, a view of that."""
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
        """Whether tiles are files of this machine's file system, rather than objects that a server sends."""
        return isinstance(self._array.medium.root, Path)

    @property
    def identity(self) -> str:
        """What decided the entries, wherever they are: digest of the manifest and name of the array."""
        return f"{self._digest}/{self.name}"

    def __getitem__(self, key: Any) -> NDArray[Any]:
        if isinstance(key, np.ndarray) and key.ndim == 2:
            raise IndexError("a kernel takes one index an axis; a two-dimensional mask or index array is not supported")
        parts = key if isinstance(key, tuple) else (key,)
        if any(part is Ellipsis for part in parts):
            at = next(position for position, part in enumerate(parts) if part is Ellipsis)
            parts = (*parts[:at], *[slice(None)] * (3 - len(parts)), *parts[at + 1 :])
        if len(parts) > 2 or any(part is None or part is Ellipsis for part in parts):
            raise IndexError(f"too many indices for a kernel: {key!r}")
        parts = (*parts, *[slice(None)] * (2 - len(parts)))
        # numpy itself says what an index means: apply it to the numbers of the rows and columns.
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
        """The matrix of all ``rows`` by all ``columns``, each tile read once."""
        _require_memory((rows.size, columns.size), self.dtype, "a slice of the kernel")
        values = np.empty((rows.size, columns.size), self.dtype)
        row_edge, column_edge = self._grid.rows.tile_rows, self._grid.columns.tile_rows
        for row_tile, at_rows in _by_tile(rows, row_edge):
            for column_tile, at_columns in _by_tile(columns, column_edge):
                tile = self.read_tile(row_tile, column_tile)
                inside = np.ix_(rows[at_rows] - row_tile * row_edge, columns[at_columns] - column_tile * column_edge)
                values[np.ix_(at_rows, at_columns)] = tile[inside]
        return values

    def _read_points(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[Any]:
        """Single entries, each tile read once."""
        values = np.empty(rows.shape, self.dtype)
        row_edge, column_edge = self._grid.rows.tile_rows, self._grid.columns.tile_rows
        tiles = rows // row_edge * self._grid.columns.num_tiles + columns // column_edge
        for tile in np.unique(tiles):
            row_tile, column_tile = divmod(int(tile), self._grid.columns.num_tiles)
            at = tiles == tile
            data = self.read_tile(row_tile, column_tile)
            values[at] = data[rows[at] - row_tile * row_edge, columns[at] - column_tile * column_edge]
        return values

    def diagonal(self) -> NDArray[Any]:
        """The diagonal, shape (rows,); reads the diagonal tiles only."""
        if not self._grid.symmetric:
            raise ValueError(f"{self!r} has no diagonal: its rows and columns are different samples")
        return np.concatenate([self.read_tile(i, i).diagonal() for i in range(self._grid.rows.num_tiles)])

    def to_numpy(self) -> NDArray[Any]:
        """The whole matrix in memory; refused, with the numbers, where it does not fit."""
        return self[:, :]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a stored kernel becomes an array by reading it, which copies; use copy=None")
        values = self.to_numpy()
        return values if dtype is None else values.astype(dtype, copy=False)

    def to_dask(self) -> "dask.array.Array":
        """A lazy dask array of the full matrix, one chunk a tile."""
        from ntkpipe.store.views import to_dask as views  # keeps dask out of sessions that only read

        return views.to_dask(self)

    def to_xarray(self) -> "xarray.DataArray":
        """A lazy :class:`xarray.DataArray` of the full matrix; indexing reads the tiles that it touches, and no others.

        Dimensions are ``(sample, sample_)``, or ``(test_sample, sample_)`` for a test kernel; where a sample has more
        rows than one, as in a full NTK, ``(sample, output, sample_, output_)``. Values that were read are not kept:
        ``.load()`` keeps them, ``.chunk()`` makes a dask array.

        :meth:`KernelSet.to_xarray` has targets and outputs beside it.

        Raises
        ------
        ConfigError
            If xarray is not installed.
        """
        with needed_for("to_xarray", "xarray"):
            from ntkpipe.store.views import to_xarray as labelled
        return labelled.to_dataarray(self)

    @property
    def blocks(self) -> "KernelBlocks":
        """The kernel as an (N, M, S, S) array: one S x S block for each pair of samples."""
        return KernelBlocks(self)


class KernelBlocks:
    """A kernel as (N, M, S, S): ``blocks[i, j]`` is the S x S block of samples i and j. Nothing is copied until read.

    For ``kind="ntk"`` S is the number of outputs.
    """

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
        parts = key if isinstance(key, tuple) else (key,)
        if any(part is Ellipsis for part in parts):
            at = next(position for position, part in enumerate(parts) if part is Ellipsis)
            parts = (*parts[:at], *[slice(None)] * (5 - len(parts)), *parts[at + 1 :])
        if len(parts) > 4 or any(part is None for part in parts):
            raise IndexError(f"too many indices for a kernel's blocks: {key!r}")
        if any(not isinstance(part, slice | int | np.integer) for part in parts):
            raise IndexError("blocks take integers and slices; for index arrays, index the kernel itself by rows")
        parts = (*parts, *[slice(None)] * (4 - len(parts)))
        picked = [np.asarray(np.arange(size)[part]) for size, part in zip(self.shape, parts, strict=True)]
        row_samples, column_samples, row_covectors, column_covectors = (np.atleast_1d(p) for p in picked)
        width = self._kernel.num_covectors
        rows = (row_samples[:, None] * width + row_covectors).ravel()
        columns = (column_samples[:, None] * width + column_covectors).ravel()
        values = self._kernel[np.ix_(rows, columns)]
        split = values.reshape(row_samples.size, row_covectors.size, column_samples.size, column_covectors.size)
        shape = tuple(size for p in picked for size in p.shape)
        return split.transpose(0, 2, 1, 3).reshape(shape)[()]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a stored kernel becomes an array by reading it, which copies; use copy=None")
        values = self[...]
        return values if dtype is None else values.astype(dtype, copy=False)


def _by_tile(numbers: NDArray[np.int64], edge: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """``(tile, positions of the numbers that fall into it)`` for each tile that is touched."""
    tiles = numbers // edge
    for tile in np.unique(tiles):
        yield int(tile), np.flatnonzero(tiles == tile)


@dataclass(frozen=True)
class Progress:
    """How much of a store exists.

    Attributes
    ----------
    tiles_done, tiles_total
        Tiles of all kernels.
    bytes_done
        Bytes of the tiles that exist.
    """

    tiles_done: int
    tiles_total: int
    bytes_done: int

    @property
    def is_complete(self) -> bool:
        """Whether every tile exists."""
        return self.tiles_done == self.tiles_total


class KernelSet:
    """The kernels of one sum over parameters: of all selected ones, or of a group; where asked for, of one output.

    Attributes
    ----------
    store
        The arrays underneath.
    """

    def __init__(self, store: Store, group: str | None = None, output: int | None = None) -> None:
        self.store = store
        self._group = group
        self._output = output

    def __repr__(self) -> str:
        return f"<KernelSet {prefix_of(self._group, self._output)} of {self.store.root}>"

    @property
    def train(self) -> Kernel:
        """Train x train, symmetric, shape (N*S, N*S)."""
        return self._kernel("kernel/train")

    @property
    def test_train(self) -> Kernel:
        """Test x train, shape (M*S, N*S); raises as :attr:`train`."""
        return self._kernel("kernel/test_train")

    @property
    def test_diagonal(self) -> NDArray[Any]:
        """The S x S block of each test sample with itself, shape (M, S, S); raises as :attr:`train`."""
        return self._read_all(self._name("kernel/test_diagonal"))

    def to_xarray(self) -> "xarray.Dataset":
        """Kernels, outputs and targets as a lazy :class:`xarray.Dataset` with named dimensions; opening reads no tile.

        ======================  ============================================  ==================================
        variable                dimensions                                    there if
        ======================  ============================================  ==================================
        ``train``               ``(sample, sample_)``
        ``test_train``          ``(test_sample, sample_)``                    the store has test samples
        ``test_diagonal``       ``(test_sample,)``                            the store has test samples
        ``outputs``             ``(sample, output)``
        ``test_outputs``        ``(test_sample, output)``                     the store has test samples
        ``target``              ``(sample,)`` and those of a target           coordinate; the store has targets
        ``target_``             ``(sample_,)`` and those of a target          coordinate; the store has targets
        ``test_target``         ``(test_sample,)`` and those of a target      coordinate; the store has test targets
        ======================  ============================================  ==================================

        A trailing underscore marks what belongs to columns, in train and test kernels alike, so that
        ``xarray.dot(dataset.test_train, coefficients)`` with coefficients of ``(sample_, …)`` is a prediction. A full
        NTK has ``output`` behind each row's sample and ``output_`` behind each column's, ``(sample, output, sample_,
        output_)``; of kind ``diagonal``, where each output has a kernel, ``output`` comes first, ``(output, sample,
        sample_)``, unless :meth:`output` has picked one. Targets of as many columns as there are outputs have the
        dimension ``output``, others ``target_axis_1`` and so on.

        Attributes are ``kind``, ``convention``, ``compute_dtype``, ``accumulate_dtype``, ``store_dtype``, ``model``,
        ``num_parameters`` and ``manifest_digest`` of the manifest, and ``group`` and ``picked_output`` where these were
        chosen. Entries keep the dtype of the store: convert with ``.astype("float64")`` before long sums.
        """
        with needed_for("to_xarray", "xarray"):
            from ntkpipe.store.views import to_xarray as labelled
        manifest = self.store.manifest
        digest = manifest.digest()
        return labelled.to_dataset(
            manifest, self.store.arrays, lambda array: Kernel(array, digest), self._group, self._output
        )

    def output(self, number: int) -> "KernelSet":
        """The kernels of one output, in a store of kind ``diagonal``."""
        manifest = self.store.manifest
        if get_kind(manifest.kind).pairs != "same" or self._output is not None:
            raise ConfigError(f"{self!r} has no kernels of single outputs; they are those of kind='diagonal'")
        if not 0 <= number < manifest.num_outputs:
            raise ConfigError(f"output({number}): {self.store.root} has outputs 0 to {manifest.num_outputs - 1}")
        return KernelSet(self.store, self._group, number)

    def _name(self, name: str) -> str:
        if self._output is None and get_kind(self.store.manifest.kind).pairs == "same":
            raise ConfigError(
                f"{self.store.root} has a kernel for each of {self.store.manifest.num_outputs} outputs; use "
                f".output(k).{name.rpartition('/')[2]}"
            )
        return array_of(prefix_of(self._group, self._output), name)

    def _kernel(self, name: str) -> Kernel:
        return Kernel(self._array(self._name(name)), self.store.manifest.digest())

    def _array(self, name: str) -> StoredArray:
        if name not in self.store.arrays:
            raise StoreError(f"{self.store.root} has no {name}: it was made without test_inputs")
        return self.store.arrays[name]

    def _read_all(self, name: str) -> NDArray[Any]:
        array = self._array(name)
        _require_memory(array.layout.shape, array.layout.dtype, name)
        return array.read_samples(0, array.layout.shape[0]).astype(array.layout.dtype)


class KernelStore(KernelSet):
    """A kernel store, opened for reading.

    Attributes
    ----------
    store
        The arrays underneath.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)

    def __repr__(self) -> str:
        manifest, progress = self.manifest, self.progress
        return (
            f"<KernelStore {self.path} kind={manifest.kind} {manifest.train.num_samples} samples, "
            f"{manifest.num_outputs} outputs, {progress.tiles_done}/{progress.tiles_total} tiles>"
        )

    @property
    def path(self) -> Path | str:
        """Path or URL of the store."""
        return self.store.root

    @property
    def manifest(self) -> Manifest:
        """Everything that decided the numbers."""
        return self.store.manifest

    @property
    def progress(self) -> Progress:
        """What exists, from one listing; no tile is read."""
        done = total = num_bytes = 0
        for array in self.store.arrays.values():
            if array.layout.grid is not None:
                present = array.layout.num_chunks - len(array.missing())
                done, total = done + present, total + array.layout.num_chunks
                num_bytes += present * array.layout.chunk_bytes
        return Progress(done, total, num_bytes)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Name → parameters of each group that has kernels of its own."""
        return dict(self.manifest.groups)

    def group(self, name: str) -> KernelSet:
        """The kernels of one group of parameters.

        Raises
        ------
        ConfigError
            If the store has no such group; the message lists those that it has.
        """
        if name not in self.manifest.groups:
            known = ", ".join(map(repr, self.manifest.groups)) or "none"
            raise ConfigError(f"{self.path} has no group {name!r}; it has {known}")
        return KernelSet(self.store, name)

    @property
    def outputs(self) -> NDArray[Any]:
        """The model's outputs on the train samples, shape (N, O)."""
        return self._read_all("outputs/train")

    @property
    def test_outputs(self) -> NDArray[Any]:
        """The model's outputs on the test samples, shape (M, O)."""
        return self._read_all("outputs/test")

    @property
    def targets(self) -> NDArray[Any] | None:
        """Train targets, first axis N, or None if the store was made without."""
        return self._read_targets("train", self.manifest.train.targets is not None)

    @property
    def test_targets(self) -> NDArray[Any] | None:
        """Test targets, first axis M, or None if the store was made without."""
        test = self.manifest.test
        return self._read_targets("test", test is not None and test.targets is not None)

    def _read_targets(self, split: str, exists: bool) -> NDArray[Any] | None:
        return self._read_all(f"targets/{split}") if exists else None


def open_kernel(path: str | Path) -> KernelStore:
    """Open a kernel store, by path or URL, for reading; loads neither torch nor dask, and reads only the manifest.

    Raises
    ------
    StoreNotFoundError
        If there is nothing at the path.
    StoreError
        If what is there is not a kernel store, or its manifest is damaged.
    """
    return KernelStore(Store.open(path))
