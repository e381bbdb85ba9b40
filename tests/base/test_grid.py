"""Tiles, blocks and rows cover the matrix exactly once, whatever the sizes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntkpipe.base.grid import Axis, Grid, Span, default_tile

axes = st.builds(Axis, num_samples=st.integers(1, 40), num_covectors=st.integers(1, 4), tile=st.integers(1, 12))


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    rows = draw(axes)
    if draw(st.booleans()):
        return Grid(rows, rows, symmetric=True)
    return Grid(rows, draw(axes), symmetric=False)


@given(axes)
def test_tiles_of_an_axis_partition_its_samples_and_rows(axis):
    samples = [sample for tile in range(axis.num_tiles) for sample in range(*_ends(axis.samples(tile)))]
    rows = [row for tile in range(axis.num_tiles) for row in range(*_ends(axis.rows(tile)))]
    assert samples == list(range(axis.num_samples))
    assert rows == list(range(axis.num_rows))


@given(axes)
def test_rows_of_a_tile_are_whole_samples_and_only_the_last_tile_is_short(axis):
    lengths = [len(axis.rows(tile)) for tile in range(axis.num_tiles)]
    assert all(length == axis.tile_rows for length in lengths[:-1])
    assert 0 < lengths[-1] <= axis.tile_rows
    for tile in range(axis.num_tiles):
        samples, rows = axis.samples(tile), axis.rows(tile)
        assert _ends(rows) == (samples.start * axis.num_covectors, samples.stop * axis.num_covectors)


@given(grids(), st.integers(1, 9), st.integers(1, 9))
def test_blocks_cover_every_stored_tile_exactly_once(grid, height, width):
    blocks = list(grid.blocks(height, width))
    covered = Counter(
        (row, column)
        for block in blocks
        for row in block.rows()
        for column in block.columns()
        if grid.is_stored(row, column)
    )
    assert covered == Counter(grid.tiles())
    assert len(blocks) == grid.num_blocks(height, width)
    assert all(0 < len(block.rows()) <= height and 0 < len(block.columns()) <= width for block in blocks)


@given(grids())
def test_stored_tiles_and_mirrors_are_the_whole_matrix(grid):
    stored = list(grid.tiles())
    assert len(stored) == len(set(stored)) == grid.num_tiles
    mirrored = 0
    for row in range(grid.rows.num_tiles):
        for column in range(grid.columns.num_tiles):
            is_mirrored = not grid.is_stored(row, column)
            assert ((column, row) if is_mirrored else (row, column)) in stored
            mirrored += is_mirrored
    assert grid.num_tiles + mirrored == grid.rows.num_tiles * grid.columns.num_tiles


@given(grids())
def test_pairs_are_counted_as_they_are_computed(grid):
    pairs = {
        (i, j) if i <= j or not grid.symmetric else (j, i)
        for i in range(grid.rows.num_samples)
        for j in range(grid.columns.num_samples)
    }
    assert grid.num_pairs == len(pairs)
    assert grid.shape == (grid.rows.num_rows, grid.columns.num_rows)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 9))
def test_cutting_a_span_keeps_its_samples_in_order(start, length, size):
    pieces = Span(start, start + length).cut(size)
    assert [sample for piece in pieces for sample in range(*_ends(piece))] == list(range(start, start + length))
    assert all(0 < len(piece) <= size for piece in pieces)


@given(st.integers(1, 3_000_000), st.integers(1, 10_000))
def test_default_tile_is_possible_and_at_most_4096_rows(num_samples, num_covectors):
    tile = default_tile(num_samples, num_covectors)
    assert 1 <= tile <= num_samples
    assert tile == 1 or tile * num_covectors <= 4096


@pytest.mark.parametrize(
    ("num_samples", "num_covectors", "tile"),
    [(100, 1, 100), (50_000, 1, 2048), (50_000, 10, 409), (499_999, 1, 2048), (500_000, 1, 4096), (5000, 5000, 1)],
)
def test_default_tile_of_known_sizes(num_samples, num_covectors, tile):
    assert default_tile(num_samples, num_covectors) == tile


def _ends(span: Span) -> tuple[int, int]:
    return span.start, span.stop
