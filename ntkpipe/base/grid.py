"""Integer arithmetic of the kernel matrix: samples, rows, tiles and blocks, and which tiles of it are stored."""

from collections.abc import Iterator
from dataclasses import dataclass

_FULL_PLANES = 16  # with more planes tiles are smaller, since a worker holds one of each plane


@dataclass(frozen=True, order=True)
class Span:
    """A run of consecutive samples, ``start <= sample < stop``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def cut(self, size: int) -> list["Span"]:
        """Consecutive spans of ``size`` samples; the last may be shorter."""
        return [Span(start, min(start + size, self.stop)) for start in range(self.start, self.stop, size)]

    def batches(self, size: int) -> list["Span"]:
        """The spans of :meth:`cut`, with a last one of a single sample joined to the one before it."""
        spans = self.cut(size)  # some backward passes of torch 2.13 on the CPU are wrong for a batch of one
        if len(spans) > 1 and len(spans[-1]) == 1:
            spans[-2:] = [Span(spans[-2].start, spans[-1].stop)]
        return spans


@dataclass(frozen=True)
class Axis:
    """One side of a kernel: samples in tiles of ``tile`` samples, with ``num_covectors`` rows per sample."""

    num_samples: int
    num_covectors: int
    tile: int

    @property
    def num_rows(self) -> int:
        """Rows of the kernel along this axis; row = sample * num_covectors + covector."""
        return self.num_samples * self.num_covectors

    @property
    def tile_rows(self) -> int:
        """Rows of one whole tile."""
        return self.tile * self.num_covectors

    @property
    def num_tiles(self) -> int:
        """Number of tiles; the last may be ragged."""
        return -(-self.num_samples // self.tile)

    def samples(self, tile: int) -> Span:
        """Samples of a tile."""
        return Span(tile * self.tile, min((tile + 1) * self.tile, self.num_samples))

    def rows(self, tile: int) -> Span:
        """Rows of a tile."""
        span = self.samples(tile)
        return Span(span.start * self.num_covectors, span.stop * self.num_covectors)


@dataclass(frozen=True)
class Grid:
    """The tiles of one kernel; of a symmetric one those with row <= column are stored."""

    rows: Axis
    columns: Axis
    symmetric: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return self.rows.num_rows, self.columns.num_rows

    @property
    def num_tiles(self) -> int:
        """Tiles that are stored."""
        return self._count(self.rows.num_tiles, self.columns.num_tiles)

    @property
    def num_pairs(self) -> int:
        """Pairs of samples whose S*S entries are computed: half of them, with the diagonal, where symmetric."""
        return self._count(self.rows.num_samples, self.columns.num_samples)

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Stored tiles, row by row."""
        for row in range(self.rows.num_tiles):
            for column in range(row if self.symmetric else 0, self.columns.num_tiles):
                yield row, column

    def is_stored(self, row: int, column: int) -> bool:
        """Whether tile (row, column) is stored, rather than its mirror image."""
        return row <= column or not self.symmetric

    def blocks(self, height: int, width: int) -> Iterator["Block"]:
        """Yield blocks of at most ``height`` x ``width`` tiles that cover each stored tile exactly once, row by row."""
        for row in range(0, self.rows.num_tiles, height):
            row_stop = min(row + height, self.rows.num_tiles)
            for column in range(row if self.symmetric else 0, self.columns.num_tiles, width):
                yield Block(row, row_stop, column, min(column + width, self.columns.num_tiles))

    def num_blocks(self, height: int, width: int) -> int:
        """Number of blocks of :meth:`blocks`, without listing them."""
        rows, columns = range(0, self.rows.num_tiles, height), self.columns.num_tiles
        return sum(-(-(columns - (row if self.symmetric else 0)) // width) for row in rows)

    def _count(self, rows: int, columns: int) -> int:
        return rows * (rows + 1) // 2 if self.symmetric else rows * columns


@dataclass(frozen=True, order=True)
class Block:
    """A rectangle of tiles that one task computes, without those below the diagonal of a symmetric kernel."""

    row_start: int
    row_stop: int
    column_start: int
    column_stop: int

    def columns(self) -> range:
        """Tile columns of the block."""
        return range(self.column_start, self.column_stop)

    def rows(self) -> range:
        """Tile rows of the block."""
        return range(self.row_start, self.row_stop)


def kernel_grids(num_train: int, num_test: int | None, num_covectors: int, tile: int) -> dict[str, Grid]:
    """Grids of a store by array name: train x train, and test x train if there are test samples."""
    train = Axis(num_train, num_covectors, tile)
    grids = {"kernel/train": Grid(train, train, symmetric=True)}
    if num_test is not None:
        grids["kernel/test_train"] = Grid(Axis(num_test, num_covectors, tile), train, symmetric=False)
    return grids


def default_tile(num_samples: int, num_covectors: int, num_planes: int = 1) -> int:
    """Default number of samples along a tile's edge; independent of the number of workers, since it determines bits."""
    # About 2048 rows (16 MiB in float32); fewer for small kernels, to give several workers something to do.
    rows = num_samples * num_covectors
    edge = 4096 if rows >= 500_000 else min(2048, max(256, -(-rows // 8) // 64 * 64))
    if num_planes > _FULL_PLANES:
        edge = max(128, int(edge * (_FULL_PLANES / num_planes) ** 0.5) // 64 * 64)
    return max(1, min(num_samples, edge // num_covectors))


def matrix_tile(num_samples: int, num_covectors: int, num_planes: int, num_workers: int) -> int:
    """Samples along a tile's edge of a kernel in memory: the largest number that leaves work for every worker."""
    del num_planes  # tiles are computed in place, whatever their number
    edge = 1
    while num_workers > 1 and edge * (edge + 1) // 2 < 1.5 * num_workers:
        edge += 1
    return max(1, min(-(-num_samples // edge), 4096 // num_covectors))
