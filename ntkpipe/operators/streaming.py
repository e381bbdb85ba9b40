"""A stored matrix as an operator on this machine: its tiles stream by, each used for both halves."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.operator import Operator, Statistics, Work
from ntkpipe.operators.reading import TileReader, buffer_bytes
from ntkpipe.operators.shards import ShardResult, map_shards, multiply_shards, num_blocks_in_use
from ntkpipe.operators.tiles import (
    EntryRequest,
    Shard,
    Tiles,
    TileSource,
    cut_shards,
    join_statistics,
    measure,
    scratch_bytes,
    touched_shards,
)


class TiledOperator(Operator):
    """A symmetric matrix of stored tiles, or a leading block of one; subclasses decide where tiles are read."""

    def __init__(self, source: TileSource, num_rows: int) -> None:
        super().__init__(num_rows, source.dtype)
        self._source = source
        self._shards = cut_shards(source.grid, num_rows)

    def identity(self) -> str:
        """See :meth:`Operator.identity`."""
        whole = self._source.identity()
        return whole if self.num_rows == self._source.grid.shape[0] else f"leading({whole}, {self.num_rows})"

    @property
    def rows_per_sample(self) -> int | None:
        """See :attr:`Operator.rows_per_sample`."""
        return self._source.rows_per_sample

    def _columns(self, indices: NDArray[np.int64]) -> FloatArray:
        return self._entries(EntryRequest(slice(0, self.num_rows), indices))

    def _block(self, rows: slice, columns: slice) -> FloatArray:
        return self._entries(EntryRequest(rows, np.arange(columns.start, columns.stop)))

    def _entries(self, request: EntryRequest) -> FloatArray:
        values = np.empty((request.rows.stop - request.rows.start, len(request.columns)))
        if values.size:
            self._gather(request, values)
        return values

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
        self, reader: TileReader[TileSource], *, threads: int, num_rows: int | None = None, room: int | None = None
    ) -> None:
        super().__init__(reader.source, num_rows or reader.source.grid.shape[0])
        self._reader = reader
        self._room = room
        self._num_threads = threads

    @property
    def share_kept(self) -> float:
        """Share of the tiles that stays in memory."""
        return self._reader.share_kept

    @property
    def work(self) -> Work:
        """See :attr:`Operator.work`; a pass is all tiles of the whole matrix."""
        return self._reader.work

    @property
    def buffer_bytes(self) -> int:
        """See :attr:`Operator.buffer_bytes`."""
        return buffer_bytes(self._source, self._num_threads)

    def _leading(self, num_rows: int) -> Operator:
        return StreamingOperator(self._reader, threads=self._num_threads, num_rows=num_rows, room=self._room)

    def _multiply(self, block: FloatArray) -> FloatArray:
        start, grid = perf_counter(), self._source.grid
        if self._room is not None:
            products = num_blocks_in_use(self._num_threads, len(self._shards)) * block.nbytes
            scratch = self._num_threads * scratch_bytes(grid.rows.tile_rows, block.shape[1])
            if self._room - products - scratch < self._reader.cache_bytes:
                self._reader.keep(self._room - products - scratch)
        try:
            return multiply_shards(grid, block, self._shards, self._reader.tiles, self._num_threads).total
        finally:
            self._reader.seconds += perf_counter() - start

    def _measure(self) -> Statistics:
        parts = self._map(lambda tiles: measure(tiles, self._source.grid, self.num_rows), self._shards)
        return join_statistics(parts, self.num_rows)

    def _gather(self, request: EntryRequest, values: FloatArray) -> None:
        def place(tiles: Tiles) -> None:
            for where, entries in request.entries(tiles, self._source.grid, self.num_rows):
                values[where] = entries

        for _ in self._map(place, touched_shards(self._shards, request, self._source.grid)):
            pass

    def _map(self, work: Callable[[Tiles], ShardResult], shards: tuple[Shard, ...]) -> Iterator[ShardResult]:
        """Yield the result of ``work`` on the tiles of each shard, in order."""
        start = perf_counter()
        try:
            yield from map_shards(work, shards, self._reader.tiles, self._num_threads)
        finally:
            self._reader.seconds += perf_counter() - start

    def close(self) -> None:
        """See :meth:`Operator.close`."""
        self._reader.close()
