"""A use's Jacobian is that of autograd, sample by sample, however samples lie among its rows."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from engines import functional, record, traced
from torch import nn

from ntkpipe.jacobian.tracing.uses import Layout, pull_back, total_gradient

L = nn.Linear
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IMAGES = torch.randn(5, 4, 6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
IDS = torch.randint(0, 7, (5, 4), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("axis", "leading", "trailing"), list(itertools.product((0, 1, 2), (1, 2, 3), (1, 2))))
def test_layouts_put_samples_first_without_a_copy(axis, leading, trailing):
    """Each value says its sample and its rest."""
    sizes = [2, 3, 4]
    sizes[axis] = leading * 5 * trailing
    place = torch.arange(sizes[axis]).reshape([-1 if each == axis else 1 for each in range(3)]).expand(sizes)
    values = torch.stack([place, torch.arange(torch.Size(sizes).numel()).view(sizes)], dim=-1).contiguous()
    found = Layout(axis, leading, trailing).split(values, 5)
    assert len(found) == 5
    assert found.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    for sample in range(5):
        assert bool((found[sample, ..., 0] // trailing % 5 == sample).all())
    assert found[..., 1].flatten().sort().values.tolist() == list(range(torch.Size(sizes).numel()))


def param(*shape):
    return nn.Parameter(torch.zeros(shape))


USES = {
    "linear": (lambda m, x: torch.tanh(m.a(x)), X, {"a": L(6, 3)}),
    "linear, time first": (
        lambda m, x: torch.tanh(m.a(x.transpose(0, 1))).transpose(0, 1).flatten(1),
        T,
        {"a": L(6, 3)},
    ),
    "conv": (lambda m, x: torch.tanh(m.a(x)).flatten(1), IMAGES, {"a": nn.Conv2d(4, 6, (2, 3), stride=2, groups=2)}),
    "conv_transpose": (
        lambda m, x: torch.tanh(m.a(x)).flatten(1),
        IMAGES,
        {"a": nn.ConvTranspose2d(4, 6, 3, groups=2)},
    ),
    "layer_norm": (lambda m, x: torch.tanh(m.a(x)).flatten(1), T, {"a": nn.LayerNorm(6)}),
    "embedding": (lambda m, x: torch.tanh(m.a(x)).flatten(1), IDS, {"a": nn.Embedding(7, 3)}),
    "mul": (lambda m, x: torch.tanh(m.w * x).flatten(1), T, {"w": param(4, 1)}),
    "add": (lambda m, x: torch.tanh(m.w + x).flatten(1), T, {"w": param(6)}),
    "einsum": (
        lambda m, x: torch.tanh(torch.einsum("bti,oti->bto", x, m.w)).flatten(1),
        T,
        {"w": param(3, 4, 6)},
    ),
}


def call_and_grad(name, seed):
    """The model, its one call, the gradient of a function of the outputs at it, and of the parameters."""
    function, inputs, members = USES[name]
    model = functional(function, **members)
    recorder, outputs = record(model, inputs)
    (call,) = recorder.calls
    covector = torch.cos(torch.arange(float(outputs.shape[1]), dtype=outputs.dtype) + seed).expand_as(outputs)
    return model, call, outputs, covector


@pytest.mark.parametrize("name", USES)
def test_jacobians_are_those_of_autograd(name):
    function, inputs, members = USES[name]
    model, call, outputs, covector = call_and_grad(name, 0.0)
    (grad,) = torch.autograd.grad(outputs, [call.edge], covector, retain_graph=True)
    tracing = traced(function, inputs, **members)
    assert tracing.fallback == {}
    for use in tracing.uses:
        found = use.jacobian(call, grad.reshape(call.shape), 5)
        assert found.shape == (5, *use.shape)
        assert use.numel == found[0].numel()
        parameter = model.parameters[use.sources[0]]
        for sample in range(5):
            (exact,) = torch.autograd.grad(outputs[sample], parameter, covector[sample], retain_graph=True)
            assert torch.allclose(found[sample], exact, rtol=1e-12, atol=1e-14)
        total = total_gradient(call.arguments[use.role].form, grad.reshape(call.shape), use.shape)
        assert torch.allclose(total, found.sum(0), rtol=1e-12, atol=1e-13)


# What a weight is made of parameters by.
MADE = {
    "the parameter": lambda w, v: w,
    "a view": lambda w, v: w[1:],
    "transposed": lambda w, v: w.t(),
    "of two": lambda w, v: torch.tanh(w * v),
    "of one of two": lambda w, v: w * v.detach(),
}


@pytest.mark.parametrize("is_batched", [True, False])
@pytest.mark.parametrize("pulled_bytes", [1, 2**26])
@pytest.mark.parametrize("name", MADE)
def test_jacobians_are_pulled_back_to_what_the_argument_is_made_of(name, pulled_bytes, is_batched, monkeypatch):
    monkeypatch.setattr("ntkpipe.jacobian.tracing.uses._PULLED_BYTES", pulled_bytes)
    original = torch.autograd.grad

    def grad(*args, is_grads_batched=False, **options):
        if is_grads_batched and not is_batched:
            raise RuntimeError("no batching rule")
        return original(*args, is_grads_batched=is_grads_batched, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    model = functional(
        lambda m, x: F.linear(x[:, : MADE[name](m.w, m.v).shape[1]], MADE[name](m.w, m.v)), w=param(6, 6), v=param(6, 6)
    )
    recorder, _ = record(model, X)
    (argument,) = recorder.calls[-1].arguments.values()
    parameters = model.parameters
    rows = torch.randn(3, *argument.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = dict(pull_back(argument, parameters, rows))
    assert set(found) == set(argument.sources)
    for number, row in enumerate(rows):
        made = MADE[name](parameters["w"], parameters["v"])
        exact = torch.autograd.grad(made, list(parameters.values()), row, allow_unused=True)
        for parameter, one in zip(parameters, exact, strict=True):
            if parameter in found:
                wanted = torch.zeros(36, dtype=torch.float64) if one is None else one.flatten()
                assert torch.allclose(found[parameter][number], wanted, rtol=1e-12, atol=1e-14)
            else:
                assert one is None
