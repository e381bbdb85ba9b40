"""Tiles as a stream: read ahead by threads into reused memory, or kept."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.operator import Work
from ntkpipe.operators.tiles import TileIndex, TileSource

# Ahead of the tile that is in use: one on its way keeps a disk busy, a server needs more requests at a time.
_LOCAL_DEPTH = 2
_REMOTE_DEPTH = 8


# A tile that was asked for: kept already or on its way, then into this memory unless it is to be kept.
_Coming = tuple[TileIndex, "NDArray[Any] | Future[NDArray[Any]]", NDArray[np.uint8] | None]


class TileReader:
    """Streams tiles of a source, any number of streams at a time.

    Some tiles are kept once they were read: a fixed subset, spread evenly, since every pass wants all of them in the
    same order, of which a least-recently-used cache would keep none. Memory is these and, for each stream, three tiles
    (nine from object storage), and one of a stream that waits.
    """

    def __init__(self, source: TileSource, tiles: Iterable[TileIndex], *, cache_bytes: int, streams: int) -> None:
        self.source = source
        self._every = tuple(tiles)
        self._pinned: set[TileIndex] = set()
        self._kept: dict[TileIndex, NDArray[Any]] = {}
        self._depth = _depth(source)
        self._num_threads = streams if source.is_local else streams * _REMOTE_DEPTH
        self._free: deque[NDArray[np.uint8]] = deque()
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._tiles_given = self._bytes_read = 0
        self._seconds = 0.0
        self._cache_bytes = 0
        self.keep(cache_bytes)

    def keep(self, cache_bytes: int, tiles: Iterable[TileIndex] | None = None) -> None:
        """Choose anew what is kept, of other tiles or in another memory; the rest is let go."""
        if tiles is not None:
            self._every = tuple(tiles)
        total = len(self._every)
        count = min(total, max(0, cache_bytes) // self.source.tile_bytes)
        pinned = {
            index
            for number, index in enumerate(self._every)
            if number * count // total != (number + 1) * count // total
        }
        with self._lock:
            self._cache_bytes = cache_bytes
            self._pinned = pinned
            self._kept = {index: tile for index, tile in self._kept.items() if index in pinned}
        self.share_kept = count / total if total else 0.0

    def keep_at_most(self, cache_bytes: int) -> None:
        """Let go of what is beyond so many bytes, for good."""
        if cache_bytes < self._cache_bytes:
            self.keep(cache_bytes)

    @property
    def num_given(self) -> int:
        """Tiles that it has passed on."""
        return self._tiles_given

    @property
    def num_kept(self) -> int:
        """Tiles that are in memory now."""
        return len(self._kept)

    @property
    def work(self) -> Work:
        """What it has cost; a pass is all tiles, kept ones included."""
        return Work(self._tiles_given / max(1, len(self._every)), self._bytes_read, self._seconds)

    def add_seconds(self, seconds: float) -> None:
        """Count time that was spent with its tiles."""
        self._seconds += seconds

    def tiles(self, indices: Iterable[TileIndex]) -> Iterator[tuple[TileIndex, NDArray[Any]]]:
        """Pass tiles on in order, each valid until the next is asked for; the first one is on its way at once."""
        rest = iter(indices)
        # Who drops the stream before it begins drops this tile's memory; nobody else gets it.
        return self._stream(deque(self._start(index) for index in islice(rest, 1)), rest)

    def _stream(self, coming: "deque[_Coming]", rest: Iterator[TileIndex]) -> Iterator[tuple[TileIndex, NDArray[Any]]]:
        try:
            for index in rest:
                coming.append(self._start(index))
                if len(coming) > self._depth:
                    yield from self._finish(coming)
            while coming:
                yield from self._finish(coming)
        finally:
            for _, tile, buffer in coming:
                # Memory that is still written to must not be handed out.
                if isinstance(tile, Future) and not tile.cancel():
                    tile.exception()
                self._give_back(buffer)

    def _start(self, index: TileIndex) -> "_Coming":
        with self._lock:
            if (kept := self._kept.get(index)) is not None:
                return index, kept, None
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="tiles")
            buffer = None if index in self._pinned else self._take()
            return index, self._threads.submit(self.source.read, index, buffer), buffer

    def _finish(self, coming: "deque[_Coming]") -> Iterator[tuple[TileIndex, NDArray[Any]]]:
        index, found, buffer = coming[0]
        tile = found.result() if isinstance(found, Future) else found
        coming.popleft()
        with self._lock:
            self._tiles_given += 1
            if isinstance(found, Future):
                self._bytes_read += self.source.tile_bytes
                if buffer is None and index in self._pinned:
                    self._kept[index] = tile
        try:
            yield index, tile
        finally:
            self._give_back(buffer)

    def _take(self) -> NDArray[np.uint8]:
        try:
            return self._free.pop()
        except IndexError:
            return np.empty(self.source.tile_bytes, np.uint8)

    def _give_back(self, buffer: NDArray[np.uint8] | None) -> None:
        if buffer is not None:
            self._free.append(buffer)

    def close(self) -> None:
        """Let go of memory and threads; further tiles are read anew."""
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown()
        with self._lock:
            self._kept.clear()
            self._free.clear()


def _depth(source: TileSource) -> int:
    return _LOCAL_DEPTH if source.is_local else _REMOTE_DEPTH


def buffer_bytes(source: TileSource, streams: int) -> int:
    """Bytes of the tiles in use by so many streams at a time and one that waits, beside those that are kept."""
    return (streams * (_depth(source) + 1) + 1) * source.tile_bytes
