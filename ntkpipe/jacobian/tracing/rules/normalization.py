"""Gains and offsets of normalisations: the normalised input times a weight, plus a bias."""

# ruff: noqa: A002 - arguments are named as in torch

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkpipe.jacobian.tracing.rules.elementwise import per_channel, scaled
from ntkpipe.jacobian.tracing.rules.form import Bound, Operand, Rule, Thunk

Weight = Tensor | None


def _affine(input: Tensor, weight: Weight, bias: Weight, normalized: Thunk, *, by_channel: bool = True) -> Bound:
    """``normalized() * weight + bias``, where both lie along channels, the second axis, or along the last axes."""
    operands = {}
    for role, tensor, x in (("weight", weight, normalized), ("bias", bias, None)):
        if tensor is not None:
            operand = per_channel(tensor, input.ndim) if by_channel else tensor
            operands[role] = Operand(tensor, scaled(operand, x, input.shape))
    return Bound(operands, (input,))


def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Weight = None, bias: Weight = None, eps: float = 1e-5
) -> Bound:
    """Normalised over the last axes; weight and bias have these axes."""
    x = input.detach()
    return _affine(input, weight, bias, lambda: F.layer_norm(x, normalized_shape, eps=eps), by_channel=False)


def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Weight = None, eps: float | None = None) -> Bound:
    """Divided by the root mean square over the last axes."""
    x = input.detach()
    return _affine(input, weight, None, lambda: F.rms_norm(x, normalized_shape, eps=eps), by_channel=False)


def group_norm(input: Tensor, num_groups: int, weight: Weight = None, bias: Weight = None, eps: float = 1e-5) -> Bound:
    """Normalised over groups of channels of a sample."""
    x = input.detach()
    return _affine(input, weight, bias, lambda: F.group_norm(x, num_groups, eps=eps))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Weight = None,
    bias: Weight = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Bound | None:
    """Normalised by running statistics; with those of the batch there is no kernel of single samples."""
    if training:
        return None
    x = input.detach()
    return _affine(input, weight, bias, lambda: F.batch_norm(x, running_mean, running_var, eps=eps))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Weight = None,
    bias: Weight = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Bound | None:
    """Normalised over each channel of a sample, or by running statistics."""
    if use_input_stats and running_mean is not None:
        return None  # computing it again would update the statistics
    x, options = input.detach(), {"use_input_stats": use_input_stats, "eps": eps}
    return _affine(input, weight, bias, lambda: F.instance_norm(x, running_mean, running_var, **options))


RULES: dict[Callable[..., Any], Rule] = {
    F.layer_norm: layer_norm,
    **dict.fromkeys((F.rms_norm, torch.rms_norm), rms_norm),
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
}
