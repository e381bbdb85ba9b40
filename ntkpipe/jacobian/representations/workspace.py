"""Scratch memory that is allocated once and reused."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Workspace:
    """Scratch tensors by name, of one thread: fresh pages for each product cost more than the product."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def clear(self) -> None:
        """Give up what is allocated."""
        self._tensors.clear()

    def take(self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor on the device of ``like``, of its dtype unless one is given; its content is undefined."""
        dtype = dtype or like.dtype
        size = torch.Size(shape).numel()
        key = name, dtype, like.device
        flat = self._tensors.get(key)
        if flat is None or flat.numel() < size:
            flat = self._tensors[key] = torch.empty(size, dtype=dtype, device=like.device)
        return flat[:size].view(shape)
