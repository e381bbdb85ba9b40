"""Uses are found, their rows assigned to samples, and whatever does not add up is left to the fallback."""

import pytest
import torch
import torch.nn.functional as F
from reference import Custom
from torch import nn

from ntkpipe.jacobian.fallback import take
from ntkpipe.jacobian.trace import Recorder, count_edges, leaves, trace
from ntkpipe.models import prepare_model

L = nn.Linear
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ORDERS = ((0, 1, 2), (4, 3, 2, 1, 0))


def functional(function, **members):
    torch.manual_seed(0)
    return prepare_model(Custom(function, **members), dtype=torch.float64, device=torch.device("cpu"))


def traced(function, inputs=X, **members):
    model = functional(function, **members)
    return trace(model, [take(inputs, order) for order in ORDERS], [len(order) for order in ORDERS])


def tokens(x):
    return x.view(-1, 3, 2)


LAYOUTS = {
    "one row a sample": (lambda m, x: m.a(x), L(6, 2), (1, 1)),
    "batch first": (lambda m, x: m.a(tokens(x)).flatten(1), L(2, 2), (1, 3)),
    "time first": (lambda m, x: m.a(tokens(x).transpose(0, 1)).transpose(0, 1).flatten(1), L(2, 2), (3, 1)),
    "only the first token is read": (lambda m, x: torch.tanh(m.a(tokens(x)))[:, 0], L(2, 2), (1, 3)),
    "windows, samples, tokens": (
        lambda m, x: m.a(tokens(x).repeat(1, 2, 1).view(-1, 2, 3, 2).transpose(0, 1)).transpose(0, 1).flatten(1),
        L(2, 2),
        (2, 3),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_of_rows_is_found(name):
    function, layer, layout = LAYOUTS[name]
    tracing = traced(function, a=layer)
    assert tracing.covered == ("a.weight", "a.bias")
    assert (tracing.uses[0].leading, tracing.uses[0].trailing) == layout


def sorted_inside(m, x):
    order = torch.argsort(x[:, 0])
    return torch.tanh(m.a(x[order]))[torch.argsort(order)]


def differentiates_itself(m, x):
    with torch.enable_grad():
        x = x.clone().requires_grad_(True)
        return torch.autograd.grad(m.b(torch.tanh(m.a(x))).sum(), x, create_graph=True)[0]


# Name → (forward pass, members, what goes to the fallback and a word of the reason).
LEFT = {
    "another operation": (lambda m, x: m.a(x) @ m.a.weight, {"a": L(6, 6)}, {"a.weight": "without a rule"}),
    "transposed": (lambda m, x: F.linear(m.a(x), m.a.weight.t()), {"a": L(6, 4)}, {"a.weight": "without a rule"}),
    "no rule": (lambda m, x: m.a(x) * m.g, {"a": L(6, 3), "g": nn.Parameter(torch.ones(3))}, {"g": "without a rule"}),
    "order depends on data": (sorted_inside, {"a": L(6, 3)}, {"a.weight": "layout", "a.bias": "layout"}),
    "rows without samples": (
        lambda m, x: x[:, :3] * m.a(m.e).sum(0),
        {"a": L(2, 3), "e": nn.Parameter(torch.ones(15, 2))},
        {"a.weight": "layout", "a.bias": "layout", "e": "without a rule"},
    ),
    "weight and bias at once": (
        lambda m, x: F.linear(x, m.w, m.v) + F.linear(m.v.expand(len(x), 6), m.w),
        {"w": nn.Parameter(torch.ones(6, 6)), "v": nn.Parameter(torch.ones(6))},
        {"v": "without a rule"},
    ),
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
    tracing = traced(function, **members)
    assert set(tracing.fallback) == set(reasons)
    for parameter, word in reasons.items():
        assert word in tracing.fallback[parameter]
    assert not set(tracing.fallback) & set(tracing.covered)


def test_unused_means_that_autograd_finds_no_way():
    tracing = traced(lambda m, x: m.a(x) + 0 * m.b(x) + m.c(x).detach(), a=L(6, 2), b=L(6, 2), c=L(6, 2))
    assert tracing.unused == ("c.weight", "c.bias")
    assert tracing.covered == ("a.weight", "a.bias", "b.weight", "b.bias")


def test_a_weight_used_twice_has_two_uses():
    tracing = traced(lambda m, x: m.a(torch.tanh(m.a(x))), a=L(6, 6))
    assert len(tracing.uses) == 2
    assert tracing.covered == ("a.weight", "a.bias")


def test_moved_parameters_keep_their_reason():
    tracing = traced(lambda m, x: m.a(x), a=L(6, 2)).without({"a.weight": "as a test"})
    assert tracing.covered == ("a.bias",)
    assert tracing.fallback == {"a.weight": "as a test"}
    assert dict(tracing.uses[0].names) == {"bias": "a.bias"}


def test_another_use_in_another_batch_does_not_match():
    def function(m, x):
        h = m.a(x)
        return h + x @ m.a.weight.T if (x > 9).any() else h

    model = functional(function, a=L(6, 2))
    tracing = trace(model, [take(X, order) for order in ORDERS], [3, 5])
    for batch, expected in ((X, True), (X + 10, False)):
        with Recorder(model.parameters()) as recorder:
            outputs = model(batch)
        assert tracing.matches(recorder.calls, count_edges(outputs, model.parameters()), 5) is expected


def test_recorder_keeps_the_edge_of_an_output_that_changes_in_place():
    model = functional(lambda m, x: F.relu_(m.a(x)).mul(2), a=L(6, 2))
    with Recorder(model.parameters()) as recorder:
        outputs = model(X)
    (grad,) = torch.autograd.grad(outputs.sum(), [recorder.calls[0].edge])
    assert torch.equal(grad, 2.0 * (outputs > 0))


def test_recorder_sees_that_an_input_was_changed():
    model = functional(lambda m, x: (m.a(x), x.add_(1))[0], a=L(6, 2))
    with Recorder(model.parameters()) as recorder, torch.no_grad():
        model(X)
    assert recorder.calls[0].input_was_changed()


def test_leaves_are_counted_by_edge():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    found = list(leaves((a * b + a).sum()))
    assert sum(leaf is a for leaf in found) == 2
    assert sum(leaf is b for leaf in found) == 1
    assert not list(leaves(torch.ones(2)))
