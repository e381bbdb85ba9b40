"""Blocks become tiles: sample-major, in place, mirrored to the last bit."""

import pytest
import torch
from pieces import Draw, jacobians

from ntkpipe.build.tiles import Gram
from ntkpipe.jacobian.engine import JacobianBlock


def draw_block(sizes, covectors, seed):
    pieces = []
    for number, size in enumerate(sizes):
        draw = Draw(size, covectors, seed=100 * seed + number)
        pieces.append(draw.piece(draw.dense(5), draw.pairwise(2, 3, 2)))
    return JacobianBlock(tuple(pieces), torch.zeros((sum(sizes), covectors), dtype=torch.float64))


def jacobian(block):
    """Rows sample-major."""
    return torch.cat([jacobians(piece).flatten(0, 1) for piece in block.pieces])


def fill(left, right, tile, covectors, pairs="all", row=0, column=0, is_mirrored=False, pause=lambda: None):
    Gram(covectors if pairs == "all" else 1, pairs, pause).fill(left, right, [tile], row, column, mirror=is_mirrored)


@pytest.mark.parametrize("covectors", [1, 3])
def test_strips_fill_their_place_and_nothing_else(covectors):
    left, right = draw_block((3, 2), covectors, 0), draw_block((2, 2, 1), covectors, 1)
    tile = torch.full((9 * covectors, 7 * covectors), torch.nan, dtype=torch.float64)
    fill(left, right, tile, covectors, row=3, column=1)
    rows, columns = slice(3 * covectors, 8 * covectors), slice(covectors, 6 * covectors)
    assert torch.allclose(tile[rows, columns], jacobian(left) @ jacobian(right).T, rtol=0, atol=1e-12)
    tile[rows, columns] = torch.nan
    assert bool(tile.isnan().all())


@pytest.mark.parametrize("sizes", [(5,), (2, 2, 1), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("covectors", [1, 3])
def test_a_diagonal_tile_is_symmetric_to_the_last_bit(sizes, covectors):
    block = draw_block(sizes, covectors, 0)
    tile = torch.full((5 * covectors, 5 * covectors), torch.nan, dtype=torch.float64)
    fill(block, block, tile, covectors, is_mirrored=True)
    assert torch.equal(tile, tile.T)
    assert torch.allclose(tile, jacobian(block) @ jacobian(block).T, rtol=0, atol=1e-12)


def test_summed_pairs_of_covectors_take_one_row_a_sample():
    block = draw_block((2, 3), 4, 0)
    tile = torch.full((5, 5), torch.nan, dtype=torch.float64)
    fill(block, block, tile, 4, "sum", is_mirrored=True)
    rows = jacobian(block).view(5, 4, -1)
    assert torch.equal(tile, tile.T)
    assert torch.allclose(tile, torch.einsum("isp,jsp->ij", rows, rows), rtol=0, atol=1e-12)


def test_two_strips_of_a_diagonal_tile_are_mirrored():
    first, second = draw_block((2, 1), 2, 0), draw_block((2,), 2, 1)
    tile = torch.full((10, 10), torch.nan, dtype=torch.float32)
    for left, row, right, column in ((first, 0, first, 0), (first, 0, second, 3), (second, 3, second, 3)):
        fill(left, right, tile, 2, row=row, column=column, is_mirrored=True)
    whole = torch.cat([jacobian(first), jacobian(second)])
    assert torch.equal(tile, tile.T)
    assert torch.allclose(tile, (whole @ whole.T).float(), rtol=1e-5, atol=1e-5)


def test_work_can_be_stopped_between_pieces():
    class StoppedError(Exception):
        pass

    calls = []

    def pause():
        calls.append(1)
        if len(calls) == 3:
            raise StoppedError

    block = draw_block((1, 1, 1), 1, 0)
    with pytest.raises(StoppedError):
        fill(block, block, torch.zeros((3, 3), dtype=torch.float64), 1, pause=pause)
