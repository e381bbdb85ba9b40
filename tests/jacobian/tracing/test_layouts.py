"""Rows are assigned to samples by what gradients reach and inputs change; edges to parameters are counted."""

import pytest
import torch
from engines import functional, record
from torch import nn

from ntkpipe.jacobian.tracing.trace import Pass, count_edges, leaves
from ntkpipe.jacobian.tracing.uses import Layout

L = nn.Linear
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = X.view(4, 3, 2)


def layouts(function, inputs, **members):
    """What the rows of each argument allow, of the first call."""
    model = functional(function, **members)
    pairs = [record(model, batch) for batch in (inputs, torch.cat([inputs[:-1], inputs[:1]]))]
    one, other = (Pass(outputs, recorder.calls) for recorder, outputs in pairs)
    return one.layouts(other, range(one.num_samples))[0]


def square(x):
    """As many tokens as samples."""
    return x[:, :4, None] * torch.tensor([1.0, 2.0], dtype=x.dtype)


# Forward pass, width of its layer's inputs, layouts that one batch of four allows.
ROWS = {
    "one row a sample": (lambda m, x: m.a(x), 6, {Layout(0, 1, 1)}),
    "tokens": (lambda m, x: m.a(x.view(-1, 3, 2)).flatten(1), 2, {Layout(0, 1, 1)}),
    "tokens, folded": (lambda m, x: m.a(x.view(-1, 2)).view(-1, 9), 2, {Layout(0, 1, 3)}),
    "time first": (lambda m, x: m.a(x.view(-1, 3, 2).transpose(0, 1)).transpose(0, 1).flatten(1), 2, {Layout(1, 1, 1)}),
    "as many tokens as samples": (lambda m, x: m.a(square(x)).flatten(1), 2, {Layout(0, 1, 1)}),
    "as many tokens as samples, time first": (
        lambda m, x: m.a(square(x).transpose(0, 1)).transpose(0, 1).flatten(1),
        2,
        {Layout(1, 1, 1)},
    ),
    # The rows that are not read are known by the inputs of the last sample.
    "only the first token is read": (lambda m, x: torch.tanh(m.a(square(x)))[:, 0], 2, {Layout(0, 1, 1)}),
    "rows of several samples": (lambda m, x: m.a(x.mean(0, keepdim=True)).expand(4, -1), 6, set()),
    "a row for all": (lambda m, x: m.a(x.flip(0)).sum(0, keepdim=True) * x[:, :1], 6, set()),
    "the other way round": (lambda m, x: m.a(x.flip(0)).flip(0), 6, set()),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_allow_the_layouts_that_agree_with_gradients_and_inputs(name):
    function, width, allowed = ROWS[name]
    found = layouts(function, X, a=L(width, 3))
    assert found["weight"] == allowed
    assert found["bias"] == allowed


@pytest.mark.parametrize(
    ("function", "is_output"),
    [
        (lambda m, x: m.a(x), True),
        (lambda m, x: m.a(x) * 1.0, False),
        (lambda m, x: m.a(x).add_(1.0), False),
        (lambda m, x: m.a(x[:, None])[:, 0], False),
    ],
)
def test_the_output_of_a_call_may_be_that_of_the_model(function, is_output):
    model = functional(function, a=L(6, 3))
    recorder, outputs = record(model, X)
    assert Pass(outputs, recorder.calls).returns(0) is is_output
    assert not Pass(outputs.detach(), recorder.calls).returns(0)


def test_leaves_are_counted_by_edge():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    outputs = (a * b + a).sum()
    found = list(leaves(outputs))
    assert [sum(leaf is one for leaf in found) for one in (a, b)] == [2, 1]
    assert count_edges(outputs, {"b": b, "a": a, "c": torch.ones(1)}) == {"b": 1, "a": 2, "c": 0}
    assert not list(leaves(torch.ones(2)))


def test_shared_nodes_are_seen_once():
    a = torch.ones(2, requires_grad=True)
    shared = a * 2
    assert sum(leaf is a for leaf in leaves((shared * shared + shared).sum())) == 1
