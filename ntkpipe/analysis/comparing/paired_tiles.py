"""Tiles of two symmetric matrices side by side: runs of samples that lie in one tile of both, each pair once."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.operator import Operator
from ntkpipe.operators.tiles import TileSource

# Numbers of a strip in float64: what is done with it stays in a core's cache.
_STRIP_NUMBERS = 2**16
# Samples of a run where a matrix has no tiles.
_RUN = 512


class TileEntries:
    """Entries of tiles; a run must lie in one. The last tile is kept, so that neighbours do not read it again."""

    def __init__(self, source: TileSource, width: int) -> None:
        self._source = source
        self._rows = source.grid.rows.tile_rows
        self.width = width  # rows a sample
        self.num_samples = source.grid.shape[0] // width
        self.edge: int | None = self._rows // width  # samples of a tile
        self.bytes_read = 0
        self._last: tuple[tuple[int, int], NDArray[Any]] | None = None

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """The block of two runs of rows, the first before the second or the same; a view until the next read."""
        index = rows.start // self._rows, columns.start // self._rows
        if self._last is None or self._last[0] != index:
            self._last = None  # or two tiles would be in memory during the read
            self._last = index, self._source.read(index, None)
            self.bytes_read += self._source.tile_bytes
        top, left = index[0] * self._rows, index[1] * self._rows
        return self._last[1][rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


class OperatorEntries:
    """Entries of an operator, in any blocks."""

    def __init__(self, operator: Operator, width: int) -> None:
        self._operator = operator
        self.width = width
        self.num_samples = operator.num_rows // width
        self.edge = None  # any run may be asked for
        self._before = operator.work.bytes_read

    @property
    def bytes_read(self) -> int:
        """Bytes that the operator has read for these entries."""
        return self._operator.work.bytes_read - self._before

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """See :class:`TileEntries`."""
        return self._operator.block(rows, columns)


Entries = TileEntries | OperatorEntries


@dataclass(frozen=True)
class Strip:
    """The same few rows of a block of both matrices, in float64; valid until the next one."""

    rows: slice  # rows, columns: of both matrices
    columns: slice
    # Whether its block is a diagonal one, which has its own mirror in it; entries of others count twice
    is_diagonal: bool
    first: FloatArray
    second: FloatArray


def strips(first: Entries, second: Entries) -> Iterator[Strip]:
    """Every entry of the upper blocks of two matrices, those of diagonal blocks first.

    A matrix K of fewer rows a sample than the other, one, is taken as ``K ⊗ I_O``, of which only strips ever exist.
    Blocks are cut at the edges of the tiles of both, and those of one coarse tile follow each other: so each tile is
    read once, those of diagonal blocks twice, and where the edges of the finer tiles do not divide those of the
    coarser ones, the finer ones that lie across, up to four times. Memory is a tile of each and some megabytes.
    """
    cuts = {0, first.num_samples}
    for entries in (first, second):
        if entries.edge is not None or first.edge == second.edge:
            cuts |= set(range(0, first.num_samples, entries.edge or _RUN))
    runs = [slice(*ends) for ends in pairwise(sorted(cuts))]
    coarse = max(first.edge or _RUN, second.edge or _RUN)
    diagonal = [(run, run) for run in runs]
    upper = [(row, column) for number, row in enumerate(runs) for column in runs[number + 1 :]]
    upper.sort(key=lambda pair: (pair[0].start // coarse, pair[1].start // coarse, pair[0].start, pair[1].start))
    for rows, columns in [*diagonal, *upper]:
        yield from _strips_of(first, second, rows, columns)


def _rows(samples: slice, width: int) -> slice:
    return slice(samples.start * width, samples.stop * width)


def _strips_of(first: Entries, second: Entries, rows: slice, columns: slice) -> Iterator[Strip]:
    both, width = (first, second), max(first.width, second.width)
    blocks = [one.read(_rows(rows, one.width), _rows(columns, one.width)) for one in both]
    step = max(1, _STRIP_NUMBERS // ((columns.stop - columns.start) * width * width))
    for start in range(rows.start, rows.stop, step):
        part = slice(start, min(start + step, rows.stop))
        inside = slice(start - rows.start, part.stop - rows.start)
        values = [
            _as_strip(block[_rows(inside, one.width)], width // one.width)
            for one, block in zip(both, blocks, strict=True)
        ]
        yield Strip(_rows(part, width), _rows(columns, width), rows == columns, *values)


def _as_strip(block: NDArray[Any], num_outputs: int) -> FloatArray:
    """Rows of a block in float64, C-contiguous; of ``K ⊗ I_O`` for those of K."""
    if num_outputs == 1:
        return np.ascontiguousarray(block, np.float64)
    spread = np.zeros((len(block), num_outputs, block.shape[1], num_outputs))
    for output in range(num_outputs):
        spread[:, output, :, output] = block
    return spread.reshape(len(block) * num_outputs, -1)
