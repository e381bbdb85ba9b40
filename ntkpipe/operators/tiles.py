"""Tiles of a stored symmetric matrix: their sources, how they are cut into shards, and the arithmetic on a tile."""

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.grid import Axis, Grid
from ntkpipe.base.operator import Statistics, digest_of
from ntkpipe.base.ranges import SquareSum
from ntkpipe.store.kernel import Kernel

TileIndex = tuple[int, int]
# Tiles with their indices, as :meth:`ntkpipe.operators.reading.TileReader.tiles` yields them.
Tiles = Iterable[tuple[TileIndex, NDArray[Any]]]

# Rows of a tile that are upcast at a time. With few columns they stay in the cache for both products, and OpenBLAS has
# kernels for small products (up to 10⁶ multiplications) that are twice as fast; with many columns large products win.
_SMALL_PRODUCT = 10**6
_FEW_ROWS = (32, 64)
_MANY_ROWS = 512
_DEFAULT_EDGE = 2048
# Number of shards → least number of tiles in each: enough for the threads of any cluster that the matrix is worth.
_TILES_OF_SHARDS = {128: 16, 64: 16, 32: 16, 16: 4, 8: 4, 4: 4, 2: 4}


class ReadableTiles(Protocol):
    """Tiles that a :class:`ntkpipe.operators.reading.TileReader` reads."""

    tile_bytes: int  # of one tile as it is read
    is_local: bool  # whether one reader at a time keeps the medium busy

    def read(self, index: TileIndex, buffer: NDArray[np.uint8] | None, /) -> NDArray[Any]:
        """Read a stored tile, into the buffer if there is one."""


class TileSource(ReadableTiles, Protocol):
    """Where tiles come from. It pickles, so that the workers of a cluster can read for themselves."""

    grid: Grid  # the tiles of a symmetric matrix
    rows_per_sample: int | None  # S of a kernel; None of an array, whose samples nobody knows
    dtype: np.dtype[Any]  # of the entries

    def identity(self) -> str:
        """Name of the matrix; see :meth:`ntkpipe.base.operator.Operator.identity`."""


