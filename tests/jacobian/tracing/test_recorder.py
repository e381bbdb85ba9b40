"""What is made of parameters, what is the same for all samples, and which calls bring both together."""

from collections import OrderedDict, namedtuple

import engines
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from ntkpipe.jacobian.tracing.recorder import tensors_in
from ntkpipe.jacobian.tracing.uses import total_gradient

L = nn.Linear
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = X.view(5, 3, 2)


def param(*shape):
    return nn.Parameter(torch.zeros(shape))


def record(function, inputs=X, *, expansions=frozenset(), detach=False, **members):
    model = engines.functional(function, **members)
    return model, *engines.record(model, inputs, expansions=expansions, detach=detach)


def found(recorder):
    """Function, and roles with the parameters that they are made of, of each call."""
    return [(call.name, {role: a.sources for role, a in call.arguments.items()}) for call in recorder.calls]


def without_gradient(m, x):
    with torch.no_grad():
        norm = m.w.norm()
        F.linear(x, m.w)
    return F.linear(x, m.w / norm)


def overwritten(m, x):
    kept = torch.zeros(5, 6, dtype=x.dtype)
    kept.copy_(x)
    return kept * m.v


def written_into(m, x):
    return x @ m.w.t().clone().add_(x.mean())


def with_buffer(m, x):
    return F.linear(x, m.w * m.scale)


W, V = {"w": (3, 6)}, {"v": (6,)}
# Forward pass, shapes of parameters, calls that are uses.
USES = {
    "a parameter": (lambda m, x: F.linear(x, m.w), W, [("linear", {"weight": ("w",)})]),
    "by keyword": (lambda m, x: F.linear(weight=m.w, input=x), W, [("linear", {"weight": ("w",)})]),
    "transposed": (lambda m, x: x @ m.w.t(), W, [("matmul", {"weight": ("w",)})]),
    "of two": (lambda m, x: F.linear(x, m.w * m.v), W | V, [("linear", {"weight": ("w", "v")})]),
    "of two, the other way": (lambda m, x: F.linear(x, m.v * m.w), W | V, [("linear", {"weight": ("w", "v")})]),
    "made under no_grad": (without_gradient, W, [("linear", {"weight": ("w",)})]),
    "used under no_grad": (torch.no_grad()(lambda m, x: F.linear(x, m.w)), W, []),
    "detached": (lambda m, x: F.linear(x, m.w.detach()), W, []),
    "detached weight": (lambda m, x: F.linear(x, m.w.detach(), m.v[:3]), W | V, [("linear", {"bias": ("v",)})]),
    "by a number": (lambda m, x: F.linear(x, 2 * m.w), W, [("linear", {"weight": ("w",)})]),
    "by a constant": (
        lambda m, x: F.linear(x, m.w * torch.arange(6.0, dtype=x.dtype)),
        W,
        [("linear", {"weight": ("w",)})],
    ),
    "by a buffer": (with_buffer, W, [("linear", {"weight": ("w",)})]),
    "by samples": (lambda m, x: x * m.v, V, [("mul", {"right": ("v",)})]),
    "by what was overwritten with samples": (overwritten, V, [("mul", {"right": ("v",)})]),
    "by the shape of samples": (lambda m, x: m.v * torch.ones_like(x), V, [("mul", {"left": ("v",)})]),
    "samples written into it": (written_into, W, [("add_", {"left": ("w",)})]),
    "no rule": (lambda m, x: torch.logaddexp(x, m.v), V, []),
    "no rule for these options": (
        lambda m, x: F.embedding(x.long() % 3, m.w, scale_grad_by_freq=True).flatten(1),
        W,
        [],
    ),
    "entered": (
        lambda m, x: F.multi_head_attention_forward(
            *3 * (x[:, None],), 6, 2, m.i, None, None, None, False, 0.0, m.o, None, training=False
        )[0][:, 0],
        {"i": (18, 6), "o": (6, 6)},
        [("linear", {"weight": ("i",)}), ("linear", {"weight": ("o",)})],
    ),
}


@pytest.mark.parametrize("name", USES)
def test_uses_are_calls_that_bring_parameters_and_samples_together(name):
    function, shapes, calls = USES[name]
    members = {n: param(*shape) for n, shape in shapes.items()}
    if name == "by a buffer":
        members["scale"] = nn.Buffer(torch.arange(6.0))
    _, recorder, _ = record(function, **members)
    assert found(recorder) == calls


