"""What a worker of a cluster has of a stored matrix: shards of its tiles, some of them in memory; what it answers."""

import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from distributed import get_worker
from distributed.core import Status
from numpy.typing import NDArray

from ntkpipe.base.errors import StoreError
from ntkpipe.base.operator import digest_of
from ntkpipe.base.resources import available_memory, process_memory
from ntkpipe.operators.reading import TileReader
from ntkpipe.operators.shards import map_shards, multiply_shards
from ntkpipe.operators.tiles import Columns, Piece, Rectangle, Shard, Tiles, TileSource, cut_shards, measure

# What a pass is for: a product with a block, statistics, or entries.
Request = Columns | Rectangle | None

_LEAVING = (Status.closing, Status.closing_gracefully, Status.closed)


@dataclass(frozen=True)
class Order:
    """What one worker is asked for in one pass."""

    num_rows: int  # of the leading block that is looked at
    shards: tuple[int, ...]  # numbers of those that are wanted
    owned: tuple[int, ...]  # numbers of those whose tiles this worker may keep
    cache_bytes: int  # how many bytes of these
    threads: int  # that work
    # Entries that are wanted; none for a product where there is a block, and for statistics where there is none
    request: Request


@dataclass(frozen=True)
class Answer:
    """What a worker found in its shards, and what that and all since its last answer have cost."""

    found: Mapping[Any, Any]  # by number of the shard its measure or pieces; by node the part of a product
    num_tiles: int  # num_tiles, bytes_read: tiles that were used, and bytes that came from the store
    bytes_read: int
    num_kept: Mapping[int, int]  # tiles in memory, by the rows of the leading block whose shards hold them


@dataclass(frozen=True)
class Report:
    """What a worker is.

    Attributes
    ----------
    host
        Its name.
    version
        Of this package.
    threads
        That its Dask has.
    memory_limit
        Bytes that it may use before its Dask ends it; none if nothing does.
    base_memory
        Bytes that it holds now.
    available_memory
        Bytes that are free on its host.
    digest
        Of the first tile as it reads it.
    problem
        Why it cannot read it.
    """

    host: str
    version: str
    threads: int
    memory_limit: int | None
    base_memory: int
    available_memory: int
    digest: str
    problem: str


class Holder:
    """Tiles of one matrix in one worker. Its Dask owns it: where the driver is gone, the memory is free.

    A leading block has shards of its own. The one that is used last may keep its tiles where there is no memory for
    those of several.
    """

    def __init__(self, source: TileSource) -> None:
        self._source = source
        self._readers: dict[int, TileReader] = {}
        self._shards: dict[int, tuple[Shard, ...]] = {}
        self._kept: dict[int, tuple[tuple[int, ...], int]] = {}  # what the readers were told, by rows
        self._counted = (0, 0)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Holder"], tuple[TileSource]]:
        # Where Dask moves it, or writes it to disk for lack of memory, tiles are left behind.
        return Holder, (self._source,)

    def first_tile(self) -> str:
        """Digest of it."""
        return digest_of(self._source.read((0, 0), None))

    def answer(
        self, order: Order, block: NDArray[np.float64] | None, is_unwanted: Callable[[], bool] = lambda: False
    ) -> Answer:
        """Do what is asked for."""
        # What came by network may lie at any address, where BLAS does not take it; numpy's own loops have other bits.
        aligned = None if block is None else np.require(block, np.float64, ["C", "ALIGNED"])
        reader, every = self._open(order)
        grid, request = self._source.grid, order.request
        shards = tuple(every[number] for number in order.shards)
        if request is not None:
            touched = [tuple(t for t in shard.tiles if request.touches(t, grid)) for shard in shards]
            shards = tuple(Shard(shard.number, tiles) for shard, tiles in zip(shards, touched, strict=True) if tiles)

        def work(tiles: Tiles) -> Any:
            if request is not None:
                return _copied(request, tiles, grid, order.num_rows)
            return measure(tiles, grid, order.num_rows)

        found: dict[Any, Any]
        if aligned is not None:
            found = dict(multiply_shards(grid, aligned, shards, reader.tiles, order.threads, is_unwanted).parts)
        else:
            numbers = (shard.number for shard in shards)
            found = dict(zip(numbers, map_shards(work, shards, reader.tiles, order.threads, is_unwanted), strict=True))
        with self._lock:
            num_tiles = sum(each.num_given for each in self._readers.values())
            bytes_read = sum(each.work.bytes_read for each in self._readers.values())
            before, self._counted = self._counted, (num_tiles, bytes_read)
            num_kept = {num_rows: each.num_kept for num_rows, each in self._readers.items()}
        return Answer(found, num_tiles - before[0], bytes_read - before[1], num_kept)

    def _open(self, order: Order) -> tuple[TileReader, tuple[Shard, ...]]:
        with self._lock:
            if order.num_rows not in self._readers:
                self._shards[order.num_rows] = cut_shards(self._source.grid, order.num_rows)
                self._readers[order.num_rows] = TileReader(self._source, (), cache_bytes=0, streams=order.threads)
            reader, shards = self._readers[order.num_rows], self._shards[order.num_rows]
            if self._kept.get(order.num_rows) != (order.owned, order.cache_bytes):
                self._keep(order, reader, [tile for number in order.owned for tile in shards[number].tiles])
        return reader, shards

    def _keep(self, order: Order, reader: TileReader, tiles: list[tuple[int, int]]) -> None:
        others = [number for number in self._kept if number != order.num_rows]
        taken = sum(self._readers[number].num_kept for number in others) * self._source.tile_bytes
        if taken + len(tiles) * self._source.tile_bytes > order.cache_bytes:
            for number in others:
                del self._kept[number]
                self._readers[number].keep(0)
                self._readers[number].close()
            taken = 0
        reader.keep(order.cache_bytes - taken, tiles)
        self._kept[order.num_rows] = order.owned, order.cache_bytes

    def close(self) -> None:
        """Let go of memory and threads."""
        with self._lock:
            for reader in self._readers.values():
                reader.close()


def _copied(request: Columns | Rectangle, tiles: Tiles, grid: Any, num_rows: int) -> list[Piece]:
    """Entries in the dtype that is stored: nothing more travels."""
    return [(where, np.array(entries)) for where, entries in request.pieces(tiles, grid, num_rows)]


def open_holder(source: TileSource) -> Holder:
    """What Dask runs first in a worker."""
    return Holder(source)


def report(holder: Holder) -> Report:
    """What Dask runs next: what the worker is, and whether it reaches the store."""
    worker, digest, problem = get_worker(), "", ""
    base = process_memory()
    try:
        digest = holder.first_tile()
    except (StoreError, OSError) as error:
        problem = str(error)
    return Report(
        host=socket.gethostname(),
        version=version("ntkpipe"),
        threads=worker.state.nthreads,
        memory_limit=worker.memory_manager.memory_limit,
        base_memory=base,
        available_memory=available_memory(),
        digest=digest,
        problem=problem,
    )


def answer(holder: Holder, order: Order, block: NDArray[np.float64] | None) -> Answer:
    """What Dask runs in each pass."""
    worker = get_worker()
    task = worker.get_current_task()

    def is_unwanted() -> bool:
        state = worker.state.tasks.get(task)
        return state is None or state.state == "cancelled" or worker.status in _LEAVING

    try:
        return holder.answer(order, block, is_unwanted)
    except BaseException as error:
        # Dask keeps the error, and so would keep the memory of every frame that it went through.
        traceback.clear_frames(error.__traceback__)
        raise


def close_holder(holder: Holder) -> None:
    """What Dask runs last."""
    holder.close()
