"""Tiles of a stored symmetric matrix: their sources, and streams of them that threads read ahead, some cached."""

import mmap
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import ConfigError
from ntkpipe.base.given import (
    dtype_of,
    is_in_slices,
    read_slices,
    real_dtype,
    require_mirror,
    require_square,
    require_symmetric,
)
from ntkpipe.base.grid import Axis, Grid
from ntkpipe.base.operator import Work, digest_of
from ntkpipe.store.kernel import Kernel

TileIndex = tuple[int, int]
Tiles = Iterable[tuple[TileIndex, NDArray[Any]]]  # with their indices, as :meth:`TileReader.tiles` yields them
# A requested tile: cached already or on its way, then into this buffer unless it is to be cached.
_Coming = tuple[TileIndex, "NDArray[Any] | Future[NDArray[Any]]", NDArray[np.uint8] | None]

_NAME = "the matrix"
_DEFAULT_EDGE = 2048
_LOCAL_DEPTH, _REMOTE_DEPTH = 2, 8  # tiles read ahead of the one in use: a server needs more requests than a disk


class ReadableTiles(Protocol):
    """Tiles that a :class:`TileReader` reads."""

    tile_bytes: int  # of one tile as it is read
    is_local: bool  # whether one reader at a time keeps the medium busy

    def read(self, index: TileIndex, buffer: NDArray[np.uint8] | None, /) -> NDArray[Any]:
        """Read a stored tile, into the buffer if there is one."""


class MatrixTiles(ReadableTiles, Protocol):
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
        """See :class:`MatrixTiles`."""
        return self.kernel.identity

    def read(self, index: TileIndex, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        """See :class:`MatrixTiles`."""
        return self.kernel.read_stored(*index, buffer)


class ArrayTiles:
    """Tiles of any symmetric matrix that gives slices as arrays: a ``zarr.Array``, a memory map.

    Only the tiles on and above the diagonal are read. A memory map is pickled as the name of its file, which must be
    there where it is opened.
    """

    # Rows of a tile are best a multiple of the chunks of the array.
    def __init__(self, array: Any, edge: int = _DEFAULT_EDGE) -> None:
        shape = tuple(array.shape)
        require_square(_NAME, shape)
        self.dtype = real_dtype(_NAME, shape, dtype_of(array)).newbyteorder("=")
        axis = Axis(shape[0], 1, min(edge, shape[0]))
        self.array, self.edge, self._symmetric = array, edge, set[int]()  # diagonal tiles that were looked at
        self.grid = Grid(axis, axis, symmetric=True)
        self.rows_per_sample: int | None = None
        self.tile_bytes = int(axis.tile) ** 2 * self.dtype.itemsize
        self.is_local = True

    def __reduce__(self) -> tuple[Any, ...]:
        if not isinstance(self.array, np.memmap):
            return ArrayTiles, (self.array, self.edge)
        base: Any = self.array.base
        if not isinstance(base, mmap.mmap):  # then numpy does not know where it begins
            raise ConfigError("part of a memory map cannot be sent to workers; give a numpy.memmap of that part")
        order = "C" if self.array.flags.c_contiguous else "F"
        place = (str(self.array.filename), self.array.dtype, "r", self.array.offset, self.array.shape, order)
        return _open_mapped, (self.edge, *place)

    def identity(self) -> str:
        """Digest of the diagonal tiles: reading a whole matrix for its name would take too long."""
        digests = "".join(digest_of(self.read((i, i), None)) for i in range(self.grid.rows.num_tiles))
        return digest_of(np.frombuffer(digests.encode(), np.uint8))

    def read(self, index: TileIndex, buffer: NDArray[np.uint8] | None) -> NDArray[Any]:
        """See :class:`MatrixTiles`; the array decides about memory."""
        del buffer
        rows, columns = self.grid.rows.rows(index[0]), self.grid.columns.rows(index[1])
        tile = self._read(slice(rows.start, rows.stop), slice(columns.start, columns.stop))
        if index[0] == index[1] and index[0] not in self._symmetric:
            require_symmetric(_NAME, tile)
            self._symmetric.add(index[0])
        return tile

    def _read(self, rows: slice, columns: slice) -> NDArray[Any]:
        return read_slices(_NAME, self.array, rows, columns).astype(self.dtype, copy=False)

    def require_upper(self) -> None:
        """Refuse an array of which the lower tiles alone are there, by its first row and column: they are not read."""
        every, first = slice(0, self.grid.shape[0]), slice(0, 1)
        if self.grid.rows.num_tiles > 1:
            row, mirror = self._read(first, every)[0], np.asarray(self.array[every, first], self.dtype)[:, 0]
            known = np.isfinite(row) & np.isfinite(mirror) & (mirror != 0)
            gap = np.abs(row - mirror)[known].max(initial=0.0)
            require_mirror(_NAME, float(gap), float(np.abs(mirror[known]).max(initial=0.0)), self.dtype)


def tiles_of(matrix: Any, width: int = 1) -> MatrixTiles | None:
    """Tiles of whole samples, of ``width`` rows, of a stored kernel, a memory map, an array of a store; else none."""
    if isinstance(matrix, Kernel):
        return KernelTiles(matrix)
    return ArrayTiles(matrix, max(1, _DEFAULT_EDGE // width) * width) if is_in_slices(matrix) else None


def _open_mapped(edge: int, *place: Any) -> ArrayTiles:
    return ArrayTiles(np.memmap(*place), edge)


class TileReader:
    """Streams tiles of a source, any number of streams at a time.

    A fixed subset of tiles is cached, spread evenly: every pass wants all of them in the same order, of which a
    least-recently-used cache would hold none. Memory is these, three tiles (nine from object storage) for each stream,
    and one of a stream that waits.
    """

    def __init__(self, source: ReadableTiles, tiles: Iterable[TileIndex], *, cache_bytes: int, streams: int) -> None:
        self._source = source
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
        count = min(total, max(0, cache_bytes) // self._source.tile_bytes)
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
                        self._bytes_read += self._source.tile_bytes
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
                buffer = self._free.pop() if self._free else np.empty(self._source.tile_bytes, np.uint8)
            return index, self._threads.submit(self._source.read, index, buffer), buffer

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


def buffer_bytes(source: ReadableTiles, streams: int) -> int:
    """Bytes of the tiles in use by so many concurrent streams and one that waits, beside those that are cached."""
    return (streams * (_depth(source) + 1) + 1) * source.tile_bytes
