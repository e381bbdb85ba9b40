"""Convolutions of one to three dimensions, plain and transposed."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkpipe.jacobian.tracing.rules.elementwise import added
from ntkpipe.jacobian.tracing.rules.form import Bound, Operand, Outer, Rule

Sizes = int | Sequence[int]


def windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    count: Sequence[int],
    groups: int,
) -> Tensor:
    """What a kernel sees of (B, C, *space) at each of its places, without a copy."""
    spatial = x.stride()[2:]
    channels = x.shape[1] // groups
    shape = (x.shape[0], *count, groups, *kernel, channels)
    steps = [step * size for step, size in zip(spatial, stride, strict=True)]
    taps = [step * size for step, size in zip(spatial, dilation, strict=True)]
    strides = (x.stride(0), *steps, channels * x.stride(1), *taps, x.stride(1))
    return x.as_strided(shape, strides, x.storage_offset())


def _channels_last(x: Tensor) -> Tensor:
    """x with its channels next to each other in memory, so that windows are read in long runs."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _each(value: Sizes, dims: int) -> list[int]:
    return [int(value)] * dims if isinstance(value, int) else [int(v) for v in value] * (dims if len(value) == 1 else 1)


def _padded(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    pairs = [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair]
    return F.pad(x, pairs) if any(pairs) else x


def conv(
    input: Tensor,  # noqa: A002 - torch's names
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
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
        return windows(_padded(_channels_last(x), before, after), kernel, steps, holes, count, groups)

    def cotangents(grad: Tensor) -> Tensor:
        apart: Tensor = grad.unflatten(1, (groups, -1))
        return apart.permute(0, *range(3, 3 + dims), 1, 2)

    def arrange(jacobian: Tensor) -> Tensor:
        lead = jacobian.shape[:-3]
        return jacobian.reshape(*lead, weight.shape[0], *kernel, weight.shape[1]).movedim(-1, len(lead) + 1)

    operands = {"weight": Operand(weight, Outer(1 + dims, inputs, cotangents, arrange))}
    if bias is not None:
        operands["bias"] = _channels(bias, (x.shape[0], weight.shape[0], *count))
    return Bound(operands, (input,))


def _channels(bias: Tensor, shape: Sequence[int]) -> Operand:
    return Operand(bias, added(bias.detach().view(-1, *(1 for _ in shape[2:])), shape))


def conv_transpose(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Bound | None:
    """Rows are the places of the input, cotangents what the kernel has written from there."""
    dims = weight.ndim - 2
    if input.ndim != weight.ndim:
        return None
    x, kernel, steps, holes = input.detach(), weight.shape[2:], _each(stride, dims), _each(dilation, dims)
    edges, extra = _each(padding, dims), _each(output_padding, dims)
    space = zip(x.shape[2:], steps, edges, holes, kernel, extra, strict=True)
    out = [(size - 1) * step - 2 * edge + hole * (taps - 1) + more + 1 for size, step, edge, hole, taps, more in space]

    def inputs() -> Tensor:
        apart: Tensor = x.unflatten(1, (groups, -1))
        return apart.permute(0, *range(3, 3 + dims), 1, 2)

    def cotangents(grad: Tensor) -> Tensor:
        return windows(_padded(_channels_last(grad), edges, edges), kernel, steps, holes, x.shape[2:], groups)

    def arrange(jacobian: Tensor) -> Tensor:
        lead = jacobian.shape[:-3]
        by_tap = jacobian.transpose(-1, -2).reshape(*lead, weight.shape[0], *kernel, weight.shape[1])
        return by_tap.movedim(-1, len(lead) + 1)

    operands = {"weight": Operand(weight, Outer(1 + dims, inputs, cotangents, arrange))}
    if bias is not None:
        operands["bias"] = _channels(bias, (x.shape[0], prod((groups, weight.shape[1])), *out))
    return Bound(operands, (input,))


RULES: dict[Callable[..., Any], Rule] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d), conv),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), conv_transpose),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), conv_transpose),
}
