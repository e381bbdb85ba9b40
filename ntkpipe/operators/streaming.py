"""A stored matrix as an operator: shards of its tiles, the arithmetic on them, and threads that work through them."""

import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray, SquareSum
from ntkpipe.base.blas import single_threaded_blas
from ntkpipe.base.grid import Grid
from ntkpipe.base.operator import Operator, Statistics, Work
from ntkpipe.operators.tiles import MatrixTiles, TileIndex, TileReader, Tiles, buffer_bytes

ShardResult = TypeVar("ShardResult")

SumNode = tuple[int, int]  # level and index: the sum of shards 2^level * index to 2^level * (index + 1)

# Rows of a tile that are upcast at a time. With few columns they stay in the cache for both products, and OpenBLAS has
# kernels for small products (up to 10⁶ multiplications) that are twice as fast; with many columns large products win.
_SMALL_PRODUCT = 10**6
_FEW_ROWS = (32, 64)
_MANY_ROWS = 512
# Number of shards → least number of tiles in each: enough for the threads of any cluster that the matrix is worth.
_TILES_OF_SHARDS = {128: 16, 64: 16, 32: 16, 16: 4, 8: 4, 4: 4, 2: 4}


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


def multiply(tiles: Tiles, grid: Grid, block: FloatArray, memory: FloatArray) -> FloatArray:
    """Multiply a block by some tiles, each used for itself and for its mirror, into memory of the block's shape.

    Returned are the last rows of that, from the first one on that the tiles have.
    """
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
    return memory[start:]


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

    def touched(self, shards: Iterable[Shard], grid: Grid) -> tuple[Shard, ...]:
        """Shards reduced to the tiles that it needs; those without any are left out."""
        touched = ((shard.number, tuple(t for t in shard.tiles if self.touches(t, grid))) for shard in shards)
        return tuple(Shard(number, tiles) for number, tiles in touched if tiles)

    def entries(self, tiles: Tiles, grid: Grid) -> Iterator[PlacedEntries]:
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


class PassStopped(Exception):  # noqa: N818 - a request, not an error
    """Raised in a shard when another one has failed, or nobody waits for the pass any more."""


class PairwiseSum:
    """Adds partial products of neighbouring shards, then of neighbouring pairs, and so on.

    So whoever has neighbours may add them, in any order of arrival, and the bits are the same. The error grows with
    the logarithm of the number of parts (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2).
    """

    def __init__(self) -> None:
        self.parts: dict[SumNode, FloatArray] = {}

    def add(self, node: SumNode, part: FloatArray) -> list[FloatArray]:
        """Add a part, the last rows of a product, into the memory of earlier ones; returns what is not needed more."""
        done = []
        level, index = node
        while (other := self.parts.pop((level, index ^ 1), None)) is not None:
            # The rows of a shard begin at or below the first row of the shard before.
            into, added = (other, part) if index % 2 else (part, other)
            into[len(into) - len(added) :] += added
            done.append(added)
            part, level, index = into, level + 1, index // 2
        self.parts[level, index] = part
        return done

    @property
    def total(self) -> FloatArray:
        """The sum of all shards."""
        (part,) = self.parts.values()
        return part


@dataclass(frozen=True)
class ShardThreads:
    """Threads that work through shards of a matrix, each with single-threaded BLAS."""

    grid: Grid
    read: Callable[[tuple[TileIndex, ...]], Tiles]
    number: int
    is_unwanted: Callable[[], bool] = lambda: False

    def map(self, work: Callable[[Tiles], ShardResult], shards: Iterable[Shard]) -> Iterator[ShardResult]:
        """Yield the result of ``work`` on the tiles of each shard, in order; threads are at most one shard ahead."""
        stop = threading.Event()

        def watched(tiles: Tiles) -> Iterator[tuple[TileIndex, Any]]:
            for item in tiles:
                if stop.is_set() or self.is_unwanted():
                    raise PassStopped
                yield item

        waiting: list[Future[ShardResult]] = []
        with single_threaded_blas(), ThreadPoolExecutor(self.number) as threads:
            try:
                for shard in shards:
                    # Read from here and not in the thread: the first tile comes while others are still multiplied.
                    waiting.append(threads.submit(work, watched(self.read(shard.tiles))))
                    if len(waiting) > self.number:
                        yield waiting.pop(0).result()
                while waiting:
                    yield waiting.pop(0).result()
            finally:
                stop.set()
                for future in waiting:
                    future.cancel()

    def multiply(self, block: FloatArray, shards: tuple[Shard, ...]) -> PairwiseSum:
        """Sum what shards contribute to ``K @ block``; memory is :func:`num_blocks_in_use` blocks."""
        total = PairwiseSum()
        free: deque[FloatArray] = deque()

        def work(tiles: Tiles) -> FloatArray:
            try:
                # Page faults of fresh memory would take as long as a tile.
                memory = free.pop()
            except IndexError:
                memory = np.empty_like(block)
            return multiply(tiles, self.grid, block, memory)

        for shard, part in zip(shards, self.map(work, shards), strict=True):
            for done in total.add((0, shard.number), part):
                assert done.base is not None
                free.append(done.base)
        return total


