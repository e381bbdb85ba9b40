"""Jacobians of a few samples, however they are held: their first sample, whether they are finite, their bytes."""

import pytest
import torch
from pieces import Draw, jacobian, jacobians

from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.late import Late
from ntkpipe.jacobian.representations.pairwise import Pairwise
from ntkpipe.jacobian.representations.pieces import Piece
from ntkpipe.jacobian.representations.table import LookupTable

FACTORS = {
    "dense": lambda draw: draw.dense(5),
    "pairwise": lambda draw: draw.pairwise(3, 4, 2),
    "constant": lambda draw: draw.constant(4, torch.eye(2, 3, dtype=torch.float64)),
    "late": lambda draw: draw.late(2, 3, 4, 5),
    "table": lambda draw: draw.table(3, 4, num_indices=6),
}
# Tensors with one value for each sample, at an index of sample 2.
SPOILT = {
    "dense": ("matrix", (2, 1, 3)),
    "pairwise": ("inputs", (2, 0, 1)),
    "constant": ("inputs", (2, 0, 0)),
    "late": ("cotangents", (2, 1, 0, 2, 4)),
    "table": ("cotangents", (1, 2, 0, 3)),
}


@pytest.mark.parametrize("name", FACTORS)
def test_the_first_sample_is_that_of_the_jacobians(name):
    factor = FACTORS[name](Draw(4, 2))
    first = factor.first()
    assert torch.equal(jacobian(first, 1), jacobian(factor, 4)[:1])
    assert all(tensor.is_contiguous() for tensor in first.tensors())


def test_the_first_sample_of_a_piece_has_every_factor():
    draw = Draw(4, 2)
    piece = draw.piece(*(make(draw) for make in FACTORS.values()))
    first = piece.first()
    assert (first.num_samples, first.num_covectors) == (1, 2)
    assert torch.equal(jacobians(first), jacobians(piece)[:1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", FACTORS)
def test_samples_that_are_not_finite_are_found(name, value):
    draw = Draw(4, 2)
    factor = FACTORS[name](draw)
    assert draw.piece(factor).is_finite().tolist() == [True] * 4
    tensor, index = SPOILT[name]
    getattr(factor, tensor)[index] = value
    assert draw.piece(draw.dense(3), factor).is_finite().tolist() == [True, True, False, True]


def test_covectors_that_are_not_finite_spoil_every_sample():
    draw = Draw(3, 2)
    factor = draw.constant(4, torch.full((2, 3), torch.nan))
    assert draw.piece(factor).is_finite().tolist() == [False] * 3


@pytest.mark.parametrize("name", FACTORS)
def test_finite_values_whose_sum_overflows_are_finite(name):
    draw = Draw(4, 2, dtype=torch.float32)
    factor = FACTORS[name](draw)
    for tensor in factor.tensors():
        if tensor.is_floating_point():
            tensor.fill_(3e38)
    assert draw.piece(factor).is_finite().tolist() == [True] * 4


def test_bytes_are_those_of_all_tensors():
    piece = Piece(
        2,
        3,
        (
            Dense(torch.zeros(2, 3, 7)),
            Pairwise(torch.zeros(2, 4, 5), torch.zeros(3, 2, 4, 6), True, False),
            Pairwise(torch.zeros(2, 1, 5), torch.zeros(3, 1, 1, 8), False, True),
            Late(torch.zeros(2, 2, 4, 5), torch.zeros(2, 3, 2, 4, 6)),
            LookupTable(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(3, 2, 4, 6)),
        ),
    )
    floats = 42 + (40 + 144) + (10 + 24) + (80 + 288) + 144
    assert piece.num_bytes() == 4 * floats + 8 * 8
