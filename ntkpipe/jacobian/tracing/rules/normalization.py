"""Gains and offsets of normalisations: the normalised input times a weight, plus a bias."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkpipe.jacobian.tracing.rules.elementwise import per_channel, scaled
from ntkpipe.jacobian.tracing.rules.form import Bound, Rules


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


RULES: Rules = {
    F.layer_norm: affine(F.layer_norm, by_channel=False),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), affine(F.rms_norm, by_channel=False)),
    **{function: affine(function) for function in (F.group_norm, F.batch_norm, F.instance_norm)},
}
