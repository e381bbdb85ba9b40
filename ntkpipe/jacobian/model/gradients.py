"""Gradients of outputs times covectors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Paired(torch.autograd.Function):
    """Outputs times covectors as one number, of which nothing but the gradient is needed."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, covectors: Tensor) -> Tensor:
        ctx.covectors = covectors
        return outputs.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.covectors.clone(memory_format=torch.contiguous_format), None  # hooks may change it in place


def autograd_vjp(outputs: Tensor, covectors: Tensor, sources: Sequence[Any], **options: Any) -> tuple[Any, ...]:
    """``torch.autograd.grad(outputs, sources, covectors)``."""
    # Which loads sympy to compare two shapes, a quarter of a second before the first tile; for a number it does not.
    paired: Any = _Paired.apply
    return torch.autograd.grad(paired(outputs, covectors), sources, **options)
