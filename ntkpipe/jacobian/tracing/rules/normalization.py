"""Gains and offsets of normalisations: the normalised input times a weight, plus a bias."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkpipe.jacobian.tracing.rules.elementwise import scaled
from ntkpipe.jacobian.tracing.rules.form import Bound, Operand, Rule, Scale


def _affine(input: Tensor, weight: Tensor | None, bias: Tensor | None, normalized: Callable[[], Tensor]) -> Bound:  # noqa: A002
    """An output ``normalized() * weight + bias`` in which both lie along channels, the second axis."""
    operands = {}
    for role, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            channels = tensor.detach().view(-1, *(1 for _ in range(input.ndim - 2)))
            operands[role] = Operand(
                tensor, _scaled_by(channels, normalized if role == "weight" else None, input.shape)
            )
    return Bound(operands, (input,))


def _scaled_by(operand: Tensor, normalized: Callable[[], Tensor] | None, shape: Sequence[int]) -> Scale:
    """As :func:`scaled`, by an input that is computed when it is needed."""
    form = scaled(operand, None, shape)
    if normalized is None:
        return form
    return Scale(form.row_dims, lambda: form.cotangents(normalized()), form.cotangents)


def layer_norm(
    input: Tensor,  # noqa: A002 - torch's names
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Bound:
    """Normalised over the last axes; weight and bias have these axes."""
    x = input.detach()
    operands = {}
    if weight is not None:
        plain = lambda: F.layer_norm(x, normalized_shape, eps=eps)  # noqa: E731
        operands["weight"] = Operand(weight, _scaled_by(weight, plain, input.shape))
    if bias is not None:
        operands["bias"] = Operand(bias, scaled(bias, None, input.shape))
    return Bound(operands, (input,))


def rms_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Bound | None:
    """Divided by the root mean square over the last axes."""
    if weight is None:
        return None
    x = input.detach()
    plain = lambda: F.rms_norm(x, normalized_shape, eps=eps)  # noqa: E731
    return Bound({"weight": Operand(weight, _scaled_by(weight, plain, input.shape))}, (input,))


def group_norm(
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Bound:
    """Normalised over groups of channels of a sample."""
    x = input.detach()
    return _affine(input, weight, bias, lambda: F.group_norm(x, num_groups, eps=eps))


def batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Bound | None:
    """Normalised by running statistics; with those of the batch there is no kernel of single samples."""
    del momentum
    if training:
        return None
    x = input.detach()
    return _affine(input, weight, bias, lambda: F.batch_norm(x, running_mean, running_var, eps=eps))


def instance_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Bound | None:
    """Normalised over each channel of a sample, or by running statistics."""
    del momentum
    x = input.detach()
    if use_input_stats and running_mean is not None:
        return None  # computing it again would update the statistics
    return _affine(
        input,
        weight,
        bias,
        lambda: F.instance_norm(x, running_mean, running_var, use_input_stats=use_input_stats, eps=eps),
    )


RULES: dict[Callable[..., Any], Rule] = {
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
}
