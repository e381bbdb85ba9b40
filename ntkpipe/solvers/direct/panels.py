"""A lower triangular factor in panels of columns: how wide they are, and where they are, in memory or in a folder."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ResourceError, StoreError, StoreExistsError, StoreMismatchError
from ntkpipe.base.operator import Work
from ntkpipe.base.resources import format_bytes
from ntkpipe.operators.tiles import TileReader
from ntkpipe.solvers.direct.triangular import solve_bytes
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.documents import DOCUMENT, group_document
from ntkpipe.store.layout import ArrayLayout
from ntkpipe.store.media.medium import Medium, writing
from ntkpipe.store.media.opening import medium_at
from ntkpipe.store.results import ArrayFolder, as_integer, as_number
from ntkpipe.store.store import read_group

_ITEM = 8
_CHUNK_BYTES = 32 * 2**20
_FEWEST_ROWS, _MOST_ROWS = 256, 2048  # of a chunk: fewer make products slow, more make buffers large
_CHUNKS_OF_PANEL = 16
_DEPTH = 2  # chunks on their way while one is in use
_WIDEST = 32768  # beyond it the 32-bit indices of scipy's BLAS come near, and nothing is gained
_WIDTH_IN_MEMORY, _WIDER_IN_MEMORY = 1024, 2048
_COLUMNS_AT_WORK = 3 * 1024  # of blocks, buffers and solves beside a factor in memory
_NUM_CHECKPOINTS = 8  # so many panels, if they are not narrow, are checkpoints close enough to each other
_WIDTHS = (2048, 256, 32, 1)
_GROUP = "cholesky"
FACTOR_ARRAY = f"{_GROUP}/lower"
_FORMAT = 1
_SIZES = "num_rows", "panel_width", "chunk_rows"
_MOST_TEXT = 2000
_MOST_ROWS_OF_A_FACTOR = 2**40

PanelChunk = tuple[int, slice, FloatArray]  # a panel, a range of its rows, and their entries


@dataclass(frozen=True)
class Shape:
    """How a factor is cut: panels of ``width`` columns, from their diagonal down in chunks of ``height`` rows."""

    num_rows: int  # n
    width: int  # a multiple of `height`, so a diagonal block is whole chunks
    height: int

    @classmethod
    def of_width(cls, num_rows: int, width: int) -> "Shape":
        """Panels of about this width, cut into chunks that are large, but much smaller than a panel."""
        width = min(width, num_rows)
        if width <= _FEWEST_ROWS:
            return cls(num_rows, width, width)
        width = -(-width // _FEWEST_ROWS) * _FEWEST_ROWS  # so that some size of chunks divides it
        height, most = _FEWEST_ROWS, min(_MOST_ROWS, _CHUNK_BYTES // (width * _ITEM), num_rows // _CHUNKS_OF_PANEL)
        while 2 * height <= most and width % (2 * height) == 0:
            height *= 2
        return cls(num_rows, width, height)

    @property
    def num_panels(self) -> int:
        """Number of panels; the last may be narrower."""
        return -(-self.num_rows // self.width)

    def columns(self, panel: int) -> slice:
        """Columns of a panel; its first row has the same number as its first column."""
        return slice(panel * self.width, min((panel + 1) * self.width, self.num_rows))

    def chunks(self, panel: int, first_row: int | None = None) -> Iterator[slice]:
        """Rows of the chunks of a panel in order, from its diagonal or from ``first_row``, where a chunk begins."""
        start = panel * self.width if first_row is None else first_row
        for row in range(start, self.num_rows, self.height):
            yield slice(row, min(row + self.height, self.num_rows))

    @property
    def num_entries(self) -> int:
        """Number of entries of all panels."""
        starts = range(0, self.num_rows, self.width)
        return sum((self.num_rows - s) * min(self.width, self.num_rows - s) for s in starts)


class Panels:
    """The panels of a factor: written once in order, read chunk by chunk; these are arrays of this process."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.traffic = Work()  # reads of the whole factor, and of bytes from files or object storage
        self.bytes_written = 0  # to files or object storage
        self._num_entries = shape.num_entries
        self._values: dict[int, FloatArray] = {}

    @contextlib.contextmanager
    def writing(self, panel: int, values: FloatArray) -> Iterator[Callable[[slice], None]]:
        """Store a panel, shape (n - first column, width), chunk by chunk as they are ready; nothing is copied.

        The context gives a function to call with the rows of each chunk, which must not change afterwards. At the end
        all of them are stored, or an error is raised.
        """
        yield lambda rows: None
        self._values[panel] = values

    def read(self, requests: Iterable[tuple[int, slice]]) -> Generator[PanelChunk]:
        """Yield chunks by panel and rows in the order requested, each valid until the next is requested."""
        for panel, rows in requests:
            start = self.shape.columns(panel).start
            values = self._values[panel][rows.start - start : rows.stop - start]
            self.traffic += Work(passes=values.size / self._num_entries)
            yield panel, rows, values


