"""Pieces contract to the Grams of the Jacobians that they stand for, however these are held, cut and wanted."""

import itertools

import pytest
import torch
from pieces import Draw, error, gram
from small import with_sizes

from ntkpipe.jacobian.representations import pieces as module
from ntkpipe.jacobian.representations.pieces import Piece, contract, contract_diagonal_planes, contract_planes
from ntkpipe.jacobian.representations.sums import Workspace

PAIRS = ("all", "same", "sum")
# Rounding of float64.
EXACT = 1e-13


def unit(draw):
    return torch.eye(draw.s, draw.s + 1, dtype=torch.float64)


def slanted(draw):
    """Covectors that are not orthogonal."""
    return torch.cos(torch.arange(draw.s * 4.0, dtype=torch.float64)).view(draw.s, 4)


# Every way to hold Jacobians, as functions of what draws them.
WAYS = {
    "dense": lambda draw: draw.dense(7),
    "one position": lambda draw: draw.pairwise(1, 4, 3),
    "one position, no bias": lambda draw: draw.pairwise(1, 4, 3, has_bias=False),
    "positions": lambda draw: draw.pairwise(3, 4, 2),
    "positions, no bias": lambda draw: draw.pairwise(3, 4, 2, has_bias=False),
    "constant": lambda draw: draw.constant(4, unit(draw)),
    "constant, no bias": lambda draw: draw.constant(4, unit(draw), has_bias=False),
    "constant, slanted": lambda draw: draw.constant(4, slanted(draw)),
    "late": lambda draw: draw.late(1, 3, 4, 2),
    "late, groups": lambda draw: draw.late(3, 2, 2, 4),
    "table": lambda draw: draw.table(4, 3, num_indices=3),
    "table, large": lambda draw: draw.table(2, 3, num_indices=60),
}


def diagonal_of(piece, pairs="all"):
    planes = piece.num_covectors if pairs == "same" else 1
    return torch.cat(contract_diagonal_planes(piece, pairs, planes), dim=1)


def draw_piece(ways, num_samples, num_covectors, seed=0, dtype=torch.float64):
    draw = Draw(num_samples, num_covectors, seed=seed, dtype=dtype)
    return draw.piece(*(WAYS[way](draw) for way in ways))


def copied(piece):
    """The same values as another piece, which is contracted without mirroring."""
    return Piece(piece.num_samples, piece.num_covectors, piece.factors)


