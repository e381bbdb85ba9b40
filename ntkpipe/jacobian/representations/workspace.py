"""Scratch memory that is allocated once and reused, and copies that need none."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Workspace:
    """Scratch tensors by name, for one thread: fresh pages for each product cost more than the product."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def clear(self) -> None:
        """Free all scratch tensors."""
        self._tensors.clear()

    def take(self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor on the device of ``like``, in its dtype unless one is given; its content is undefined."""
        dtype = dtype or like.dtype
        size = torch.Size(shape).numel()
        key = name, dtype, like.device
        flat = self._tensors.get(key)
        if flat is None or flat.numel() < size:
            flat = self._tensors[key] = torch.empty(size, dtype=dtype, device=like.device)
        return flat[:size].view(shape)


def copy_merged(target: Tensor, values: Tensor) -> None:
    """Copy values whose axes, some of them merged, are those of the target, without a temporary copy."""
    target, values = target.squeeze(), values.squeeze()
    axis = values.ndim
    for number in reversed(range(target.ndim)):
        stop, size = axis, 1
        while size < target.shape[number]:
            axis -= 1
            size *= values.shape[axis]
        target = target.unflatten(number, values.shape[axis:stop])
    target.copy_(values)
