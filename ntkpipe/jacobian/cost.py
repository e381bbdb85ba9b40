"""Costs of Jacobians and their contraction, which is all that a plan knows of a model."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ntkpipe.jacobian.tracing.recorder import tensors_in


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of Jacobians and their contraction."""

    block_bytes: int  # bytes held for each sample
    workspace_bytes: int  # bytes that computing one more sample of a batch allocates, at most
    fixed_workspace_bytes: int  # bytes that computing a batch allocates, whatever its size
    largest_bytes: int  # bytes of the largest tensor among those, for each sample
    jacobian_flops: float  # operations for each sample, forward and backward
    pair_flops: float  # operations to contract one pair of samples, for all pairs of covectors that are wanted


class Meter(TorchDispatchMode):
    """Counter of operations and of the bytes of all new tensors, an upper bound on the peak."""

    # Not torch's FlopCounterMode: its hooks on modules cannot be differentiated through with parametrizations.
    num_flops = 0.0
    num_bytes = 0
    largest_bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, for a second or more, to say that this is not to be compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(getattr(func, "_overloadpacket", func))
        if count is not None:
            self.num_flops += float(count(*args, **(kwargs or {}), out_val=result))
        # By storages, since functorch's tensors have no data.
        known = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for storage in (tensor.untyped_storage() for tensor in _tensors(result)):
            if storage._cdata not in known:
                size = storage.nbytes()
                self.num_bytes += size
                self.largest_bytes = max(self.largest_bytes, size)
        return result


class _Uncompiled(Meter):
    """The same where a compiler is at work."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    __torch_dispatch__ = Meter.__torch_dispatch__  # of its own, so that torch keeps the compiler from it


def make_meter() -> Meter:
    """A new meter."""
    return _Uncompiled() if "torch._dynamo" in sys.modules else Meter()  # type: ignore[no-untyped-call]


def _tensors(value: Any) -> Iterator[Tensor]:
    return (tensor for tensor in tensors_in(value) if tensor.layout == torch.strided)  # sparse ones have no storage
