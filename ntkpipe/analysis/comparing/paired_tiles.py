"""Tiles of two symmetric matrices side by side: runs of samples that lie in one tile of both, each pair once."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.operator import Operator
from ntkpipe.operators.tiles import TileSource

# Numbers of a strip in float64: what is done with it stays in a core's cache.
_STRIP_NUMBERS = 2**16
# Samples of a run where a matrix has no tiles.
_RUN = 512


class Entries(Protocol):
    """Entries of a symmetric matrix of samples, by two runs of samples."""

    num_samples: int
    width: int  # rows a sample
    edge: int | None  # samples of a tile; None if any run may be asked for

    @property
    def bytes_read(self) -> int:
        """Bytes that came from files or object storage."""

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """The block of two runs, rows before columns or the same; may be a view that is valid until the next read."""


class TileEntries:
    """Entries of tiles; a run must lie in one. The last tile is kept, so that neighbours do not read it again."""

    def __init__(self, source: TileSource, width: int) -> None:
        self._source = source
        self._rows = source.grid.rows.tile_rows
        self.width = width
        self.num_samples = source.grid.shape[0] // width
        self.edge: int | None = self._rows // width
        self.bytes_read = 0
        self._last: tuple[tuple[int, int], NDArray[Any]] | None = None

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """See :class:`Entries`."""
        first, second = rows.start * self.width, columns.start * self.width
        index = first // self._rows, second // self._rows
        if self._last is None or self._last[0] != index:
            self._last = None  # or two tiles would be in memory during the read
            self._last = index, self._source.read(index, None)
            self.bytes_read += self._source.tile_bytes
        top, left = index[0] * self._rows, index[1] * self._rows
        return self._last[1][
            first - top : rows.stop * self.width - top, second - left : columns.stop * self.width - left
        ]


class OperatorEntries:
    """Entries of an operator, in any blocks."""

    def __init__(self, operator: Operator, width: int) -> None:
        self._operator = operator
        self.width = width
        self.num_samples = operator.num_rows // width
        self.edge: int | None = None
        self._before = operator.work.bytes_read

    @property
    def bytes_read(self) -> int:
        """Bytes that the operator has read for these entries."""
        return self._operator.work.bytes_read - self._before

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """See :class:`Entries`."""
        spans = (slice(run.start * self.width, run.stop * self.width) for run in (rows, columns))
        return self._operator.block(*spans)


class OuterEntries:
    """``K ⊗ I_O`` of the entries of K. Only strips of it exist, while they are looked at."""

    def __init__(self, base: Entries, num_outputs: int) -> None:
        assert base.width == 1
        self._base = base
        self.num_samples, self.edge, self.width = base.num_samples, base.edge, num_outputs

    @property
    def bytes_read(self) -> int:
        """See :class:`Entries`."""
        return self._base.bytes_read

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """The block of K itself, which :func:`_as_strip` takes apart."""
        return self._base.read(rows, columns)


@dataclass(frozen=True)
class Strip:
    """The same few rows of a block of both matrices, in float64; valid until the next one."""

    rows: slice  # rows, columns: samples
    columns: slice
    # Whether its block is a diagonal one, which has its own mirror in it; entries of others count twice
    is_diagonal: bool
    first: FloatArray  # first, second: shape (rows * width, columns * width)
    second: FloatArray


def strips(first: Entries, second: Entries) -> Iterator[Strip]:
    """Every entry of the upper blocks of two matrices, those of diagonal blocks first.

    Blocks are cut at the edges of the tiles of both, and those of one coarse tile follow each other: so each tile is
    read once, those of diagonal blocks twice, and where the edges of the finer tiles do not divide those of the
    coarser ones, the finer ones that lie across, up to four times. Memory is a tile of each and some megabytes.
    """
    runs = _runs(first, second)
    coarse = max(_edge(first), _edge(second))
    diagonal = [(run, run) for run in runs]
    upper = [(row, column) for number, row in enumerate(runs) for column in runs[number + 1 :]]
    upper.sort(key=lambda pair: (pair[0].start // coarse, pair[1].start // coarse, pair[0].start, pair[1].start))
    for rows, columns in [*diagonal, *upper]:
        yield from _strips_of(first, second, rows, columns)


def _edge(entries: Entries) -> int:
    return entries.edge or _RUN


def _runs(first: Entries, second: Entries) -> list[slice]:
    cuts = {0, first.num_samples}
    for entries in (first, second):
        if entries.edge is not None or first.edge == second.edge:
            cuts |= set(range(0, first.num_samples, _edge(entries)))
    return [slice(*ends) for ends in pairwise(sorted(cuts))]


def _strips_of(first: Entries, second: Entries, rows: slice, columns: slice) -> Iterator[Strip]:
    width, num_columns = first.width, columns.stop - columns.start
    blocks = first.read(rows, columns), second.read(rows, columns)
    step = max(1, _STRIP_NUMBERS // (num_columns * width * width))
    for start in range(rows.start, rows.stop, step):
        part = slice(start, min(start + step, rows.stop))
        of_block = slice(part.start - rows.start, part.stop - rows.start)
        values = [
            _as_strip(block, of_block, width, is_outer=isinstance(entries, OuterEntries))
            for entries, block in zip((first, second), blocks, strict=True)
        ]
        yield Strip(part, columns, rows == columns, *values)


def _as_strip(block: NDArray[Any], rows: slice, width: int, *, is_outer: bool) -> FloatArray:
    """Rows of a block in float64, C-contiguous."""
    if not is_outer:
        return np.ascontiguousarray(block[rows.start * width : rows.stop * width], np.float64)
    values = block[rows]
    spread = np.zeros((len(values), width, values.shape[1], width))
    for output in range(width):
        spread[:, output, :, output] = values
    return spread.reshape(len(values) * width, -1)
