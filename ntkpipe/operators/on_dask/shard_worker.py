"""What runs in each worker of a cluster: it holds shards of a stored matrix, and answers one request in each pass."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from distributed import get_worker

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.operator import digest_of
from ntkpipe.executors.pool import is_cancelled, is_leaving, without_frames
from ntkpipe.operators.streaming import EntryRequest, Shard, ShardThreads, cut_shards, measure
from ntkpipe.operators.tiles import MatrixTiles, TileReader, Tiles


@dataclass(frozen=True)
class PassRequest:
    """What the driver wants of one worker in one pass."""

    num_rows: int  # of the leading block that is used
    shards: tuple[int, ...]  # numbers of the shards to use
    owned: tuple[int, ...]  # numbers of the shards whose tiles this worker may cache
    cache_bytes: int  # for these tiles
    threads: int
    entries: EntryRequest | None  # to return; if none, a product where a block comes along, statistics otherwise


@dataclass(frozen=True)
class PassReply:
    """Results of one worker, and what they and everything else since its last reply have cost."""

    results: Mapping[Any, Any]  # partial products by node of the sum; statistics or placed entries by shard number
    num_tiles: int  # that were used
    bytes_read: int  # from the store
    num_kept: Mapping[int, int]  # tiles in memory, by the rows of the leading block whose shards hold them


class ShardWorker:
    """Tiles of one matrix in one worker. Dask owns it: where the driver is gone, its memory is freed.

    A leading block has shards of its own. The block that was used last may cache its tiles where there is no memory
    for those of several.
    """

    def __init__(self, source: MatrixTiles) -> None:
        self._source = source
        self._readers: dict[int, TileReader] = {}
        self._shards: dict[int, tuple[Shard, ...]] = {}
        self._cached: dict[int, tuple[tuple[int, ...], int]] = {}  # owned shards and bytes of a reader, by rows
        self._counted = (0, 0)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["ShardWorker"], tuple[MatrixTiles]]:
        # Where Dask moves it, or writes it to disk for lack of memory, tiles are left behind.
        return ShardWorker, (self._source,)

    def run(
        self, request: PassRequest, block: FloatArray | None, is_unwanted: Callable[[], bool] = lambda: False
    ) -> PassReply:
        """Do what is requested, until ``is_unwanted``."""
        reader, all_shards = self._open(request)
        grid, entries = self._source.grid, request.entries
        shards = tuple(all_shards[number] for number in request.shards)
        if entries is not None:
            shards = entries.touched(shards, grid)

        def work(tiles: Tiles) -> Any:
            if entries is None:
                return measure(tiles, grid, request.num_rows)
            # Copied in the stored dtype: nothing more travels.
            return [(where, np.array(values)) for where, values in entries.entries(tiles, grid)]

        threads = ShardThreads(grid, reader.tiles, request.threads, is_unwanted)
        results: dict[Any, Any]
        if block is not None:
            # BLAS does not take arrays at odd addresses, as they come by network; numpy's own loops give other bits.
            aligned = np.require(block, np.float64, ["C", "ALIGNED"])
            results = dict(threads.multiply(aligned, shards).parts)
        else:
            results = dict(zip((shard.number for shard in shards), threads.map(work, shards), strict=True))
        with self._lock:
            num_tiles = sum(each.num_given for each in self._readers.values())
            bytes_read = sum(each.work.bytes_read for each in self._readers.values())
            before, self._counted = self._counted, (num_tiles, bytes_read)
            num_kept = {num_rows: each.num_kept for num_rows, each in self._readers.items()}
        return PassReply(results, num_tiles - before[0], bytes_read - before[1], num_kept)

    def _open(self, request: PassRequest) -> tuple[TileReader, tuple[Shard, ...]]:
        """Reader and shards of the leading block, made at the first request for it."""
        num_rows = request.num_rows
        with self._lock:
            if num_rows not in self._readers:
                self._shards[num_rows] = cut_shards(self._source.grid, num_rows)
                self._readers[num_rows] = TileReader(self._source, (), cache_bytes=0, streams=request.threads)
            reader, shards = self._readers[num_rows], self._shards[num_rows]
            if self._cached.get(num_rows) != (request.owned, request.cache_bytes):
                self._cache(request, reader, [tile for number in request.owned for tile in shards[number].tiles])
        return reader, shards

    def _cache(self, request: PassRequest, reader: TileReader, tiles: list[tuple[int, int]]) -> None:
        """Let a reader cache tiles; other leading blocks give theirs up where there is no room for both."""
        others = [number for number in self._cached if number != request.num_rows]
        taken = sum(self._readers[number].num_kept for number in others) * self._source.tile_bytes
        if taken + len(tiles) * self._source.tile_bytes > request.cache_bytes:
            for number in others:
                del self._cached[number]
                self._readers[number].keep(0)
                self._readers[number].close()
            taken = 0
        reader.keep(request.cache_bytes - taken, tiles)
        self._cached[request.num_rows] = request.owned, request.cache_bytes


def compare_first_tile(source: MatrixTiles, digest: str) -> str:
    """Why this worker cannot read what the driver reads; empty if it can."""
    try:
        is_same = digest_of(source.read((0, 0), None)) == digest
    except OSError as error:
        return str(error)
    return "" if is_same else "reads another first tile than this process: another disk at the same path?"


def run_pass(shard_worker: ShardWorker, request: PassRequest, block: FloatArray | None) -> PassReply:
    """Task of one worker in each pass; it ends early where Dask has cancelled it."""
    worker = get_worker()
    task = worker.get_current_task()
    with without_frames():
        return shard_worker.run(request, block, lambda: is_cancelled(worker, task) or is_leaving(worker))
