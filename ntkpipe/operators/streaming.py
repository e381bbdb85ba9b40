"""A stored matrix as an operator on this machine: its tiles pass by, each used for both halves."""

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.operator import Operator, Statistics, Work
from ntkpipe.operators.reading import TileReader, buffer_bytes
from ntkpipe.operators.shards import map_shards, multiply_shards
from ntkpipe.operators.tiled import TiledOperator, join_measures
from ntkpipe.operators.tiles import Columns, Rectangle, Shard, Tiles, cut_shards, measure, scratch_bytes

Found = TypeVar("Found")


class StreamingOperator(TiledOperator):
    """A symmetric matrix of tiles, read from its store in every pass but for those that are kept.

    Threads take shards of tiles and multiply them with single-threaded BLAS; others read ahead. Results are added by
    pairs of neighbours, so the number of threads changes no bit. Memory is the reader's, for each thread a block of the
    shape of the product and some megabytes, and three such blocks, up to five for 128 shards. Tiles that are kept give
    way to all this, for good, where there is no room for both.
    """

    def __init__(
        self, reader: TileReader, *, threads: int, num_rows: int | None = None, room: int | None = None
    ) -> None:
        self._reader = reader
        self._room = room
        self._grid = reader.source.grid
        self._num_threads = threads
        super().__init__(num_rows or self._grid.shape[0], reader.source.dtype)
        self._shards = cut_shards(self._grid, self.num_rows)

    @property
    def share_kept(self) -> float:
        """Share of the tiles that is kept in memory."""
        return self._reader.share_kept

    @property
    def work(self) -> Work:
        """See :attr:`Operator.work`; a pass is all tiles of the whole matrix."""
        return self._reader.work

    @property
    def buffer_bytes(self) -> int:
        """See :attr:`Operator.buffer_bytes`."""
        return buffer_bytes(self._reader.source, self._num_threads)

    def identity(self) -> str:
        """See :meth:`Operator.identity`."""
        whole = self._reader.source.identity()
        return whole if self.num_rows == self._grid.shape[0] else f"leading({whole}, {self.num_rows})"

    def _leading(self, num_rows: int) -> Operator:
        return StreamingOperator(self._reader, threads=self._num_threads, num_rows=num_rows, room=self._room)

    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        start = perf_counter()
        if self._room is not None:
            products = self._num_threads + 1 + len(self._shards).bit_length()  # in threads, waiting, not yet added
            scratch = self._num_threads * scratch_bytes(self._grid.rows.tile_rows, block.shape[1])
            self._reader.keep_at_most(self._room - products * block.nbytes - scratch)
        try:
            return multiply_shards(self._grid, block, self._shards, self._reader.tiles, self._num_threads).total
        finally:
            self._reader.add_seconds(perf_counter() - start)

    def _measure(self) -> Statistics:
        found = self._map(lambda tiles: measure(tiles, self._grid, self.num_rows), self._shards)
        return join_measures(found, self.num_rows)

    def _gather(self, request: Columns | Rectangle, shape: tuple[int, int]) -> NDArray[np.float64]:
        values = np.empty(shape)

        def place(tiles: Tiles) -> None:
            for where, entries in request.pieces(tiles, self._grid, self.num_rows):
                values[where] = entries

        touched = (tuple(t for t in shard.tiles if request.touches(t, self._grid)) for shard in self._shards)
        for _ in self._map(place, tuple(Shard(number, tiles) for number, tiles in enumerate(touched) if tiles)):
            pass
        return values

    def _map(self, work: Callable[[Tiles], Found], shards: tuple[Shard, ...]) -> Iterator[Found]:
        """What ``work`` finds in the tiles of each shard, in order."""
        start = perf_counter()
        try:
            yield from map_shards(work, shards, self._reader.tiles, self._num_threads)
        finally:
            self._reader.add_seconds(perf_counter() - start)

    def close(self) -> None:
        """See :meth:`Operator.close`."""
        self._reader.close()
