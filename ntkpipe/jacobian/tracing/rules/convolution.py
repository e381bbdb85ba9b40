"""Convolutions of one to three dimensions, plain and transposed."""

# ruff: noqa: A002 - arguments are named as in torch

from collections.abc import Sequence

import torch
from torch import Tensor

from ntkpipe.jacobian.tracing.rules.elementwise import with_bias
from ntkpipe.jacobian.tracing.rules.form import Bound, Outer, Rules

PerAxis = int | Sequence[int]  # one value for all spatial axes, or one for each


def _each(value: PerAxis, dims: int) -> list[int]:
    return [int(value)] * dims if isinstance(value, int) else [int(v) for v in value] * (dims if len(value) == 1 else 1)


def _windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], count: Sequence[int], groups: int
) -> Tensor:
    """What a kernel sees of (B, C, *space) at each of its places, without a copy."""
    spatial = x.stride()[2:]
    channels = x.shape[1] // groups
    steps = [step * size for step, size in zip(spatial, stride, strict=True)]
    taps = [step * size for step, size in zip(spatial, dilation, strict=True)]
    strides = (x.stride(0), *steps, channels * x.stride(1), *taps, x.stride(1))
    return x.as_strided((x.shape[0], *count, groups, *kernel, channels), strides, x.storage_offset())


def _padded(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """x padded, with its channels next to each other in memory, so that windows are read in long runs."""
    x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    pairs = [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair]
    return torch.nn.functional.pad(x, pairs) if any(pairs) else x


def _by_group(x: Tensor, groups: int) -> Tensor:
    apart: Tensor = x.unflatten(1, (groups, -1))
    return apart.permute(0, *range(3, apart.ndim), 1, 2)


def _arranged(jacobian: Tensor, weight: Tensor) -> Tensor:
    """Jacobians whose last axes are channels of the weight and windows, with the weight's own axes."""
    lead = jacobian.shape[:-3]
    return jacobian.reshape(*lead, weight.shape[0], *weight.shape[2:], weight.shape[1]).movedim(-1, len(lead) + 1)


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: PerAxis = 1,
    padding: PerAxis | str = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
) -> Bound | None:
    """Rows are the places of the kernel, inputs what it sees there."""
    dims = weight.ndim - 2
    if input.ndim != weight.ndim:
        return None  # a sample without a batch
    x, kernel, steps, holes = input.detach(), weight.shape[2:], _each(stride, dims), _each(dilation, dims)
    reach = [hole * (size - 1) for hole, size in zip(holes, kernel, strict=True)]
    if isinstance(padding, str):
        before = [0 if padding == "valid" else total // 2 for total in reach]
        after = [0 if padding == "valid" else total - total // 2 for total in reach]
    else:
        before = after = _each(padding, dims)
    space = zip(x.shape[2:], before, after, reach, steps, strict=True)
    count = [(size + low + high - far - 1) // step + 1 for size, low, high, far, step in space]

    def inputs() -> Tensor:
        return _windows(_padded(x, before, after), kernel, steps, holes, count, groups)

    form = Outer(1 + dims, inputs, lambda grad: _by_group(grad, groups), lambda j: _arranged(j, weight))
    bound = Bound({"weight": (weight, form)}, (input,))
    return with_bias(bound, bias, (x.shape[0], weight.shape[0], *count), by_channel=True)


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: PerAxis = 1,
    padding: PerAxis = 0,
    output_padding: PerAxis = 0,
    groups: int = 1,
    dilation: PerAxis = 1,
) -> Bound | None:
    """Rows are the places of the input, cotangents what the kernel has written from there."""
    dims = weight.ndim - 2
    if input.ndim != weight.ndim:
        return None
    x, kernel, steps, holes = input.detach(), weight.shape[2:], _each(stride, dims), _each(dilation, dims)
    edges, extra = _each(padding, dims), _each(output_padding, dims)
    space = zip(x.shape[2:], steps, edges, holes, kernel, extra, strict=True)
    out = [(size - 1) * step - 2 * edge + hole * (taps - 1) + more + 1 for size, step, edge, hole, taps, more in space]

    def cotangents(grad: Tensor) -> Tensor:
        return _windows(_padded(grad, edges, edges), kernel, steps, holes, x.shape[2:], groups)

    form = Outer(1 + dims, lambda: _by_group(x, groups), cotangents, lambda j: _arranged(j.transpose(-1, -2), weight))
    bound = Bound({"weight": (weight, form)}, (input,))
    return with_bias(bound, bias, (x.shape[0], groups * weight.shape[1], *out), by_channel=True)


RULES: Rules = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), conv),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), conv_transpose),
}
