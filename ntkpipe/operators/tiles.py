"""Tiles of a stored symmetric matrix: their sources, how they are cut into shards, and the arithmetic on a tile."""

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

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
        order = "C" if self.array.flags.c_contiguous else "F"
        place = (str(self.array.filename), self.dtype, "r", self.array.offset, self.array.shape, order)
        return _open_mapped, (self.edge, *place)

    def identity(self) -> str:
        """Digest of the diagonal tiles: reading a whole matrix for its name would take too long."""
        digests = "".join(digest_of(self.read((i, i), None)) for i in range(self.grid.rows.num_tiles))
        return digest_of(np.frombuffer(digests.encode(), np.uint8))

    def read(self, index: TileIndex, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        """See :class:`TileSource`; the array decides about memory."""
        del buffer
        rows, columns = self.grid.rows.rows(index[0]), self.grid.columns.rows(index[1])
        return np.asarray(self.array[rows.start : rows.stop, columns.start : columns.stop])


def _open_mapped(edge: int, *place: Any) -> ArrayTiles:
    return ArrayTiles(np.memmap(*place), edge)


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


def multiply(tiles: Tiles, grid: Grid, block: FloatArray, memory: FloatArray) -> PartialProduct:
    """Multiply a block by some tiles, each used for itself and for its mirror, into memory of the block's shape."""
    edge, start, num_columns = grid.rows.tile_rows, len(block), block.shape[1]
    scratch = _scratch(edge, num_columns)
    for (row, column), whole in tiles:
        rows, columns = (slice(tile * edge, (tile + 1) * edge) for tile in (row, column))
        if start == len(block):  # the first tile
            start = rows.start
            memory[start:] = 0.0
        tile = whole[: len(block) - rows.start, : len(block) - columns.start]
        of_rows, block_of_rows = memory[rows], block[rows]
        # The product with the mirrored tile is computed transposed, which is faster in BLAS.
        mirrored = np.zeros((num_columns, tile.shape[1]))
        for number, part in enumerate(_upcast(tile, scratch)):
            run = slice(number * len(scratch), (number + 1) * len(scratch))
            of_rows[run] += part @ block[columns]
            if row != column:
                mirrored += block_of_rows[run].T @ part
        if row != column:
            memory[columns] += mirrored.T
    return PartialProduct(start, memory[start:])


def scratch_bytes(edge: int, num_columns: int) -> int:
    """Memory of :func:`multiply` beside tile, block and result: upcast rows, and products before they are added."""
    return 8 * edge * (_rows_at_once(edge, num_columns) + 3 * num_columns)


def _rows_at_once(edge: int, num_columns: int) -> int:
    few = _SMALL_PRODUCT // (edge * num_columns)
    return min(edge, few, _FEW_ROWS[1]) if few >= _FEW_ROWS[0] else min(edge, _MANY_ROWS)


def _scratch(edge: int, num_columns: int) -> FloatArray:
    return np.empty((_rows_at_once(edge, num_columns), edge))


def _upcast(tile: NDArray[Any], scratch: FloatArray) -> Iterator[FloatArray]:
    """Yield the rows of a tile in float64, as many as ``scratch`` has at a time; each run is valid until the next."""
    is_ready = tile.dtype == np.float64 and tile.dtype.isnative and tile.flags.aligned
    for first in range(0, len(tile), len(scratch)):
        part = tile[first : first + len(scratch)]
        if not is_ready:
            upcast = scratch[: len(part), : tile.shape[1]]
            np.copyto(upcast, part)
            part = upcast
        yield part


# What some tiles contribute to the diagonal (start and entries of each run), and to the squared Frobenius norm.
PartialStatistics = tuple[list[tuple[int, FloatArray]], SquareSum]


def measure(tiles: Tiles, grid: Grid, num_rows: int) -> PartialStatistics:
    """Diagonal entries and sum of squares of some tiles, off-diagonal ones counted twice."""
    edge, squared = grid.rows.tile_rows, SquareSum()
    diagonals, scratch = [], _scratch(edge, 1)
    for (row, column), whole in tiles:
        tile = whole[: num_rows - row * edge, : num_rows - column * edge]
        squared.add(partial(_upcast, tile, scratch), 1.0 if row == column else 2.0)
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
        edge = grid.rows.tile_rows
        for (row, column), tile in tiles:
            mirrored = [(column, row, tile.T)] if row != column else []
            for of_rows, of_columns, values in ((row, column, tile), *mirrored):
                origin = of_rows * edge
                first, last = max(self.rows.start, origin), min(self.rows.stop, origin + edge)
                here = np.flatnonzero(self.columns // edge == of_columns)
                if first < last and here.size:
                    inside = values[first - origin : last - origin, self.columns[here] - of_columns * edge]
                    yield (slice(first - self.rows.start, last - self.rows.start), here), inside


def touched_shards(shards: Iterable[Shard], request: EntryRequest, grid: Grid) -> tuple[Shard, ...]:
    """Shards reduced to the tiles that a request touches; those without any are left out."""
    touched = ((shard.number, tuple(t for t in shard.tiles if request.touches(t, grid))) for shard in shards)
    return tuple(Shard(number, tiles) for number, tiles in touched if tiles)
