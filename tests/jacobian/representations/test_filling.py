"""Factors that are filled in batch by batch, a few covectors at a time, contract to the Gram of the reference."""

from dataclasses import replace

import pytest
import reference
import torch
from architectures import IDS, IMAGES
from engines import engine_of, forced
from pieces import error, gram
from reference import Custom, redraw
from small import with_sizes
from torch import nn

from ntkpipe.jacobian.model.device import exact_math
from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.joined import Joined
from ntkpipe.jacobian.representations.late import Late
from ntkpipe.jacobian.representations.pairwise import Pairwise
from ntkpipe.jacobian.representations.pieces import Piece
from ntkpipe.jacobian.representations.table import LookupTable

L = nn.Linear
T = torch.randn(7, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGE = IMAGES.double()
COVECTORS = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
HELD = {"pairwise": Pairwise, "late": Late, "table": LookupTable, "dense": Dense, "joined": Joined}
# Samples of each batch.
BATCHES = (slice(0, 3), slice(3, 5), slice(5, 7))


def read(values):
    """Five outputs that depend on every entry."""
    flat = torch.tanh(values).flatten(1)
    return flat @ torch.cos(torch.arange(flat.shape[1] * 5.0, dtype=flat.dtype)).view(-1, 5)


def plain(m, x):
    return read(m.a(x))


def time_first(m, x):
    return read(m.a(x.transpose(0, 1)).transpose(0, 1))


def twice(m, x):
    return read(torch.cat([m.a(x), m.a(x[:, :2])], 1))


def two_heads(m, x):
    """Outputs of which some do not depend on one layer, some not on the other: no gradient arrives there."""
    return torch.cat([read(m.a(x))[:, :2], read(m.c(x))[:, :3]], 1)


def tied(m, x):
    return read(nn.functional.embedding(x, m.w) @ m.w.T)


def normalised(m, x):
    return read(nn.functional.linear(x, m.w / m.w.norm(dim=1, keepdim=True)))


MODELS = {
    "linear": (plain, T, {"a": lambda: L(6, 5)}),
    "linear, wide": (plain, T, {"a": lambda: L(6, 50)}),
    "linear, one row": (lambda m, x: read(m.a(x[:, 0])), T, {"a": lambda: L(6, 5)}),
    "linear, time first": (time_first, T, {"a": lambda: L(6, 5)}),
    "linear, twice": (twice, T, {"a": lambda: L(6, 5)}),
    "two heads": (two_heads, T, {"a": lambda: L(6, 5), "c": lambda: L(6, 4)}),
    "conv": (plain, IMAGE, {"a": lambda: nn.Conv2d(2, 4, 3, stride=2)}),
    "conv, groups": (plain, IMAGE, {"a": lambda: nn.Conv2d(2, 4, 3, groups=2)}),
    "embedding": (plain, IDS, {"a": lambda: nn.Embedding(20, 3)}),
    "embedding, short": (plain, IDS % 4, {"a": lambda: nn.Embedding(4, 3)}),
    "layer norm": (plain, T, {"a": lambda: nn.LayerNorm(6)}),
    "tied": (tied, IDS, {"w": lambda: nn.Parameter(torch.zeros(20, 3))}),
    "normalised": (normalised, T, {"w": lambda: nn.Parameter(torch.zeros(5, 6))}),
}


def fill(engine, term, held, inputs, step):
    """Fill in every batch, ``step`` covectors at a time."""
    for samples in BATCHES:
        recorded = engine.forward(inputs[samples])
        for pulled in engine.pulled(recorded, samples, every_use=True):
            covectors = pulled.covectors
            for start in range(covectors.start, covectors.stop, step):
                part = slice(start, min(start + step, covectors.stop))
                some = {
                    call: each[start - covectors.start :][: part.stop - start] for call, each in pulled.grads.items()
                }
                held.fill(term, replace(pulled, grads=some, covectors=part))
    return held


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_term_is_the_gram_of_its_parameters(name, step, monkeypatch):
    function, inputs, members = MODELS[name]
    model = redraw(Custom(function, **{n: make() for n, make in members.items()}))
    exact = reference.jacobians(model, inputs)
    with_sizes(monkeypatch, unfolded_bytes=2000)  # two or three samples at once
    for engine in forced(engine_of(model, inputs, COVECTORS)).values():
        for term in engine.terms:
            with exact_math():
                factor = fill(engine, term, term.held_as.empty(term, 7, engine.covectors), inputs, step)
            assert isinstance(factor, HELD[term.held_as.word])
            by_output = [torch.from_numpy(exact[each]).view(7, 5, -1) for each in term.parameters]
            rows = (COVECTORS @ torch.cat(by_output, dim=2)).flatten(0, 1)
            piece = Piece(7, 3, (factor,))
            assert error(gram(piece, piece), rows @ rows.T) <= 1e-13


@pytest.mark.parametrize("name", ["linear", "linear, twice", "conv", "conv, groups", "layer norm", "tied", "two heads"])
def test_small_terms_share_a_matrix(name):
    """Each fills in its own columns, whatever was there before."""
    function, inputs, members = MODELS[name]
    engine = engine_of(redraw(Custom(function, **{n: make() for n, make in members.items()})), inputs, COVECTORS)
    engine = forced(engine).get("dense", engine)
    width = sum(term.width for term in engine.terms)
    joined = torch.full((7, 3, width), torch.nan, dtype=torch.float64)
    for term, part in zip(engine.terms, joined.split([term.width for term in engine.terms], dim=2), strict=True):
        alone = fill(engine, term, term.held_as.empty(term, 7, engine.covectors), inputs, 3)
        fill(engine, term, term.held_as(part), inputs, 2)
        assert torch.allclose(part, alone.matrix, rtol=1e-12, atol=1e-14)
    assert bool(joined.isfinite().all())
