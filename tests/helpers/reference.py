"""The slow, obvious reference: float64 Jacobians by plain autograd, one sample and one output at a time.

It shares no code with the package.
"""

import copy
import math

import numpy as np
import torch
from torch import nn

# Words in the names of what multiplies whole channels, whatever its shape: drawn about 1, not about 0.
LAYER_SCALES = ("scale", "gamma", "lambda")


class Custom(nn.Module):
    """Modules and parameters by name, and a forward pass as a function."""

    def __init__(self, function, **members):
        super().__init__()
        for name, value in members.items():
            setattr(self, name, value)
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def redraw(model, seed=0):
    """Draw every parameter anew, so that none is zero, one, or so small that its Jacobian hides.

    Weights are N(0, 1/fan-in), gains 1 + 0.3 N, biases 0.3 N, layer scales 1 + 0.3 N; buffers are left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
            last = name.rpartition(".")[2]
            is_gain = parameter.ndim <= 1 and "weight" in last
            if is_gain or last in {"original0", "weight_g"} or any(word in last for word in LAYER_SCALES):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim <= 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / math.sqrt(max(1, parameter[0].numel())))
    return model.eval()


def draw_statistics(model, seed=0):
    """Draw the running statistics of every batch norm of a model anew."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model


def call(model, batch):
    return model(**batch) if isinstance(batch, dict) else model(batch)


def size_of(inputs):
    return len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)


def pair_of(inputs, sample, dtype):
    """One sample beside a copy of itself, real inputs in ``dtype``.

    In torch 2.13 on the CPU the backward of batch and instance norm is wrong for a batch of one whose input and
    gradient differ in memory layout.
    """

    def pick(values):
        chosen = torch.as_tensor(values)[[sample, sample]]
        return chosen.to(dtype) if chosen.is_floating_point() else chosen.clone()

    return {name: pick(v) for name, v in inputs.items()} if isinstance(inputs, dict) else pick(inputs)


def copied(model):
    """A copy; tensors that old-style hooks (weight_norm, pruning) computed are computed anew in it."""
    memo = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def jacobians(model, inputs, *, kind="ntk", forward=call, dtype=torch.float64):
    """Jacobians (N*S, P_p) of every parameter that requires a gradient, rows sample-major."""
    double = copied(model).to(dtype)
    parameters = {name: p for name, p in double.named_parameters() if p.requires_grad}
    rows = {name: [] for name in parameters}
    for sample in range(size_of(inputs)):
        outputs = forward(double, pair_of(inputs, sample, dtype))[0]
        covectors = torch.eye(len(outputs), dtype=dtype)
        if kind == "pntk":
            covectors = torch.full((1, len(outputs)), len(outputs) ** -0.5, dtype=dtype)
        for covector in covectors:
            if outputs.requires_grad:
                grads = torch.autograd.grad(
                    outputs, list(parameters.values()), covector, retain_graph=True, allow_unused=True
                )
            else:
                grads = [None] * len(parameters)
            for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
                rows[name].append(
                    (torch.zeros_like(parameter) if grad is None else grad.to_dense()).reshape(-1).double()
                )
    return {name: torch.stack(found).numpy() for name, found in rows.items()}


def pseudo(found, size):
    """Jacobians for the pseudo-NTK from those of every output: their sum over the root of their number."""
    return {
        name: rows.reshape(size, -1, rows.shape[1]).sum(1) * (size / len(rows)) ** 0.5 for name, rows in found.items()
    }


def grams(found, other=None):
    """J J' of each parameter."""
    other = found if other is None else other
    return {name: found[name] @ other[name].T for name in found}


def kernel(model, inputs, **options):
    """The kernel: the sum of the Grams of all parameters."""
    return sum(grams(jacobians(model, inputs, **options)).values())


def scale(exact):
    """sqrt(K_ii K_jj), never zero."""
    root = np.sqrt(np.clip(np.diagonal(exact), 0, None))
    return np.maximum(np.outer(root, root), np.finfo(float).tiny)


def error(found, exact):
    """Largest error of an entry on the scale sqrt(K_ii K_jj)."""
    assert found.shape == exact.shape
    return float((np.abs(found - exact) / scale(exact)).max())


def worst_parameter(found, exact):
    """The largest error of any parameter's own kernel on its own scale, and its name.

    Parameters whose kernel is zero but for rounding (the key bias under softmax) are measured on the whole kernel's
    scale instead.
    """
    total = scale(sum(exact.values()))
    errors = {}
    for name, one in exact.items():
        own = scale(one)
        own = np.where(own > 1e-20 * total, own, total)
        errors[name] = float((np.abs(found[name] - one) / own).max())
    name = max(errors, key=errors.get)
    return name, errors[name]


def tanh_with_hook(pull_back):
    """A hidden activation of a ``Custom`` model whose gradient a hook replaces."""

    def function(m, h):
        h = torch.tanh(h)
        if h.requires_grad:
            h.register_hook(pull_back)
        return h

    return function