def check(left, right, pairs, bound=EXACT):
    """Assert that a pair of pieces, and each with itself, is contracted right; and symmetric to the last bit."""
    assert error(contract(left, right, Workspace(), pairs), gram(left, right, pairs)) <= bound
    for piece in (left, right):
        mirrored = contract(piece, piece, Workspace(), pairs)
        assert torch.equal(mirrored, mirrored.transpose(-1, -2))
        assert error(mirrored, gram(piece, piece, pairs)) <= bound
        assert error(mirrored, contract(piece, copied(piece), Workspace(), pairs).double()) <= bound


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("num_covectors", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_hold_jacobians(way, num_covectors, pairs):
    check(draw_piece([way], 5, num_covectors), draw_piece([way], 4, num_covectors, seed=1), pairs)


@pytest.mark.parametrize("num_covectors", [1, 2])
@pytest.mark.parametrize("ways", list(itertools.combinations(WAYS, 2)))
def test_any_two_ways_add_up(ways, num_covectors):
    for pairs in PAIRS:
        check(draw_piece(ways, 3, num_covectors), draw_piece(ways, 4, num_covectors, seed=1), pairs)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("num_covectors", [1, 4])
def test_all_ways_add_up(num_covectors, pairs):
    """More products of factors than are added up in their own dtype."""
    assert sum(way.partition(",")[0] not in {"dense", "late"} for way in WAYS) > module._FEW
    check(draw_piece(WAYS, 6, num_covectors), draw_piece(WAYS, 1, num_covectors, seed=1), pairs)


# Rows of one piece: below, at and above the edges of strips, of leaves that are halved, of cells.
ROWS = [1, 2, 15, 47, 48, 49, 64, 129, 255, 256, 257, 400, 511, 512, 513, 700]
SIZED = ("dense", "one position", "positions", "constant", "late", "table, large")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("ways", [SIZED[:1], SIZED[1:2], SIZED], ids=["dense", "factors", "all"])
def test_pieces_of_any_size(ways, rows):
    check(draw_piece(ways, rows, 1), draw_piece(ways, 37, 1, seed=1), "all")


@pytest.mark.parametrize(("num_samples", "num_covectors"), [(1, 30), (3, 200), (40, 15), (130, 5), (233, 3)])
@pytest.mark.parametrize("ways", [("dense", "one position"), ("constant, slanted", "positions", "late", "table")])
def test_covectors_of_any_number(ways, num_samples, num_covectors):
    if num_covectors > 100 and "positions" in ways:
        pytest.skip("as with fewer, and slow: a product for each pair of covectors")
    check(draw_piece(ways, num_samples, num_covectors), draw_piece(ways, 2, num_covectors, seed=1), "all")


@pytest.mark.parametrize("pairs", PAIRS)
def test_a_workspace_keeps_nothing_from_one_product_to_the_next(pairs):
    workspace = Workspace()
    for sizes, num_covectors in (((9, 9), 3), ((4, 7), 2), ((9, 5), 1), ((2, 2), 3)):
        for ways in (SIZED, SIZED[:1], SIZED[1:3]):
            left, right = (draw_piece(ways, n, num_covectors, seed=n) for n in sizes)
            assert error(contract(left, right, workspace, pairs), gram(left, right, pairs)) <= EXACT
            assert error(contract(left, left, workspace, pairs), gram(left, left, pairs)) <= EXACT


@pytest.mark.parametrize("ways", [("dense",), ("one position",), SIZED])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_entries_go_to_their_place_in_its_dtype(ways, dtype):
    left, right = draw_piece(ways, 5, 2), draw_piece(ways, 4, 2, seed=1)
    for other in (left, right):
        exact = gram(left, other)
        whole = torch.full((2 * exact.shape[0] + 1, 3 * exact.shape[1]), torch.nan, dtype=dtype)
        place = whole[1::2, ::3]
        contract_planes(left, other, Workspace(), "all", [place])
        assert bool(whole[::2].isnan().all() and whole[:, 1::3].isnan().all() and whole[:, 2::3].isnan().all())
        assert error(place, exact) <= (EXACT if dtype == torch.float64 else 1e-6)
        if other is left:
            assert torch.equal(place, place.T)
        place.fill_(torch.nan)
        assert bool(whole.isnan().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_entries_are_in_the_dtype_of_the_pieces(dtype):
    found = contract(draw_piece(SIZED, 3, 2, dtype=dtype), draw_piece(SIZED, 2, 2, dtype=dtype), Workspace())
    assert found.dtype == dtype


def positive(piece):
    """The worst case of long sums: all terms have one sign."""
    for factor in piece.factors:
        for tensor in factor.tensors():
            tensor.abs_()
    return piece


# A million parameters; of pairs of factors, as many inputs or outputs.
LONG = {
    "dense": lambda draw: draw.dense(1_000_000),
    "late": lambda draw: draw.late(1, 2, 2000, 500),
    "late, groups": lambda draw: draw.late(1000, 2, 25, 40),
    "pairwise": lambda draw: draw.pairwise(1, 1000, 1000),
    "positions": lambda draw: draw.pairwise(4, 1000, 1000),
    "many inputs": lambda draw: draw.pairwise(1, 200_000, 5),
    "many outputs": lambda draw: draw.pairwise(1, 5, 200_000),
    "many inputs at positions": lambda draw: draw.pairwise(3, 100_000, 2),
    "many inputs, constant": lambda draw: draw.constant(1_000_000, torch.eye(2)),
    "many looked up": lambda draw: draw.table(4000, 5, num_indices=500),
}


def relative_error(found, exact):
    assert torch.equal(found == 0, exact == 0)
    return float(((found.double() - exact) / torch.where(exact == 0, 1.0, exact)).abs().max())


@pytest.mark.parametrize("way", LONG)
def test_long_float32_sums_are_as_good_as_float64(way):
    draw = Draw(3, 2, dtype=torch.float32)
    piece = positive(draw.piece(LONG[way](draw)))
    exact = gram(piece, piece)
    assert relative_error(contract(piece, piece, Workspace()), exact) <= 5e-7
    assert relative_error(contract(piece, copied(piece), Workspace(), "same"), gram(piece, piece, "same")) <= 5e-7
    diagonal = exact.view(3, 2, 3, 2)[range(3), :, range(3)]
    assert relative_error(diagonal_of(piece), diagonal) <= 5e-7


def test_many_factors_are_added_up_in_float64():
    """One term and four hundred of 2^-26 of it: float32 would lose each of them."""
    draw = Draw(3, 1, dtype=torch.float32)
    factors = [draw.pairwise(1, 1, 1, has_bias=False) for _ in range(401)]
    for number, factor in enumerate(factors):
        factor.inputs.fill_(1.0)
        factor.cotangents.fill_(2.0**-13 if number else 1.0)
    piece = draw.piece(*factors)
    for other in (piece, copied(piece)):
        found = contract(piece, other, Workspace())
        assert torch.equal(found, torch.full((3, 3), 1 + 400 * 2.0**-26))


@pytest.mark.parametrize("num_covectors", [1, 3])
@pytest.mark.parametrize("way", [*WAYS, "all"])
def test_diagonal_blocks_are_those_of_the_gram(way, num_covectors):
    piece = draw_piece(WAYS if way == "all" else [way], 4, num_covectors)
    blocks = gram(piece, piece).view(4, num_covectors, 4, num_covectors)[range(4), :, range(4)]
    assert error(diagonal_of(piece), blocks) <= EXACT
    equal = blocks.diagonal(dim1=1, dim2=2)
    assert error(diagonal_of(piece, "same"), equal[:, :, None]) <= EXACT
    assert error(diagonal_of(piece, "sum"), equal.sum(1)[:, None, None]) <= EXACT


def test_diagonal_blocks_of_a_few_samples_at_a_time_are_the_same(monkeypatch):
    piece = draw_piece(WAYS, 7, 2)
    whole = diagonal_of(piece)
    with_sizes(monkeypatch, late_bytes=1)
    assert error(diagonal_of(piece), whole) <= EXACT


def test_jacobians_are_multiplied_out_a_few_outputs_at_a_time(monkeypatch):
    with_sizes(monkeypatch, late_bytes=1000)
    check(draw_piece(["late", "late, groups"], 5, 3), draw_piece(["late", "late, groups"], 4, 3, seed=1), "all")