def num_blocks_in_use(num_threads: int, num_shards: int) -> int:
    """Blocks that a product holds at most: one in each thread, one waiting, and those not yet added."""
    return num_threads + 1 + num_shards.bit_length()


class TiledOperator(Operator):
    """A symmetric matrix of stored tiles, or a leading block of one; subclasses decide where tiles are read."""

    def __init__(self, source: MatrixTiles, num_rows: int) -> None:
        super().__init__(num_rows, source.dtype)
        self._source, self.rows_per_sample = source, source.rows_per_sample
        self._shards = cut_shards(source.grid, num_rows)

    def identity(self) -> str:
        """See :meth:`Operator.identity`."""
        whole = self._source.identity()
        return whole if self.num_rows == self._source.grid.shape[0] else f"leading({whole}, {self.num_rows})"

    def _columns(self, indices: NDArray[np.int64]) -> FloatArray:
        return self._entries(EntryRequest(slice(0, self.num_rows), indices))

    def _block(self, rows: slice, columns: slice) -> FloatArray:
        return self._entries(EntryRequest(rows, np.arange(columns.start, columns.stop)))

    def _entries(self, request: EntryRequest) -> FloatArray:
        values = np.empty((request.rows.stop - request.rows.start, len(request.columns)))
        if values.size:
            self._gather(request, values)
        return values

    def _measure(self) -> Statistics:
        return join_statistics(self._measured(), self.num_rows)

    @abstractmethod
    def _measured(self) -> Iterable[PartialStatistics]:
        """What :func:`measure` finds of each shard, in their order."""

    @abstractmethod
    def _gather(self, request: EntryRequest, values: FloatArray) -> None:
        """Fill ``values`` with the requested entries."""


class StreamingOperator(TiledOperator):
    """A symmetric matrix of tiles, read from its store in every pass except for those that stay in memory.

    Threads take shards of tiles, others read ahead; the number of threads changes no bit. Memory is the reader's, a
    block of the shape of the product and some megabytes for each thread, and three such blocks, up to five for 128
    shards. Tiles in memory give way to all this, for good, where there is no room for both.
    """

    def __init__(
        self,
        source: MatrixTiles,
        reader: TileReader,
        *,
        threads: int,
        num_rows: int | None = None,
        room: int | None = None,
    ) -> None:
        super().__init__(source, num_rows or source.grid.shape[0])
        self._reader, self._room = reader, room
        self._threads = ShardThreads(source.grid, reader.tiles, threads)
        self.buffer_bytes = buffer_bytes(source, threads)

    @property
    def share_kept(self) -> float:
        """Share of the tiles that stays in memory."""
        return self._reader.share_kept

    @property
    def work(self) -> Work:
        """See :attr:`Operator.work`; a pass is all tiles of the whole matrix."""
        return self._reader.work

    def _leading(self, num_rows: int) -> Operator:
        threads, room = self._threads.number, self._room
        return StreamingOperator(self._source, self._reader, threads=threads, num_rows=num_rows, room=room)

    def _multiply(self, block: FloatArray) -> FloatArray:
        start, grid = perf_counter(), self._source.grid
        if self._room is not None:
            products = num_blocks_in_use(self._threads.number, len(self._shards)) * block.nbytes
            scratch = self._threads.number * scratch_bytes(grid.rows.tile_rows, block.shape[1])
            if self._room - products - scratch < self._reader.cache_bytes:
                self._reader.keep(self._room - products - scratch)
        try:
            return self._threads.multiply(block, self._shards).total
        finally:
            self._reader.seconds += perf_counter() - start

    def _measured(self) -> Iterator[PartialStatistics]:
        return self._map(lambda tiles: measure(tiles, self._source.grid, self.num_rows), self._shards)

    def _gather(self, request: EntryRequest, values: FloatArray) -> None:
        def place(tiles: Tiles) -> None:
            for where, entries in request.entries(tiles, self._source.grid):
                values[where] = entries

        for _ in self._map(place, request.touched(self._shards, self._source.grid)):
            pass

    def _map(self, work: Callable[[Tiles], ShardResult], shards: tuple[Shard, ...]) -> Iterator[ShardResult]:
        """Yield the result of ``work`` on the tiles of each shard, in order."""
        start = perf_counter()
        try:
            yield from self._threads.map(work, shards)
        finally:
            self._reader.seconds += perf_counter() - start

    def close(self) -> None:
        """See :meth:`Operator.close`."""
        self._reader.close()