def test_views_of_parameters_are_parameters_and_say_where_they_are():
    _, recorder, _ = record(
        lambda m, x: F.linear(x, m.w) + F.linear(x, m.w[1:]).sum(1, keepdim=True) + x @ m.w.T + x @ (m.w * 1.0).T,
        w=param(4, 6),
    )
    arguments = [next(iter(call.arguments.values())) for call in recorder.calls]
    assert [a.is_parameter for a in arguments[:3]] == [True, True, True]
    assert [a.geometry for a in arguments[:3]] == [None, (6, (3, 6), (6, 1)), (0, (6, 4), (1, 6))]
    assert (arguments[3].is_parameter, arguments[3].geometry) == (False, None)


def test_the_same_view_with_other_values_is_not_the_parameter():
    _, recorder, _ = record(lambda m, x: F.linear(x, m.w.view(3, 6).to(torch.float64).neg()), w=param(18))
    (argument,) = recorder.calls[0].arguments.values()
    assert not argument.is_parameter


IN_PLACE = {
    "after": lambda m, x: F.relu_(m.a(x)).mul(2).flatten(1),
    "of a part": lambda m, x: m.a(x).index_fill_(-1, torch.tensor([0]), 0.5).flatten(1),
    "by an item": lambda m, x: set_item(m.a(x)).flatten(1),
    "of a view": lambda m, x: relu_view(m.a(x)).flatten(1),
    "residual": lambda m, x: m.a(x).add_(1.0).mul_(3.0).flatten(1),
}


def set_item(values):
    values[..., 0] = 7.0
    return values


def relu_view(values):
    values[..., 1:].tanh_()
    return values


@pytest.mark.parametrize("inputs", [X, T], ids=["rows", "tokens"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_gradients_arrive_at_calls_whose_output_changes_in_place(name, inputs):
    model, recorder, outputs = record(IN_PLACE[name], inputs, a=L(inputs.shape[-1], 3))
    (call,) = recorder.calls
    *exact, grad = torch.autograd.grad(outputs.cos().sum(), [*model.parameters.values(), call.edge])
    for argument, one in zip(call.arguments.values(), exact, strict=True):
        found = total_gradient(argument.form, grad.reshape(call.shape), argument.shape)
        assert torch.allclose(found, one, rtol=1e-12, atol=1e-14)


def test_an_input_that_was_changed_is_seen():
    for change in (False, True):
        _, recorder, _ = record(lambda m, x, c=change: (m.a(x), x.add_(1) if c else x + 1)[0], X.clone(), a=L(6, 2))
        assert recorder.calls[0].input_was_changed() is change


def test_what_has_another_shape_in_another_batch_is_numbered():
    shapes = []
    for inputs in (X, X[:3]):
        _, recorder, _ = record(lambda m, x: x + (2 * m.v).expand(len(x), -1), inputs, v=param(6))
        shapes.append(recorder.made)
        assert found(recorder) == [("add", {"right": ("v",)})]
    assert shapes[0][1] == ((5, 6),)
    assert shapes[1][1] == ((3, 6),)
    assert shapes[0][0] == shapes[1][0] == ((6,),)


def test_expansions_are_uses_when_told():
    _, recorder, _ = record(lambda m, x: x + (2 * m.v).expand(len(x), -1), expansions=frozenset({1}), v=param(6))
    assert found(recorder) == [("expand", {"input": ("v",)})]


def test_cut_uses_leave_the_gradients_of_others():
    members = {"a": L(6, 3), "v": param(3)}
    model, _, outputs = record(lambda m, x: torch.logaddexp(m.a(x), m.v), detach=True, **members)
    grads = torch.autograd.grad(outputs.sum(), list(model.parameters.values()), allow_unused=True)
    assert {name for name, grad in zip(model.parameters, grads, strict=True) if grad is not None} == {"v"}


def test_values_are_those_of_the_model_alone():
    function = USES["entered"][0]
    model, _, outputs = record(function, i=param(18, 6), o=param(6, 6))
    assert torch.equal(outputs, model(X))


def test_tensors_are_found_in_whatever_holds_them():
    found = [torch.zeros(n) for n in range(7)]
    a, b, c, d, e, f, g = found
    pair = namedtuple("pair", "left right")
    value = (a, [b, None, 1.5], {"c": c, "d": (d, torch.float32)}, pair(e, OrderedDict(f=f)), slice(1, 2), "g", [[g]])
    assert [id(each) for each in tensors_in(value)] == [id(each) for each in found]
    assert [id(each) for each in tensors_in(value)] == [
        id(each) for each in tree_leaves(value) if isinstance(each, torch.Tensor)
    ]