class _Chunks:
    """Chunks of a stored factor as a reader of tiles takes them."""

    is_local = True  # also elsewhere: chunks are large, and memory is for as few of them

    def __init__(self, array: StoredArray) -> None:
        self.read, self.tile_bytes = array.read, array.layout.chunk_bytes


class StoredPanels(Panels):
    """Panels in a Zarr array of float64 chunks, checked by crc32c; chunks above the diagonal blocks do not exist.

    Chunks are read ahead by threads into reused memory, and written by one while the next are computed.
    """

    def __init__(self, shape: Shape, medium: Medium, name: str) -> None:
        super().__init__(shape)
        n = shape.num_rows
        layout = ArrayLayout(name, (n, n), (shape.height, shape.width), np.dtype(np.float64), ("row", "column"))
        self._medium, self._array = medium, StoredArray(medium, layout)
        self._stored_bytes = layout.chunk_bytes
        self._reader = TileReader(_Chunks(self._array), (), cache_bytes=0, streams=_DEPTH)
        self._array.create()  # or check the one that is there

    def num_complete(self, most: int) -> int:
        """Number of leading panels, up to ``most``, with all their chunks: users may delete one that is damaged."""
        present, height = self._array.present(), self.shape.height
        indices = ((rows.start // height, panel) for panel in range(most) for rows in self.shape.chunks(panel))
        return next((panel for number, panel in indices if (number, panel) not in present), most)

    @contextlib.contextmanager
    def writing(self, panel: int, values: FloatArray) -> Iterator[Callable[[slice], None]]:
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
        self.bytes_written += len(written) * self._stored_bytes

    def read(self, requests: Iterable[tuple[int, slice]]) -> Generator[PanelChunk]:
        """See :meth:`Panels.read`."""
        indices = ((rows.start // self.shape.height, panel) for panel, rows in requests)
        for (number, panel), values in self._reader.tiles(indices):
            self.traffic += Work(values.size / self._num_entries, self._stored_bytes)
            start = number * self.shape.height
            yield panel, slice(start, start + len(values)), values

    def require_room(self, done: int) -> None:
        """Check that the panels from number ``done`` on fit the disk."""
        shape, free = self.shape, self._medium.free_bytes()
        needed = self._stored_bytes * sum(1 for panel in range(done, shape.num_panels) for _ in shape.chunks(panel))
        if free is not None and free < needed:
            where = f"at {self._medium.root}, where {format_bytes(free)} are free"
            raise ResourceError(f"panels of the factor need {format_bytes(needed)} {where}")


def usual_shape(num_rows: int, panel_width: int | None) -> Shape:
    """How to cut a factor in memory."""
    default = _WIDTH_IN_MEMORY if num_rows < 8 * _WIDER_IN_MEMORY else _WIDER_IN_MEMORY
    return Shape.of_width(num_rows, panel_width or default)


def bytes_in_memory(shape: Shape) -> int:
    """Memory of a factorisation whose panels stay in memory, ``4 n²`` bytes and some panels, whatever the threads."""
    n = shape.num_rows
    return _ITEM * n * n // 2 + _ITEM * n * max(_COLUMNS_AT_WORK, 2 * shape.width)


def bytes_of_panel(shape: Shape, num_threads: int) -> int:
    """Memory of a factorisation whose panels go to files: one, a diagonal block, chunks on their way, solves."""
    block = shape.width**2 if shape.num_panels > 1 else 0
    # One more chunk is for the padding of a ragged one when it is written.
    chunks = (_DEPTH + 3) * shape.width * shape.height
    panel = shape.num_rows * min(shape.width, shape.num_rows)
    return _ITEM * (panel + block + chunks) + num_threads * solve_bytes(shape.width)


def widest_shape(num_rows: int, room: int, num_threads: int) -> Shape:
    """The widest panels that fit, of one of the usual widths where that is possible; at least one column."""
    most = min(num_rows, _WIDEST, max(_WIDTHS[0], -(-num_rows // _NUM_CHECKPOINTS)))
    multiples = ([most] if most == num_rows else [], *(range(most // step * step, 0, -step) for step in _WIDTHS))
    for width in chain(*multiples):
        shape = Shape.of_width(num_rows, width)
        if bytes_of_panel(shape, num_threads) <= room:
            return shape
    return Shape.of_width(num_rows, 1)


class Pivots(NamedTuple):
    """Summary of the diagonal of a panel."""

    logdet: float  # 2 Σ log L_ii
    smallest: float  # of the L_ii²
    largest: float  # of the L_ii²


@dataclass(frozen=True)
class FactorState:
    """What a factor is of, and how much of it exists."""

    matrix: str  # identity of the operator
    ridge: float
    jitter: float
    shape: Shape
    panels: tuple[Pivots, ...] = ()  # complete ones

    def to_json(self) -> dict[str, Any]:
        """Attributes of the group."""
        of_matrix = {"matrix": self.matrix, "ridge": self.ridge, "jitter": self.jitter}
        cut = dict(zip(_SIZES, (self.shape.num_rows, self.shape.width, self.shape.height), strict=True))
        return {"format": _FORMAT, **of_matrix, **cut, "panels": [pivots._asdict() for pivots in self.panels]}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "FactorState":
        """Read what :meth:`to_json` wrote; KeyError, TypeError or ValueError if anybody has changed it."""
        matrix, panels = found["matrix"], found["panels"]
        is_text = isinstance(matrix, str) and len(matrix) <= _MOST_TEXT and matrix.isprintable()
        if found["format"] != _FORMAT or not is_text or not isinstance(panels, list):
            raise ValueError("it describes no Cholesky factor of this version")
        shape = Shape(*(as_integer(found[name], low=1) for name in _SIZES))
        is_cut = shape.width % shape.height == 0 and shape.width < shape.num_rows + shape.height
        if not is_cut or shape.num_rows >= _MOST_ROWS_OF_A_FACTOR or len(panels) > shape.num_panels:
            raise ValueError(f"panels of {shape.width} columns in chunks of {shape.height} rows")
        ridge, jitter = as_number(found["ridge"]), as_number(found["jitter"])
        pivots = (Pivots(*(as_number(panel[name]) for name in Pivots._fields)) for panel in panels)
        return cls(matrix, ridge, jitter, shape, tuple(pivots))


def _is_ours(name: str) -> bool:
    return name.startswith((DOCUMENT, f"{_GROUP}/"))


class FactorFolder:
    """The group ``cholesky`` below a path: its attributes are the state, its array ``lower`` the panels."""

    def __init__(self, where: str | Path | Medium) -> None:
        self.medium = medium_at(where)
        self.root = str(self.medium.root)
        self._folder = ArrayFolder(self.medium, _GROUP)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder where the medium has locks, and remove what a killed writer left."""
        if why := self.medium.obstacle(writes=True):
            raise StoreError(f"cannot write to {self.root}: {why}; choose another path")
        if self._is_foreign():
            raise StoreExistsError(f"{self.root} holds something else; give the factor a path of its own")
        with writing(self.medium):
            self.medium.put_new(DOCUMENT, group_document({}))
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.medium.exclusive())
            except BlockingIOError:
                raise StoreExistsError(f"another process writes the factor in {self.root}; wait for it") from None
            except StoreError:
                pass  # no locks: two writers of one factor are harmless, since they write the same
            else:
                for name in filter(_is_ours, self.medium.leftovers()):
                    self.medium.delete(name)
            yield

    def _is_foreign(self) -> bool:
        """Whether there is anything but a factor, or what a kill leaves while its group is made."""
        if read_group(self.medium):
            return True
        has_factor = self.medium.size(f"{_GROUP}/{DOCUMENT}") is not None
        return not has_factor and not all(_is_ours(name) for name, _ in self.medium.sizes(""))

    def load(self) -> FactorState | None:
        """Read the state; none if there is no factor yet."""
        attributes = self._folder.read_attributes()
        try:
            return None if attributes is None else FactorState.from_json(attributes)
        except (KeyError, TypeError, ValueError) as error:
            where = self.medium.address(f"{_GROUP}/{DOCUMENT}")
            raise StoreError(f"{where} is damaged: {error!r}; delete that folder to begin anew") from error

    def commit(self, state: FactorState) -> None:
        """Replace the state in one step."""
        self._folder.write_attributes(state.to_json())


def require_same(stored: FactorState, wanted: dict[str, object], where: str) -> None:
    """Check that a stored factor is the wanted one."""
    found = stored.to_json()
    differences = tuple((name, found[name], value) for name, value in wanted.items() if found[name] != value)
    if differences:
        words = "; ".join(f"{name} is {_short(there)}, asked for {_short(value)}" for name, there, value in differences)
        raise StoreMismatchError(
            f"{where} holds the factor of something else: {words}. Give another path, or delete that folder",
            differences,
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:19]}…"
