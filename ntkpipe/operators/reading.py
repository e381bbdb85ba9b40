"""Tiles as a stream: read ahead by threads into reused memory, some of them cached."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.operator import Work
from ntkpipe.operators.tiles import ReadableTiles, TileIndex, TileSource

Source = TypeVar("Source", bound=ReadableTiles)

_LOCAL_DEPTH, _REMOTE_DEPTH = 2, 8  # tiles read ahead of the one in use: a server needs more requests than a disk

# A requested tile: cached already or on its way, then into this buffer unless it is to be cached.
_Coming = tuple[TileIndex, "NDArray[Any] | Future[NDArray[Any]]", NDArray[np.uint8] | None]


class TileReader(Generic[Source]):
    """Streams tiles of a source, any number of streams at a time.

    A fixed subset of tiles is cached, spread evenly: every pass wants all of them in the same order, of which a
    least-recently-used cache would hold none. Memory is these, three tiles (nine from object storage) for each stream,
    and one of a stream that waits.
    """

    def __init__(self, source: Source, tiles: Iterable[TileIndex], *, cache_bytes: int, streams: int) -> None:
        self.source = source
        self._cached: dict[TileIndex, NDArray[Any]] = {}
        self._depth = _depth(source)
        self._num_threads = streams if source.is_local else streams * _REMOTE_DEPTH
        self._free: deque[NDArray[np.uint8]] = deque()
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self.num_given = self._bytes_read = 0  # tiles passed on so far, and bytes of those that were read
        self.seconds = 0.0  # that were spent with the tiles, as callers add them
        self.keep(cache_bytes, tiles)

    def keep(self, cache_bytes: int, tiles: Iterable[TileIndex] | None = None) -> None:
        """Choose anew what is cached, among other tiles or in another number of bytes; drop the rest."""
        if tiles is not None:
            self._all_tiles = tuple(tiles)
        total = len(self._all_tiles)
        count = min(total, max(0, cache_bytes) // self.source.tile_bytes)
        numbered = enumerate(self._all_tiles)
        pinned = {tile for number, tile in numbered if number * count // total != (number + 1) * count // total}
        with self._lock:
            self.cache_bytes = cache_bytes
            self._pinned = pinned
            self._cached = {index: tile for index, tile in self._cached.items() if index in pinned}
        self.share_kept = count / total if total else 0.0

    @property
    def num_kept(self) -> int:
        """Number of tiles that are cached now."""
        return len(self._cached)

    @property
    def work(self) -> Work:
        """What reading has cost; a pass is all tiles, cached ones included."""
        return Work(self.num_given / max(1, len(self._all_tiles)), self._bytes_read, self.seconds)

    def tiles(self, indices: Iterable[TileIndex]) -> Iterator[tuple[TileIndex, NDArray[Any]]]:
        """Yield tiles in order, each valid until the next is requested; the first one is read at once."""
        rest = iter(indices)
        # A stream that is dropped before it begins drops the buffer of this tile; nobody else gets it.
        return self._stream(deque(self._start(index) for index in islice(rest, 1)), rest)

    def _stream(self, coming: deque[_Coming], rest: Iterator[TileIndex]) -> Iterator[tuple[TileIndex, NDArray[Any]]]:
        try:
            while coming:
                for index in islice(rest, self._depth + 1 - len(coming)):
                    coming.append(self._start(index))
                index, found, buffer = coming[0]
                tile = found.result() if isinstance(found, Future) else found
                with self._lock:
                    self.num_given += 1
                    if isinstance(found, Future):
                        self._bytes_read += self.source.tile_bytes
                        if buffer is None and index in self._pinned:
                            self._cached[index] = tile
                yield index, tile
                coming.popleft()
                if buffer is not None:
                    self._free.append(buffer)
        finally:
            for _, pending, buffer in coming:
                # A buffer that is still written to must not be handed out.
                if isinstance(pending, Future) and not pending.cancel():
                    pending.exception()
                if buffer is not None:
                    self._free.append(buffer)

    def _start(self, index: TileIndex) -> _Coming:
        with self._lock:
            if (cached := self._cached.get(index)) is not None:
                return index, cached, None
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="tiles")
            buffer = None
            if index not in self._pinned:
                buffer = self._free.pop() if self._free else np.empty(self.source.tile_bytes, np.uint8)
            return index, self._threads.submit(self.source.read, index, buffer), buffer

    def close(self) -> None:
        """Free memory and threads; further tiles are read anew."""
        with self._lock:
            if self._threads is not None:
                self._threads.shutdown()
            self._threads = None
            self._cached.clear()
            self._free.clear()


def _depth(source: ReadableTiles) -> int:
    return _LOCAL_DEPTH if source.is_local else _REMOTE_DEPTH


def buffer_bytes(source: TileSource, streams: int) -> int:
    """Bytes of the tiles in use by so many concurrent streams and one that waits, beside those that are cached."""
    return (streams * (_depth(source) + 1) + 1) * source.tile_bytes
