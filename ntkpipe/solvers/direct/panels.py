"""A lower triangular factor in panels of columns: in memory, or in a Zarr array that is written once."""

import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import ResourceError
from ntkpipe.base.resources import format_bytes
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.layout import CHECKSUM_BYTES, ArrayLayout
from ntkpipe.store.media.medium import Medium

_ITEM = 8
_CHUNK_BYTES = 32 * 2**20
# Rows of a chunk: fewer make products slow, more make buffers large.
_FEWEST_ROWS, _MOST_ROWS = 256, 2048
_CHUNKS_OF_PANEL = 16
# Chunks on their way while one is in use.
_DEPTH = 2

# A panel, rows of it, and the entries there.
Chunk = tuple[int, slice, NDArray[np.float64]]


_Coming = tuple[int, slice, "Future[NDArray[Any]]", NDArray[np.uint8]]


@dataclass(frozen=True)
class Shape:
    """How a factor is cut: panels of ``width`` columns, from their diagonal down in chunks of ``height`` rows."""

    num_rows: int  # n
    width: int  # width, height: `width` is a multiple of `height`, so a diagonal block is whole chunks
    height: int

    @classmethod
    def of_width(cls, num_rows: int, width: int) -> "Shape":
        """Panels of about this width, and chunks of whole rows: large, but much smaller than a panel.

        A width above 256 is rounded up to a multiple of it, so that chunks of some size divide it.
        """
        width = min(width, num_rows)
        if width <= _FEWEST_ROWS:
            return cls(num_rows, width, width)
        width = -(-width // _FEWEST_ROWS) * _FEWEST_ROWS
        height, most = _FEWEST_ROWS, min(_MOST_ROWS, _CHUNK_BYTES // (width * _ITEM), num_rows // _CHUNKS_OF_PANEL)
        while 2 * height <= most and width % (2 * height) == 0:
            height *= 2
        return cls(num_rows, width, height)

    @property
    def num_panels(self) -> int:
        """Number of panels; the last may be narrower."""
        return -(-self.num_rows // self.width)

    def columns(self, panel: int) -> slice:
        """Columns of a panel; its first row has the number of its first column."""
        return slice(panel * self.width, min((panel + 1) * self.width, self.num_rows))

    def chunks(self, panel: int, first_row: int | None = None) -> Iterator[slice]:
        """Rows of the chunks of a panel in order, from its diagonal or from ``first_row``, which begins a chunk."""
        start = panel * self.width if first_row is None else first_row
        for row in range(start, self.num_rows, self.height):
            yield slice(row, min(row + self.height, self.num_rows))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk in memory."""
        return self.width * self.height * _ITEM

    @property
    def factor_bytes(self) -> int:
        """Bytes of all panels."""
        starts = range(0, self.num_rows, self.width)
        return sum((self.num_rows - s) * min(self.width, self.num_rows - s) for s in starts) * _ITEM

    def working_bytes(self) -> int:
        """Bytes beside the panels, while a factor is made or used: one diagonal block, chunks on their way, a product.

        One more chunk is for the padding of a ragged one when it is written.
        """
        block = self.width**2 * _ITEM if self.num_panels > 1 else 0
        return block + (_DEPTH + 3) * self.chunk_bytes


@dataclass(frozen=True)
class Traffic:
    """What has gone between the panels of a factor and who works with them. Values subtract."""

    passes: float = 0.0  # reads of the whole factor
    bytes_read: int = 0  # bytes_read, bytes_written: of files or object storage
    bytes_written: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.passes + other.passes,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
        )

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.passes - other.passes,
            self.bytes_read - other.bytes_read,
            self.bytes_written - other.bytes_written,
        )


class Panels(ABC):
    """The panels of a factor: written once in order, read chunk by chunk."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.traffic = Traffic()
        self._num_entries = shape.factor_bytes // _ITEM

    @abstractmethod
    def writing(self, panel: int, values: NDArray[np.float64]) -> AbstractContextManager[Callable[[slice], None]]:
        """Keep a panel, shape (n - first column, width), whose chunks are given as they are ready.

        What is entered is called with the rows of each chunk, which must not change afterwards. At the end all of them
        are kept, or an error is raised.
        """

    @abstractmethod
    def read(self, requests: Iterable[tuple[int, slice]]) -> Generator[Chunk]:
        """Chunks by panel and rows, in the order asked for, each valid until the next is asked for."""


class PanelsInMemory(Panels):
    """Arrays of this process."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self._values: dict[int, NDArray[np.float64]] = {}

    @contextlib.contextmanager
    def writing(self, panel: int, values: NDArray[np.float64]) -> Iterator[Callable[[slice], None]]:
        """See :meth:`Panels.writing`; nothing is copied."""
        yield lambda rows: None
        self._values[panel] = values

    def read(self, requests: Iterable[tuple[int, slice]]) -> Generator[Chunk]:
        """See :meth:`Panels.read`."""
        for panel, rows in requests:
            start = self.shape.columns(panel).start
            values = self._values[panel][rows.start - start : rows.stop - start]
            self.traffic += Traffic(passes=values.size / self._num_entries)
            yield panel, rows, values


class StoredPanels(Panels):
    """A Zarr array of float64 chunks, checked by crc32c; what is above the diagonal blocks is not there.

    Chunks are read ahead by threads into reused memory, and written by one while the next are computed.
    """

    def __init__(self, shape: Shape, medium: Medium, name: str) -> None:
        super().__init__(shape)
        n = shape.num_rows
        layout = ArrayLayout(name, (n, n), (shape.height, shape.width), np.dtype(np.float64), ("row", "column"))
        self._array = StoredArray(medium, layout)
        self._stored_bytes = layout.chunk_bytes
        self._buffers: deque[NDArray[np.uint8]] = deque()

    def create(self) -> None:
        """Create the array where there is none, and check the one that is there."""
        self._array.create()

    def num_complete(self, most: int) -> int:
        """How many of the first ``most`` panels have all their chunks: one that was found damaged may be deleted."""
        present, height = self._array.present(), self.shape.height
        for panel in range(most):
            if any((rows.start // height, panel) not in present for rows in self.shape.chunks(panel)):
                return panel
        return most

    @contextlib.contextmanager
    def writing(self, panel: int, values: NDArray[np.float64]) -> Iterator[Callable[[slice], None]]:
        """See :meth:`Panels.writing`; a thread writes while the next chunks are computed."""
        start, height = self.shape.columns(panel).start, self.shape.height
        written: list[Future[None]] = []
        with ThreadPoolExecutor(1, thread_name_prefix="factor") as thread:

            def put(rows: slice) -> None:
                chunk = values[rows.start - start : rows.stop - start]
                written.append(thread.submit(self._array.write, (rows.start // height, panel), chunk))

            yield put
            for future in written:
                future.result()
        self.traffic += Traffic(bytes_written=len(written) * self._stored_bytes)

    def read(self, requests: Iterable[tuple[int, slice]]) -> Generator[Chunk]:
        """See :meth:`Panels.read`."""
        coming: deque[_Coming] = deque()
        with ThreadPoolExecutor(_DEPTH, thread_name_prefix="factor") as threads:
            try:
                for panel, rows in requests:
                    buffer = self._take()
                    index = (rows.start // self.shape.height, panel)
                    coming.append((panel, rows, threads.submit(self._array.read, index, buffer), buffer))
                    if len(coming) > _DEPTH:
                        yield from self._next(coming)
                while coming:
                    yield from self._next(coming)
            finally:
                for _, _, future, buffer in coming:
                    # Memory that is still written to must not be handed out.
                    if not future.cancel():
                        future.exception()
                    self._buffers.append(buffer)

    def _next(self, coming: "deque[_Coming]") -> Iterator[Chunk]:
        """The first of the chunks that are on their way; its buffer is free once the next is asked for."""
        panel, rows, future, buffer = coming[0]
        values = future.result()
        coming.popleft()
        self.traffic += Traffic(values.size / self._num_entries, self._stored_bytes)
        try:
            yield panel, rows, values
        finally:
            self._buffers.append(buffer)

    def _take(self) -> NDArray[np.uint8]:
        return self._buffers.pop() if self._buffers else np.empty(self._stored_bytes, np.uint8)


def require_room(shape: Shape, medium: Medium, done: int) -> None:
    """Check that the panels from ``done`` on fit the disk."""
    free = medium.free_bytes()
    count = sum(1 for panel in range(done, shape.num_panels) for _ in shape.chunks(panel))
    needed = count * (shape.chunk_bytes + CHECKSUM_BYTES)
    if free is not None and free < needed:
        raise ResourceError(
            f"panels of the factor need {format_bytes(needed)} at {medium.root}, where {format_bytes(free)} are free"
        )
