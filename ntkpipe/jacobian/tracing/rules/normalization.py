"""Gains and offsets of normalisations: the normalised input times a weight, plus a bias."""

# ruff: noqa: A002 - arguments are named as in torch

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkpipe.jacobian.tracing.rules.elementwise import per_channel, scaled
from ntkpipe.jacobian.tracing.rules.form import Bound, Operand, Rules, Thunk

Weight = Tensor | None


def _affine(input: Tensor, weight: Weight, bias: Weight, normalized: Thunk, *, by_channel: bool = True) -> Bound:
    """``normalized() * weight + bias``, where both lie along channels, the second axis, or along the last axes."""
    operands = {}
    for role, tensor, x in (("weight", weight, normalized), ("bias", bias, None)):
        if tensor is not None:
            operand = per_channel(tensor, input.ndim) if by_channel else tensor
            operands[role] = Operand(tensor, scaled(operand, input.shape, x=x))
    return Bound(operands, (input,))


def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Weight = None, bias: Weight = None, eps: float = 1e-5
) -> Bound:
    """Normalised over the last axes; weight and bias have these axes."""
    normalized = partial(F.layer_norm, input.detach(), normalized_shape, eps=eps)
    return _affine(input, weight, bias, normalized, by_channel=False)


def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Weight = None, eps: float | None = None) -> Bound:
    """Divided by the root mean square over the last axes."""
    normalized = partial(F.rms_norm, input.detach(), normalized_shape, eps=eps)
    return _affine(input, weight, None, normalized, by_channel=False)


def group_norm(input: Tensor, num_groups: int, weight: Weight = None, bias: Weight = None, eps: float = 1e-5) -> Bound:
    """Normalised over groups of channels of a sample."""
    return _affine(input, weight, bias, partial(F.group_norm, input.detach(), num_groups, eps=eps))


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
    return _affine(input, weight, bias, partial(F.batch_norm, input.detach(), running_mean, running_var, eps=eps))


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
    normalize = partial(F.instance_norm, use_input_stats=use_input_stats, eps=eps)
    return _affine(input, weight, bias, partial(normalize, input.detach(), running_mean, running_var))


RULES: Rules = {
    F.layer_norm: layer_norm,
    **dict.fromkeys((F.rms_norm, torch.rms_norm), rms_norm),
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
}
