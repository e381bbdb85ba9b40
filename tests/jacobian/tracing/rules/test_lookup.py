"""Rows of tables against the slow reference, parameter by parameter."""

import math

import pytest
import torch
import torch.nn.functional as F
from quiet import QUIET
from rule_cases import (
    IDS,
    B,
    L,
    T,
    case,
    folded,
    ids_of,
    never_applied,
    outcome,
    param,
    plain,
    positions,
    read,
    read_first,
    time_first,
    without_rule,
)
from torch import nn

from ntkpipe.jacobian.tracing.rules import linear

pytestmark = QUIET

# The fallback warns about its loop, torch about old-style hooks; none of it is tested here.

CASES = {}

REPEATED = torch.tensor(
    [[1, 1, 1, 1], [0, 2, 0, 2], [3, 3, 0, 0], [5, 4, 3, 2], [10, 10, 10, 0], [1, 2, 3, 4], [9, 8, 9, 8]]
)

CASES |= {
    "embedding": case(plain, IDS, a=nn.Embedding(11, 5)),
    "embedding, one id": case(plain, IDS[:, 0], a=nn.Embedding(11, 5)),
    "embedding, repeated ids": case(plain, REPEATED, a=nn.Embedding(11, 5)),
    "embedding, the same ids": case(plain, torch.full((B, 4), 3), a=nn.Embedding(11, 5)),
    "embedding, summed": case(lambda m, x: read(m.a(x).sum(1)), REPEATED, a=nn.Embedding(11, 5)),
    "embedding, padding": case(plain, REPEATED, a=nn.Embedding(11, 5, padding_idx=0)),
    "embedding, padding from the end": case(plain, REPEATED, a=nn.Embedding(11, 5, padding_idx=-1)),
    "embedding, functional": case(
        lambda m, x: read(F.embedding(x, m.w, 0, None, 2.0, False, False)), REPEATED, w=param(11, 5)
    ),
    "embedding, by name": case(
        lambda m, x: read(F.embedding(weight=m.w, input=x, padding_idx=3)), REPEATED, w=param(11, 5)
    ),
    "embedding, sparse": case(plain, REPEATED, a=nn.Embedding(11, 5, sparse=True), may="*"),
    "embedding, scaled": case(lambda m, x: read(m.a(x) * math.sqrt(5)), IDS, a=nn.Embedding(11, 5)),
    "embedding, time first": case(time_first, IDS, a=nn.Embedding(11, 5)),
    "embedding, as many tokens as samples": case(time_first, ids_of(B, 7), a=nn.Embedding(11, 5)),
    "embedding, folded": case(folded, IDS, a=nn.Embedding(11, 5)),
    "embedding, windows": case(plain, ids_of(B, 2, 3), a=nn.Embedding(11, 5)),
    "embedding, 32 bit ids": case(plain, IDS.int(), a=nn.Embedding(11, 5)),
    "embedding, first token read": case(read_first, IDS, a=nn.Embedding(11, 5)),
    "embedding, twice": case(lambda m, x: read(m.a(x) * m.a((x + 1) % 11)), IDS, a=nn.Embedding(11, 5)),
    "embedding, twice, unlike positions": case(
        lambda m, x: read(torch.cat([m.a(x), m.a(x[:, :2] // 2)], 1)), IDS, a=nn.Embedding(11, 5)
    ),
    "embedding, then a linear": case(lambda m, x: read(m.h(m.a(x))), IDS, a=nn.Embedding(11, 5), h=L(5, 3)),
    "embedding, tied to the head": case(
        lambda m, x: F.linear(torch.tanh(m.a(x)).mean(1), m.a.weight)[:, :7], IDS, a=nn.Embedding(11, 5), may="a.weight"
    ),
    "embedding, of positions": case(
        lambda m, x: read(m.a(x) + m.p(positions(x))), IDS, a=nn.Embedding(11, 5), p=nn.Embedding(4, 5)
    ),
    "embedding, of positions, as a row": case(
        lambda m, x: read(m.a(x) + m.p(positions(x)[None])), IDS, a=nn.Embedding(11, 5), p=nn.Embedding(9, 5)
    ),
    "embedding, of positions, for each sample": case(
        lambda m, x: read(m.a(x) + m.p(positions(x).expand_as(x))), IDS, a=nn.Embedding(11, 5), p=nn.Embedding(9, 5)
    ),
    "embedding, of positions, with an offset": case(
        lambda m, x: read(m.a(x) + m.p(positions(x) + 2)), IDS, a=nn.Embedding(11, 5), p=nn.Embedding(9, 5)
    ),
    "embedding, of positions, as many as samples": case(
        lambda m, x: read(m.a(x) + m.p(positions(x))), ids_of(B, 7), a=nn.Embedding(11, 5), p=nn.Embedding(7, 5)
    ),
    "embedding, of types": case(
        lambda m, x: read(m.a(x) + m.p(torch.zeros_like(x))), IDS, a=nn.Embedding(11, 5), p=nn.Embedding(2, 5)
    ),
    "embedding, of a mask's sums": case(
        lambda m, x: read(m.a(x) + m.p((x > 3).cumsum(1))), IDS, a=nn.Embedding(11, 5), p=nn.Embedding(9, 5)
    ),
    "embedding, by index": case(lambda m, x: read(m.w[x]), IDS, w=param(11, 5), may="w"),
    "embedding, index_select": case(
        lambda m, x: read(m.w.index_select(0, x.flatten()).view(-1, 4, 5)), IDS, w=param(11, 5), may="w"
    ),
    "embedding, one-hot": case(lambda m, x: read(F.one_hot(x, 11).to(m.w.dtype) @ m.w), IDS, w=param(11, 5)),
    "embedding, of two inputs": case(
        lambda m, ids, types: read(m.a(ids) + m.p(types)),
        {"ids": IDS, "types": (IDS > 4).long()},
        a=nn.Embedding(11, 5),
        p=nn.Embedding(2, 5),
    ),
    "embedding_bag": case(plain, REPEATED, a=nn.EmbeddingBag(11, 5, mode="sum"), may="*"),
    "embedding_bag, mean and padding": case(
        plain, REPEATED[:5].repeat(2, 1)[:7], a=nn.EmbeddingBag(11, 5, mode="mean", padding_idx=0), may="*"
    ),
    "embedding, relative positions as in T5": case(
        lambda m, x: read(
            (
                (x @ x.mT)[:, None] + m.p(3 + positions(x)[:, None] - positions(x)[None]).permute(2, 0, 1).unsqueeze(0)
            ).softmax(-1)
            @ m.a(x)[:, None]
        ),
        T,
        p=nn.Embedding(7, 2),
        a=L(6, 5),
    ),
    "embedding, relative positions as in Swin": case(
        lambda m, x: read(
            (
                (x @ x.mT)[:, None]
                + m.p[(3 + positions(x)[:, None] - positions(x)[None]).view(-1)].view(4, 4, -1).permute(2, 0, 1)
            ).softmax(-1)
            @ m.a(x)[:, None]
        ),
        T,
        p=param(7, 2),
        a=L(6, 5),
    ),
}

CASES |= {
    "index_select, function": case(
        lambda m, x: read(torch.index_select(m.w, 0, x.flatten()).unflatten(0, x.shape)), IDS, w=param(11, 3)
    ),
}

# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_exact(name):
    outcome(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_what_has_a_rule_does_not_fall_back(name):
    assert without_rule(CASES[name]) == []


def test_every_rule_is_used_in_a_case():
    assert never_applied(linear.LOOKUPS, CASES.values()) == []