class KernelTiles:
    """Tiles of a stored symmetric kernel, each verified by its checksum."""

    def __init__(self, kernel: Kernel) -> None:
        if not kernel.is_symmetric:
            raise ConfigError(f"{kernel!r} is not symmetric; needed the kernel of samples with themselves")
        self.kernel, self.grid, self.dtype = kernel, kernel.grid, kernel.dtype
        self.rows_per_sample: int | None = kernel.num_covectors
        self.tile_bytes, self.is_local = kernel.tile_bytes, kernel.is_local

    def identity(self) -> str:
        """See :class:`TileSource`."""
        return self.kernel.identity

    def read(self, index: TileIndex, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        """See :class:`TileSource`."""
        return self.kernel.read_stored(*index, buffer)


class ArrayTiles:
    """Tiles of any symmetric matrix that gives slices as arrays: a ``zarr.Array``, a memory map.

    Only the tiles on and above the diagonal are read. A memory map is pickled as the name of its file, which must be
    there where it is opened.
    """

    # Rows of a tile are best a multiple of the chunks of the array.
    def __init__(self, array: Any, edge: int = _DEFAULT_EDGE) -> None:
        shape, dtype = tuple(array.shape), np.dtype(array.dtype)
        if len(shape) != 2 or shape[0] != shape[1] or not shape[0] or dtype not in (np.float32, np.float64):
            raise ConfigError(f"a matrix of shape {shape} and dtype {dtype}; needed (n, n) in float32 or float64")
        axis = Axis(shape[0], 1, min(edge, shape[0]))
        self.array, self.edge, self.dtype = array, edge, dtype
        self.grid = Grid(axis, axis, symmetric=True)
        self.rows_per_sample: int | None = None
        self.tile_bytes = int(axis.tile) ** 2 * dtype.itemsize
        self.is_local = True

    def __reduce__(self) -> tuple[Any, ...]:
        if not isinstance(self.array, np.memmap):
            return ArrayTiles, (self.array, self.edge)
        base: Any = self.array.base
        if not isinstance(base, mmap.mmap):  # then numpy does not know where it begins
            raise ConfigError("part of a memory map cannot be sent to workers; give a numpy.memmap of that part")
        order: Literal["C", "F"] = "C" if self.array.flags.c_contiguous else "F"
        place = str(self.array.filename), self.array.dtype, self.array.offset, self.array.shape, order
        return _open_mapped, (*place, self.edge)

    def identity(self) -> str:
        """Digest of the diagonal tiles: reading a whole matrix for its name would take too long."""
        digests = "".join(digest_of(self.read((i, i), None)) for i in range(self.grid.rows.num_tiles))
        return digest_of(np.frombuffer(digests.encode(), np.uint8))

    def read(self, index: TileIndex, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        """See :class:`TileSource`; the array decides about memory."""
        del buffer
        rows, columns = self.grid.rows.rows(index[0]), self.grid.columns.rows(index[1])
        return np.asarray(self.array[rows.start : rows.stop, columns.start : columns.stop])


def _open_mapped(
    path: str, dtype: np.dtype[Any], offset: int, shape: tuple[int, int], order: Literal["C", "F"], edge: int
) -> ArrayTiles:
    return ArrayTiles(np.memmap(path, dtype, "r", offset, shape, order), edge)


@dataclass(frozen=True)
class Shard:
    """A run of stored tiles, in order: what one thread multiplies at a time."""

    number: int  # its place in the sum
    tiles: tuple[TileIndex, ...]  # at least one


def cut_shards(grid: Grid, num_rows: int) -> tuple[Shard, ...]:
    """Cut the tiles of the leading ``num_rows`` rows into runs of equal length: a power of two, at most 128."""
    # They and the order in which they are added depend on the matrix alone, so bits do not depend on who computes.
    edge = grid.rows.tile_rows
    tiles = [index for index in grid.tiles() if max(index) * edge < num_rows]
    count = next((count for count, least in _TILES_OF_SHARDS.items() if len(tiles) >= least * count), 1)
    cuts = [len(tiles) * number // count for number in range(count + 1)]
    return tuple(Shard(number, tuple(tiles[start:stop])) for number, (start, stop) in enumerate(pairwise(cuts)))


@dataclass(frozen=True)
class PartialProduct:
    """What some shards contribute to a product: rows from ``start`` on, shape (rows, r), float64."""

    start: int
    values: FloatArray


def multiply(tiles: Tiles, grid: Grid, block: FloatArray, memory: FloatArray | None = None) -> PartialProduct:
    """Multiply a block by some tiles, each used for itself and for its mirror."""
    edge, num_rows, start = grid.rows.tile_rows, len(block), 0
    product: FloatArray | None = None
    upcast = _Upcast(edge, block.shape[1])
    for (row, column), whole in tiles:
        if product is None:
            start = row * edge
            product = np.empty_like(block)[start:] if memory is None else memory[start:]
            product.fill(0.0)
        rows, columns = _span(row, edge, num_rows), _span(column, edge, num_rows)
        tile = whole[: _length(rows), : _length(columns)]
        of_rows = product[_moved(rows, start)]
        # The product with the mirrored tile is computed transposed, which is faster in BLAS.
        mirrored = np.zeros((block.shape[1], _length(columns))) if row != column else None
        for run, part in upcast.parts(tile):
            of_rows[run] += part @ block[columns]
            if mirrored is not None:
                mirrored += block[rows][run].T @ part
        if mirrored is not None:
            product[_moved(columns, start)] += mirrored.T
    assert product is not None
    return PartialProduct(start, product)


def scratch_bytes(edge: int, num_columns: int) -> int:
    """Memory of :func:`multiply` beside tile, block and result: upcast rows, and products before they are added."""
    return 8 * edge * (_rows_at_once(edge, num_columns) + 3 * num_columns)


def _rows_at_once(edge: int, num_columns: int) -> int:
    few = _SMALL_PRODUCT // (edge * num_columns)
    return min(edge, few, _FEW_ROWS[1]) if few >= _FEW_ROWS[0] else min(edge, _MANY_ROWS)


class _Upcast:
    """Converts tiles to float64 a run of rows at a time; memory is the longest run."""

    def __init__(self, edge: int, num_columns: int) -> None:
        self._step = _rows_at_once(edge, num_columns)
        self._edge = edge
        self._scratch: FloatArray | None = None

    def parts(self, tile: NDArray[Any]) -> Iterator[tuple[slice, FloatArray]]:
        """Yield the rows of a tile, each run valid until the next."""
        is_ready = tile.dtype == np.float64 and tile.dtype.isnative and tile.flags.aligned
        for first in range(0, len(tile), self._step):
            part = tile[first : first + self._step]
            if not is_ready:
                if self._scratch is None:
                    self._scratch = np.empty((self._step, self._edge))
                upcasted = self._scratch[: len(part), : tile.shape[1]]
                np.copyto(upcasted, part)
                part = upcasted
            yield slice(first, first + len(part)), part

    def arrays(self, tile: NDArray[Any]) -> Iterator[FloatArray]:
        """The same without the rows' numbers."""
        return (part for _, part in self.parts(tile))


# What some tiles contribute to the diagonal (start and entries of each run), and to the squared Frobenius norm.
PartialStatistics = tuple[list[tuple[int, FloatArray]], SquareSum]


def measure(tiles: Tiles, grid: Grid, num_rows: int) -> PartialStatistics:
    """Diagonal entries and sum of squares of some tiles, off-diagonal ones counted twice."""
    edge, squared = grid.rows.tile_rows, SquareSum()
    diagonals, upcast = [], _Upcast(edge, 1)
    for (row, column), whole in tiles:
        tile = whole[: num_rows - row * edge, : num_rows - column * edge]
        squared.add(partial(upcast.arrays, tile), 1.0 if row == column else 2.0)
        if row == column:
            diagonals.append((row * edge, tile.diagonal().astype(np.float64)))
    return diagonals, squared


def join_statistics(parts: Iterable[PartialStatistics], num_rows: int) -> Statistics:
    """Statistics of a matrix from those of its shards, in their order."""
    diagonal, squared = np.empty(num_rows), SquareSum()
    for diagonals, part in parts:
        squared += part
        for start, values in diagonals:
            diagonal[start : start + len(values)] = values
    return Statistics(diagonal, squared.root)


PlacedEntries = tuple[Any, NDArray[Any]]  # index of entries in the result of a request, and the entries


@dataclass(frozen=True)
class EntryRequest:
    """A request for a run of rows by some columns of the full matrix."""

    rows: slice
    columns: NDArray[np.int64]  # shape (c,); the result has shape (rows, c)

    def touches(self, index: TileIndex, grid: Grid) -> bool:
        """Whether it needs a stored tile."""
        edge = grid.rows.tile_rows
        wanted = range(self.rows.start // edge, -(-self.rows.stop // edge))
        others = [other for one, other in (index, index[::-1]) if one in wanted]
        return bool(np.isin(self.columns // edge, others).any())

    def entries(self, tiles: Tiles, grid: Grid, num_rows: int) -> Iterator[PlacedEntries]:
        """Yield what tiles contribute to the result, every entry once; valid until the next."""
        for of_rows, of_columns, values in _mirrored(tiles, grid.rows.tile_rows, num_rows):
            rows = slice(max(self.rows.start, of_rows.start), min(self.rows.stop, of_rows.stop))
            here = np.flatnonzero((self.columns >= of_columns.start) & (self.columns < of_columns.stop))
            if rows.start < rows.stop and here.size:
                inside = _moved(rows, of_rows.start), self.columns[here] - of_columns.start
                yield (_moved(rows, self.rows.start), here), values[inside]


def touched_shards(shards: Iterable[Shard], request: EntryRequest, grid: Grid) -> tuple[Shard, ...]:
    """Shards reduced to the tiles that a request touches; those without any are left out."""
    touched = ((shard.number, tuple(t for t in shard.tiles if request.touches(t, grid))) for shard in shards)
    return tuple(Shard(number, tiles) for number, tiles in touched if tiles)


def _mirrored(tiles: Tiles, edge: int, num_rows: int) -> Iterator[tuple[slice, slice, NDArray[Any]]]:
    """Yield rows, columns and entries of each tile and of its mirror below the diagonal."""
    for (row, column), tile in tiles:
        rows, columns = _span(row, edge, num_rows), _span(column, edge, num_rows)
        yield rows, columns, tile
        if row != column:
            yield columns, rows, tile.T


def _span(tile: int, edge: int, num_rows: int) -> slice:
    return slice(tile * edge, min((tile + 1) * edge, num_rows))


def _length(run: slice) -> int:
    return int(run.stop - run.start)


def _moved(run: slice, origin: int) -> slice:
    return slice(run.start - origin, run.stop - origin)
