"""Parameters are joined to terms, and each term is held in its cheapest exact way."""

from dataclasses import replace

import pytest
import reference
import torch
import torch.nn.functional as F
from architectures import IDS, IMAGES
from engines import engine_kernel, engine_of
from reference import Custom, redraw
from torch import nn

from ntkpipe.jacobian.representations.interface import Rates, Setup
from ntkpipe.jacobian.representations.terms import choose_representation

L = nn.Linear
X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)
RATES = Rates(product=32e9, elementwise=1e9)
TOKENS = torch.randn(7, 5, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def param(*shape):
    return nn.Parameter(torch.zeros(shape))


def read(values):
    """Three outputs that depend on every entry."""
    flat = torch.tanh(values).flatten(1)
    return flat @ torch.cos(torch.arange(flat.shape[1] * 3.0, dtype=flat.dtype)).view(-1, 3)


def terms_of(function, inputs, **members):
    """The terms of a model, whose kernel is exact."""
    model = redraw(Custom(function, **members))
    engine = engine_of(model, inputs, EYE)
    assert reference.error(engine_kernel(engine, inputs), reference.kernel(model, inputs)) <= 1e-12
    return engine.terms


def plain(m, x):
    return read(m.a(x))


# Forward pass, inputs, members, terms as (parameters, uses, representation of those that have no choice, width).
UNITS = {
    "one weight": (plain, X, {"a": L(6, 5, bias=False)}, [(("a.weight",), 1, None, 30)]),
    "one weight, twice": (
        lambda m, x: read(m.a(torch.tanh(m.a(x)))),
        X,
        {"a": L(6, 6, bias=False)},
        [(("a.weight",), 2, None, 36)],
    ),
    "disjoint views": (
        lambda m, x: read(F.linear(x, m.w[:2]) * F.linear(x, m.w[2:])),
        X,
        {"w": param(4, 6)},
        [(("w",), 1, None, 12), (("w",), 1, None, 12)],
    ),
    "disjoint views, columns": (
        lambda m, x: read(x[:, :2] @ m.w[:2] + x[:, :4] @ m.w[2:]),
        X,
        {"w": param(6, 4)},
        [(("w",), 1, None, 8), (("w",), 1, None, 16)],
    ),
    "overlapping views": (
        lambda m, x: read(F.linear(x, m.w[:3]) * F.linear(x, m.w[1:])),
        X,
        {"w": param(4, 6)},
        [(("w",), 2, "joined", 24)],
    ),
    "a view and the whole": (
        lambda m, x: read(F.linear(x, m.w) * F.linear(x, m.w[:1])),
        X,
        {"w": param(4, 6)},
        [(("w",), 2, "joined", 24)],
    ),
    "unlike uses": (
        lambda m, x: read(F.embedding(x.long(), m.w) @ m.w.T),
        IDS,
        {"w": param(20, 4)},
        [(("w",), 2, "joined", 80)],
    ),
    "made of two": (
        lambda m, x: read(F.linear(x, m.g * m.w)),
        X,
        {"w": param(4, 6), "g": param(4, 1)},
        [(("w", "g"), 1, "joined", 28)],
    ),
    "made of two, one used again": (
        lambda m, x: read(F.linear(x, m.g * m.w) + x[:, :4] * m.g[:, 0]),
        X,
        {"w": param(4, 6), "g": param(4, 1)},
        [(("w", "g"), 2, "joined", 28)],
    ),
    "a bias alone": (lambda m, x: read(x + m.b), X, {"b": param(6)}, [(("b",), 1, "dense", 6)]),
}


@pytest.mark.parametrize("name", UNITS)
def test_uses_that_add_up_are_one_term(name):
    function, inputs, members, wanted = UNITS[name]
    terms = terms_of(function, inputs, **members)
    assert [(term.parameters, len(term.uses), term.width) for term in terms] == [
        (parameters, uses, width) for parameters, uses, _, width in wanted
    ]
    for term, (_, _, representation, _) in zip(terms, wanted, strict=True):
        assert representation in {None, term.held_as.word}
        assert (term.held_as.word == "joined") == (representation == "joined")
    assert len({term.name for term in terms}) == len(terms)


# Forward pass, members, the biases that are part of their weight's term.
BIASES = {
    "one layer": (lambda m, x: read(m.a(x)), {"a": L(6, 40)}, {"a.bias"}),
    "two layers": (lambda m, x: read(m.c(torch.tanh(m.a(x)))), {"a": L(6, 40), "c": L(40, 40)}, {"a.bias", "c.bias"}),
    "a layer twice": (lambda m, x: read(m.a(torch.tanh(m.a(x)))), {"a": L(6, 6)}, {"a.bias"}),
    "no bias": (lambda m, x: read(m.a(x)), {"a": L(6, 40, bias=False)}, set()),
    "one bias for two weights": (
        lambda m, x: read(F.linear(x, m.v, m.b) * F.linear(x, m.w, m.b)),
        {"v": param(40, 6), "w": param(40, 6), "b": param(40)},
        set(),
    ),
    "a weight with two biases": (
        lambda m, x: read(F.linear(x, m.w, m.b) * F.linear(x, m.w, m.c)),
        {"w": param(40, 6), "b": param(40), "c": param(40)},
        set(),
    ),
    "a weight with and without": (
        lambda m, x: read(F.linear(x, m.w, m.b) * F.linear(x, m.w)),
        {"w": param(40, 6), "b": param(40)},
        set(),
    ),
    "a bias that is used again": (lambda m, x: read(m.a(x) * m.a.bias), {"a": L(6, 40)}, set()),
}


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_of_exactly_the_same_calls_is_part_of_its_weights_term(name):
    function, members, paired = BIASES[name]
    model = redraw(Custom(function, **members))
    engine = engine_of(model, X, EYE)
    engine = engine.reusing({name: "linear:pairwise" for name, _ in model.named_parameters()})
    assert reference.error(engine_kernel(engine, X), reference.kernel(model, X)) <= 1e-12
    pairs = {term.parameters for term in engine.terms if term.has_bias}
    assert {bias for _, bias in pairs} == paired
    assert all(bias.replace("bias", "weight") == weight for weight, bias in pairs)
    found = sorted(name for term in engine.terms for name in term.parameters)
    assert found == sorted(name for name, _ in model.named_parameters())


def test_biases_of_weights_that_are_not_pairwise_are_dense():
    engine = engine_of(redraw(Custom(plain, a=L(6, 40))), X, EYE).reusing({"a.weight": "linear:late"})
    assert {term.name: term.held_as.word for term in engine.terms} == {"a.weight": "late", "a.bias": "dense"}


def test_cotangents_that_are_the_covectors_are_constant():
    terms = engine_of(redraw(nn.Sequential(L(6, 40), nn.Tanh(), L(40, 3))), X, EYE)
    last = terms.reusing({"0.weight": "linear:pairwise", "2.weight": "linear:pairwise"}).terms
    assert [term.is_constant for term in last] == [False, True]


def term_of(layer, inputs):
    """The term of a layer's weight."""
    model = redraw(Custom(plain, a=layer))
    (term,) = [t for t in engine_of(model, inputs, EYE).terms if "a.weight" in t.parameters]
    return term


def choose(term, covectors=1, pairs="all", *, rates=RATES, num_samples=2000, memory=2.0**40):
    setup = Setup(torch.empty(covectors, 1), pairs, torch.float32, rates, num_samples, memory, piece_rows=2560)
    return choose_representation(term, setup).word


# A layer, its inputs, and how its Jacobians are held for tiles of 2000 samples.
CHOICES = {
    "one row": (lambda: L(6, 300), X, "pairwise"),
    "one row, two outputs": (lambda: L(6, 2), X, "dense"),
    "few tokens": (lambda: L(40, 500), TOKENS, "pairwise"),
    "many tokens": (lambda: L(2, 3), TOKENS.view(7, 100, 2), "dense"),
    "few positions": (lambda: nn.Conv2d(2, 300, 7), IMAGES, "pairwise"),
    "many positions": (lambda: nn.Conv2d(2, 4, 3), IMAGES, "dense"),
    "groups": (lambda: nn.Conv2d(2, 600, 8, groups=2), IMAGES, "late"),
    "depthwise": (lambda: nn.Conv2d(2, 2, 3, groups=2), IMAGES, "dense"),
    "a long table": (lambda: nn.Embedding(20, 4), IDS, "table"),
    "a short table": (lambda: nn.Embedding(4, 4), IDS % 4, "dense"),
    "gains": (lambda: nn.LayerNorm(6), X, "dense"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_jacobians_are_held_as_their_layer_asks_for(name):
    make, inputs, representation = CHOICES[name]
    assert choose(term_of(make(), inputs)) == representation


@pytest.mark.parametrize("covectors", [1, 10])
@pytest.mark.parametrize("positions", [1, 4, 64, 1024])
@pytest.mark.parametrize("width", [(3, 64), (64, 64), (2048, 512)])
def test_the_choice_is_the_cheapest(width, positions, covectors):
    """Of a layer of a CNN or a transformer, by operations of products at 32 a nanosecond, of entries at one."""
    n_in, n_out = width
    term = term_of(L(6, 300), X)
    uses = tuple(replace(use, num_positions=positions, n_in=n_in, n_out=n_out) for use in term.uses)
    term = replace(term, uses=uses)
    squared = covectors**2
    pairwise = positions**2 * (2 * (n_in + squared * n_out) / 32 + squared)
    dense = 2 * squared * n_in * n_out / 32 + 2 * (2 * covectors * positions * n_in * n_out / 32) / 2000
    found = choose(term, covectors)
    assert (found == "pairwise") == (pairwise <= dense)
    if found != "pairwise":
        factors, whole = positions * (n_in + covectors * n_out), covectors * n_in * n_out
        # Multiplying out once more for each pair of pieces may take a quarter of the time of their contraction, where
        # it saves half of the memory.
        assert found == ("late" if 2 * factors <= whole and positions <= 320 else "dense")
        assert choose(term, covectors, memory=0.0) == ("late" if 2 * factors <= whole else "dense")


def test_slow_elementwise_passes_rule_out_products_of_gram_matrices():
    term = term_of(L(40, 500), TOKENS)
    assert choose(term, rates=Rates(product=32e9, elementwise=1e3)) == "late"
    assert choose(term, rates=Rates(product=32e9, elementwise=1e12)) == "pairwise"


@pytest.mark.parametrize(("pairs", "squared"), [("all", 9), ("same", 3), ("sum", 3)])
def test_operations_of_a_pair_of_samples(pairs, squared):
    engine = engine_of(redraw(Custom(plain, a=L(6, 40))), X, EYE)
    for way, flops in (
        ("pairwise", 2 * (6 + squared * (40 + 1))),
        # 2 * 3 * 6 * 40 to multiply out one of seven samples, of either piece
        ("late", 2 * squared * 6 * 40 + 2 * 1440 / 7),
        ("dense", 2 * squared * 6 * 40),
    ):
        term = engine.reusing({"a.weight": f"linear:{way}", "a.bias": "linear:dense"}).terms[0]
        found = term.held_as.pair_flops(term, replace(engine.setup, pairs=pairs))
        assert (term.held_as.word, found) == (way, flops)


def test_cotangents_that_are_the_covectors_cost_nothing():
    model = redraw(nn.Sequential(L(6, 40), nn.Tanh(), L(40, 3)))
    engine = engine_of(model, X, EYE).reusing({"0.weight": "linear:pairwise", "2.weight": "linear:pairwise"})
    assert [term.held_as.pair_flops(term, engine.setup) for term in engine.terms] == [2 * (6 + 9 * 41), 2 * 40]
