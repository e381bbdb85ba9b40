"""Uses are found, their rows assigned to samples, and whatever does not add up is left to the fallback."""

import pytest
import torch
import torch.nn.functional as F
from engines import functional, record, traced, tracing_of
from torch import nn

from ntkpipe.jacobian.tracing.trace import Pass, nothing_traced
from ntkpipe.jacobian.tracing.uses import Layout

L = nn.Linear
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def param(*shape):
    return nn.Parameter(torch.zeros(shape))


def tokens(x):
    return x.view(-1, 3, 2)


LAYOUTS = {
    "one row a sample": (lambda m, x: m.a(x), L(6, 2), Layout(0, 1, 1)),
    "batch first": (lambda m, x: m.a(tokens(x)).flatten(1), L(2, 2), Layout(0, 1, 1)),
    "batch first, folded": (
        lambda m, x: m.a(tokens(x).flatten(0, 1)).unflatten(0, (-1, 3)).flatten(1),
        L(2, 2),
        Layout(0, 1, 3),
    ),
    "time first": (
        lambda m, x: m.a(tokens(x).transpose(0, 1)).transpose(0, 1).flatten(1),
        L(2, 2),
        Layout(1, 1, 1),
    ),
    "time first, folded": (
        lambda m, x: m.a(tokens(x).transpose(0, 1).flatten(0, 1)).unflatten(0, (3, -1)).transpose(0, 1).flatten(1),
        L(2, 2),
        Layout(0, 3, 1),
    ),
    "only the first token is read": (lambda m, x: torch.tanh(m.a(tokens(x)))[:, 0], L(2, 2), Layout(0, 1, 1)),
    "windows, samples, tokens": (
        lambda m, x: m.a(tokens(x).repeat(1, 2, 1).view(-1, 2, 3, 2).transpose(0, 1)).transpose(0, 1).flatten(1),
        L(2, 2),
        Layout(1, 1, 1),
    ),
    "windows, samples, tokens, folded": (
        lambda m, x: (
            m.a(tokens(x).repeat(1, 2, 1).view(-1, 2, 3, 2).transpose(0, 1).flatten(0, 2))
            .unflatten(0, (2, -1, 3))
            .transpose(0, 1)
            .flatten(1)
        ),
        L(2, 2),
        Layout(0, 2, 3),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_of_rows_is_found(name):
    function, layer, layout = LAYOUTS[name]
    tracing = traced(function, X, a=layer)
    assert tracing.covered == ("a.weight", "a.bias")
    assert {use.layout for use in tracing.uses} == {layout}
    rows = 1 if layer.in_features == 6 else 6 if "windows" in name else 3
    assert {use.num_positions for use in tracing.uses} == {rows}


def sorted_inside(m, x):
    order = torch.argsort(x[:, 0])
    return torch.tanh(m.a(x[order]))[torch.argsort(order)]


def differentiates_itself(m, x):
    with torch.enable_grad():
        x = x.clone().requires_grad_(True)
        return torch.autograd.grad(m.b(torch.tanh(m.a(x))).sum(), x, create_graph=True)[0]


# Name → (forward pass, members, what goes to the fallback and a word of the reason).
LEFT = {
    "no rule": (
        lambda m, x: torch.logaddexp(m.a(x), m.g),
        {"a": L(6, 3), "g": nn.Parameter(torch.ones(3))},
        {"g": "without a rule"},
    ),
    "another operation": (
        lambda m, x: torch.cdist(m.a(x), m.a.weight),
        {"a": L(6, 6)},
        {"a.weight": "without a rule"},
    ),
    "order depends on data": (sorted_inside, {"a": L(6, 3)}, {"a.weight": "layout", "a.bias": "layout"}),
    "as many calls as samples": (
        lambda m, x: torch.stack([m.a(row) for row in x]),
        {"a": L(6, 3)},
        {"a.weight": "depend on the data", "a.bias": "depend on the data"},
    ),
    "differentiates itself": (
        differentiates_itself,
        {"a": L(6, 5), "b": L(5, 1)},
        {"a.weight": "add up", "b.weight": "add up"},
    ),
    "depends on data, edges": (
        lambda m, x: m.a(x) + sum(m.a(x[:1]).detach() * 0 + m.a.bias * 0 for _ in range(len(x))),
        {"a": L(6, 3)},
        {"a.weight": "depend", "a.bias": "depend"},
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_has_no_factors_is_left_to_the_fallback(name):
    function, members, reasons = LEFT[name]
    tracing = traced(function, X, **members)
    assert set(tracing.fallback) == set(reasons)
    for parameter, word in reasons.items():
        assert word in tracing.fallback[parameter]
    assert not set(tracing.fallback) & set(tracing.covered)


def test_unused_means_that_autograd_finds_no_way():
    tracing = traced(lambda m, x: m.a(x) + 0 * m.b(x) + m.c(x).detach(), X, a=L(6, 2), b=L(6, 2), c=L(6, 2))
    assert tracing.unused == ("c.weight", "c.bias")
    assert tracing.covered == ("a.weight", "a.bias", "b.weight", "b.bias")


def test_every_use_of_a_parameter_is_found():
    tracing = traced(lambda m, x: m.a(torch.tanh(m.a(x))), X, a=L(6, 6))
    assert [(use.call, use.role, use.is_output) for use in tracing.uses] == [
        (0, "weight", False),
        (0, "bias", False),
        (1, "weight", True),
        (1, "bias", True),
    ]
    assert tracing.covered == ("a.weight", "a.bias")


# What is made of parameters is used in their place: forward pass, members, sources of each use.
MADE = {
    "rows without samples": (
        lambda m, x: x[:, :3] * m.a(m.e).sum(0),
        {"a": L(2, 3), "e": param(15, 2)},
        [("e", "a.weight", "a.bias")],
    ),
    "weight and bias at once": (
        lambda m, x: F.linear(x, m.w, m.v) + F.linear(m.v.expand(len(x), 6), m.w),
        {"w": param(6, 6), "v": param(6)},
        [("w",), ("v",), ("v",), ("w",)],
    ),
    "transposed": (
        lambda m, x: F.linear(m.a(x), m.a.weight.t()),
        {"a": L(6, 4, bias=False)},
        [("a.weight",), ("a.weight",)],
    ),
    "a class token": (
        lambda m, x: m.a(torch.cat([m.t.expand(len(x), -1), x], 1)),
        {"a": L(9, 2, bias=False), "t": param(1, 3)},
        [("t",), ("a.weight",)],
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_uses_of_what_is_made_of_parameters_are_found(name):
    function, members, sources = MADE[name]
    tracing = traced(function, X, **members)
    assert tracing.fallback == {}
    assert sorted(use.sources for use in tracing.uses) == sorted(sources)


def test_expansions_are_uses():
    tracing = traced(
        lambda m, x: torch.cat([(2 * m.t).expand(len(x), -1), x], 1) @ m.w, X, t=param(1, 3), w=param(9, 2)
    )
    assert tracing.expansions == {1}
    assert [use.function for use in tracing.uses] == ["expand", "matmul"]
    assert not tracing.uses[0].is_parameter


def test_moved_parameters_keep_their_reason():
    tracing = traced(lambda m, x: m.a(x), X, a=L(6, 2)).without({"a.weight": "as a test"})
    assert tracing.covered == ("a.bias",)
    assert tracing.fallback == {"a.weight": "as a test"}
    assert [use.sources for use in tracing.uses] == [("a.bias",)]


def test_what_is_made_together_moves_together():
    tracing = traced(lambda m, x: m.a(x) @ (m.v * m.w), X, a=L(6, 3), v=param(3, 1), w=param(3, 2))
    moved = tracing.without({"v": "as a test"})
    assert moved.covered == ("a.weight", "a.bias")
    assert moved.fallback == {"v": "as a test", "w": "as a test"}


def test_nothing_traced_leaves_everything_but_what_is_known_to_be_unused():
    tracing = nothing_traced(["a", "b", "c"], "as a test")
    assert (tracing.covered, tracing.uses, tracing.unused) == ((), (), ())
    assert tracing.fallback == dict.fromkeys("abc", "as a test")
    less = tracing.without_use(["b"])
    assert (less.fallback, less.unused) == ({"a": "as a test", "c": "as a test"}, ("b",))
    assert less.without({"b": "it is used"}).unused == ()


OTHERWISE = {
    "another use": lambda m, x: m.a(x) + x @ m.a.weight.T,
    "another edge": lambda m, x: m.a(x) + torch.logaddexp(x[:, :2], m.a.bias),
    "another function": lambda m, x: x @ m.a.weight.T + m.a.bias,
    "another parameter": lambda m, x: F.linear(x, m.b.weight, m.a.bias),
    "more rows": lambda m, x: m.a(torch.cat([x, x]))[: len(x)],
    "no output of its own": lambda m, x: m.a(x) * 1.0,
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_another_use_in_another_batch_does_not_match(name):
    def usual(m, x):
        return OTHERWISE[name](m, x) if (x > 9).any() else m.a(x)

    model = functional(usual, a=L(6, 2), b=L(6, 2))
    tracing = tracing_of(model, X)
    for batch, expected in ((X, True), (X + 10, False)):
        recorder, outputs = record(model, batch, expansions=tracing.expansions)
        assert tracing.matches(Pass(outputs, recorder.calls), model.parameters) is expected
