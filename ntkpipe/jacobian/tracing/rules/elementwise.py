"""Operations that broadcast a parameter over the samples: sums, products, selections, expansions, normalisations."""

# ruff: noqa: A002 - arguments are named as in torch

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkpipe.jacobian.tracing.rules.form import Bound, Rules, Scale, Thunk


def scaled(operand: Tensor, shape: Sequence[int], scale: float = 1.0, x: Tensor | Thunk | None = None) -> Scale:
    """The form of ``... + operand * x * scale``, or of ``... + operand * scale``, in an output of ``shape``."""
    # Axes along which the operand is broadcast number the rows; its own axes are the elements.
    padded = (*(1 for _ in range(len(shape) - operand.ndim)), *operand.shape)
    rows = [axis for axis, size in enumerate(padded) if size == 1]
    own = [axis for axis, size in enumerate(padded) if size != 1]
    x = x.detach() if isinstance(x, Tensor) else x

    def by_row(values: Tensor) -> Tensor:
        ordered = values.permute(*rows, *own)
        return ordered.flatten(len(rows)) if own else ordered.unsqueeze(-1)

    def inputs() -> Tensor:
        assert x is not None
        return by_row((x if isinstance(x, Tensor) else x()).expand(shape))

    return Scale(len(rows), None if x is None else inputs, lambda grad: by_row(grad if scale == 1.0 else grad * scale))


def per_channel(vector: Tensor, ndim: int) -> Tensor:
    """A vector over channels in the shape in which it broadcasts along the second of ``ndim`` axes."""
    return vector.detach().view(-1, *(1 for _ in range(ndim - 2)))


def with_bias(
    bound: Bound | None, bias: Tensor | None, shape: Sequence[int], scale: float = 1.0, *, by_channel: bool = False
) -> Bound | None:
    """The operands of a product and what is added to it, ``bias * scale``, in an output of ``shape``."""
    if bound is None or bias is None:
        return bound
    along = per_channel(bias, len(shape)) if by_channel else bias
    return Bound({**bound.operands, "bias": (bias, scaled(along, shape, scale))}, bound.saved)


def _shape(*tensors: object) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(*(value.shape for value in tensors if isinstance(value, Tensor)))
    return shape


def add(input: object, other: object, *, alpha: float = 1) -> Bound:
    """``input + alpha * other``."""
    pairs, shape = (("left", input, 1.0), ("right", other, alpha)), _shape(input, other)
    return Bound({role: (t, scaled(t, shape, scale)) for role, t, scale in pairs if isinstance(t, Tensor)})


def sub(input: object, other: object, *, alpha: float = 1) -> Bound:
    """``input - alpha * other``."""
    return add(input, other, alpha=-alpha)


def rsub(input: object, other: object, *, alpha: float = 1) -> Bound:
    """``other - alpha * input``."""
    return sub(other, input, alpha=alpha)


def mul(input: object, other: object) -> Bound | None:
    """``input * other``."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return None  # by a number: computed from parameters alone, so not a use
    shape = _shape(input, other)
    left, right = (input, scaled(input, shape, x=other)), (other, scaled(other, shape, x=input))
    return Bound({"left": left, "right": right}, (input, other))


def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Bound:
    """``input + value * tensor1 * tensor2``."""
    shape = _shape(input, tensor1, tensor2)
    operands = {
        "bias": (input, scaled(input, shape)),
        "left": (tensor1, scaled(tensor1, shape, value, tensor2)),
        "right": (tensor2, scaled(tensor2, shape, value, tensor1)),
    }
    return Bound(operands, (tensor1, tensor2))


def where(condition: Tensor, input: object, other: object) -> Bound:
    """``input`` where the condition holds, else ``other``."""
    shape = _shape(condition, input, other)
    operands = {}
    for role, tensor, chosen in (("input", input, condition), ("other", other, ~condition)):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            operands[role] = (tensor, scaled(tensor, shape, x=chosen.to(tensor.dtype)))
    return Bound(operands, (condition,))


def prelu(input: Tensor, weight: Tensor) -> Bound:
    """``max(input, 0) + weight * min(input, 0)``, with a weight for each channel, or one for all."""
    form = scaled(per_channel(weight, input.ndim), input.shape, x=input.detach().clamp_max(0))
    return Bound({"weight": (weight, form)}, (input,))


def _axes(input: Tensor, given: tuple[Any, ...]) -> list[tuple[int, int]]:
    """Pairs of an axis' size (one for new axes on the left) and the number given for it, alone or in a tuple."""
    numbers = given[0] if len(given) == 1 and not isinstance(given[0], int) else given
    padded = [1] * (len(numbers) - input.ndim) + list(input.shape)
    return list(zip(padded, map(int, numbers), strict=True))


def expand(input: Tensor, *sizes: Any) -> Bound:
    """The same along new axes or axes of size one, such as a class token for every sample."""
    shape = [old if new == -1 else new for old, new in _axes(input, sizes)]
    return Bound({"input": (input, scaled(input, shape))})


def repeat(input: Tensor, *repeats: Any) -> Bound | None:
    """Copies along axes of size one; copies along longer ones have no rule."""
    axes = _axes(input, repeats)
    if any(size != 1 and times != 1 for size, times in axes):
        return None
    return Bound({"input": (input, scaled(input, [size * times for size, times in axes]))})


def affine(function: Callable[..., Tensor], *, by_channel: bool = True) -> Callable[..., Bound | None]:
    """The rule of a function whose weight and bias lie along channels, the second axis, or along the last axes."""
    signature = inspect.signature(function)

    def rule(*args: Any, **kwargs: Any) -> Bound | None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        # With statistics of the batch there is no kernel of single samples; computing them again would update others.
        if given.get("training") or (given.get("use_input_stats") and given["running_mean"] is not None):
            return None
        input, weight, bias = given["input"], given.pop("weight"), given.pop("bias", None)  # noqa: A001 - as in torch
        normalized = partial(function, **{**given, "input": input.detach()})
        operands = {}
        for role, tensor, x in (("weight", weight, normalized), ("bias", bias, None)):
            if tensor is not None:
                along = per_channel(tensor, input.ndim) if by_channel else tensor
                operands[role] = (tensor, scaled(along, input.shape, x=x))
        return Bound(operands, (input,))

    return rule


_T: Any = torch.Tensor  # its methods
RULES: Rules = {
    # Also in place: the form of a sum does not read the values that are overwritten.
    **dict.fromkeys((torch.add, _T.add, _T.add_), add),
    **dict.fromkeys((torch.sub, torch.subtract, _T.sub, _T.sub_), sub),
    **dict.fromkeys((torch.rsub, _T.__rsub__), rsub),
    **dict.fromkeys((torch.mul, torch.multiply, _T.mul), mul),
    **dict.fromkeys((torch.addcmul, _T.addcmul), addcmul),
    torch.where: where,
    **dict.fromkeys((F.prelu, torch.prelu), prelu),
    **dict.fromkeys((_T.expand, torch.broadcast_to, _T.broadcast_to), expand),
    _T.expand_as: lambda tensor, other: expand(tensor, *other.shape),
    **dict.fromkeys((_T.repeat, torch.tile, _T.tile), repeat),
}
NORMALIZATIONS: Rules = {
    F.layer_norm: affine(F.layer_norm, by_channel=False),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), affine(F.rms_norm, by_channel=False)),
    **{function: affine(function) for function in (F.group_norm, F.batch_norm, F.instance_norm)},
}
