"""What a process has learnt of a model, kept for the next one that runs the same code on samples of the same shapes."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ntkpipe.jacobian.cost import Cost
from ntkpipe.jacobian.model.digest import digest
from ntkpipe.jacobian.model.picking import Batch
from ntkpipe.jacobian.tracing.trace import Tracing

_NUM_KEPT = 16
_LOG, _LOCK = logging.getLogger(__name__), threading.Lock()


@dataclass(frozen=True)
class Learnt:
    """What code and shapes decide of a model; nothing of the model itself is among it."""

    is_channels_last: bool  # whether its convolutions were changed to that
    tracing: Tracing
    costs: dict[Hashable, Cost] = field(default_factory=dict)  # by how Jacobians are found and held


_KEPT: OrderedDict[str | None, Learnt] = OrderedDict()


def recall(key: str | None) -> Learnt | None:
    """What is kept under a key; nothing where there is none."""
    with _LOCK:
        if key in _KEPT:
            _KEPT.move_to_end(key)
        return _KEPT.get(key)


def keep(key: str, learnt: Learnt) -> None:
    """Keep what was learnt, and forget what was asked for longest ago."""
    with _LOCK:
        _KEPT[key] = learnt
        _KEPT.move_to_end(key)
        while len(_KEPT) > _NUM_KEPT:
            _KEPT.popitem(last=False)


def forget() -> None:
    """Forget everything, as in a new process."""
    with _LOCK:
        _KEPT.clear()


def key_of(model: nn.Module, *others: Any, batch: Batch) -> str | None:
    """What decides the operations of a model on batches like this one, under the settings of this thread."""
    # All but the values of real parameters, of the running statistics of torch's own norms, and of real samples.
    norms = [each for each in model.modules() if type(each).__module__ == "torch.nn.modules.batchnorm"]
    statistics = [each for norm in norms for each in norm.buffers(recurse=False)]
    tensors: list[Tensor] = [*model.parameters(), *tree_leaves(batch)]
    try:
        free = [*(each for each in tensors if each.is_floating_point()), *statistics]
        return digest([model, *others, batch, *_settings()], free)
    except Exception as error:  # noqa: BLE001 - whatever it is: what has no key is looked at anew
        _LOG.debug("what is learnt of this model is not kept: %s", f"{type(error).__name__}: {error}")
        return None


def _settings() -> list[Any]:
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        raise RuntimeError("torch functions are watched from outside")
    on: Any = torch.backends
    hooks = [[*v.values()] for n, v in vars(nn.modules.module).items() if "_global" in n and isinstance(v, dict)]
    switches = [on.mkldnn.enabled, on.cudnn.enabled, on.cudnn.deterministic, on.opt_einsum.enabled]
    precisions = [each.fp32_precision for each in (on.mkldnn.matmul, on.mkldnn.conv, on.cuda.matmul, on.cudnn.conv)]
    kinds = [(torch.is_autocast_enabled(each), torch.get_autocast_dtype(each)) for each in ("cpu", "cuda")]
    modes = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()]
    repeatable = [torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()]
    sees = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    return [hooks, switches, precisions, kinds, modes, repeatable, sees, torch.get_default_dtype()]
