"""Tiles as a stream: read ahead by threads into reused memory, or kept."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.operators.operator import Work
from ntkpipe.operators.tiles import TileIndex, TileSource

# Ahead of the tile that is in use: one on its way keeps a disk busy, a server needs more requests at a time.
_LOCAL_DEPTH = 2
_REMOTE_DEPTH = 8


class TileReader:
    """Streams tiles of a source, any number of streams at a time.

    Some tiles are kept once they were read: a fixed subset, spread evenly, since every pass wants all of them in the
    same order, of which a least-recently-used cache would keep none. Memory is these and, for each stream, three tiles
    (nine from object storage).

    Parameters
    ----------
    source
        Where they come from.
    tiles
        Those that will be asked for.
    cache_bytes
        How many bytes of them may be kept.
    streams
        How many streams there will be at a time.
    """

    def __init__(self, source: TileSource, tiles: Iterable[TileIndex], *, cache_bytes: int, streams: int) -> None:
        self.source = source
        every = list(tiles)
        count = min(len(every), cache_bytes // source.tile_bytes)
        self._pinned = {
            index
            for number, index in enumerate(every)
            if number * count // len(every) != (number + 1) * count // len(every)
        }
        self.share_kept = count / len(every) if every else 0.0
        self._depth = _depth(source)
        self._num_threads = streams if source.is_local else streams * _REMOTE_DEPTH
        self._kept: dict[TileIndex, NDArray[Any]] = {}
        self._free: deque[NDArray[np.uint8]] = deque()
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._num_tiles = len(every)
        self._tiles_given = self._bytes_read = 0
        self._seconds = 0.0

    @property
    def work(self) -> Work:
        """What it has cost; a pass is all tiles, kept ones included."""
        return Work(self._tiles_given / max(1, self._num_tiles), self._bytes_read, self._seconds)

    def add_seconds(self, seconds: float) -> None:
        """Count time that was spent with its tiles."""
        self._seconds += seconds

    def tiles(self, indices: Iterable[TileIndex]) -> Iterator[tuple[TileIndex, NDArray[Any]]]:
        """Pass tiles on in order, each valid until the next is asked for.

        Yields
        ------
        The place of a tile, and its entries.

        Raises
        ------
        TileError
            If one is missing or damaged.
        """
        coming: deque[tuple[TileIndex, Future[NDArray[Any]] | None, NDArray[np.uint8] | None]] = deque()
        try:
            for index in indices:
                coming.append(self._start(index))
                if len(coming) > self._depth:
                    yield from self._finish(coming)
            while coming:
                yield from self._finish(coming)
        finally:
            for _, future, buffer in coming:
                # Memory that is still written to must not be handed out.
                if future is not None and not future.cancel():
                    future.exception()
                self._give_back(buffer)

    def _start(self, index: TileIndex) -> tuple[TileIndex, "Future[NDArray[Any]] | None", NDArray[np.uint8] | None]:
        if index in self._kept:
            return index, None, None
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="tiles")
            threads = self._threads
        buffer = None if index in self._pinned else self._take()
        return index, threads.submit(self.source.read, index, buffer), buffer

    def _finish(
        self, coming: "deque[tuple[TileIndex, Future[NDArray[Any]] | None, NDArray[np.uint8] | None]]"
    ) -> Iterator[tuple[TileIndex, NDArray[Any]]]:
        index, future, buffer = coming[0]
        tile = self._kept[index] if future is None else future.result()
        coming.popleft()
        with self._lock:
            self._tiles_given += 1
            if future is not None:
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
        self._kept.clear()
        self._free.clear()


def _depth(source: TileSource) -> int:
    return _LOCAL_DEPTH if source.is_local else _REMOTE_DEPTH


def buffer_bytes(source: TileSource, streams: int) -> int:
    """Bytes of the tiles in use by so many streams at a time, beside those that are kept."""
    return streams * (_depth(source) + 1) * source.tile_bytes
