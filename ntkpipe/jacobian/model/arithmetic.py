"""Settings of torch under which numbers are computed, independent of the user's."""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def exact_math(*, tf32: bool = False) -> Iterator[None]:
    """Do as :func:`exact_process`, with autocast off in this thread."""
    with exact_process(tf32=tf32), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextlib.contextmanager
def exact_process(*, tf32: bool = False, default_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Compute under settings of the whole process that do not depend on the user's, and restore those afterwards."""
    # float32 means float32 (no TF32 or bfloat16 inside products), cuDNN is deterministic, and attention takes its math
    # path, which has the forward-mode derivatives and batching rules that fused paths lack. Threads may enter and leave
    # in any order: the arguments of the one that came last apply, and the last to leave restores what the first found.
    mine = partial(_apply, tf32, default_dtype or torch.get_default_dtype())
    with _LOCK:
        if not _INSIDE:
            _UNDO.enter_context(_exact_settings())
        _INSIDE.append(mine)
        mine()
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE.remove(mine)
            if _INSIDE:
                _INSIDE[-1]()
            else:
                _UNDO.close()


def _apply(tf32: bool, default_dtype: torch.dtype) -> None:
    torch.set_default_dtype(default_dtype)
    for setting in _gpu_precisions():
        setting.fp32_precision = "tf32" if tf32 else "ieee"


_INSIDE: list[partial[None]] = []  # compared by identity: each belongs to one thread
_LOCK = threading.Lock()
_BACKENDS: Any = torch.backends
_UNDO = contextlib.ExitStack()


def _gpu_precisions() -> list[Any]:
    return [_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn]


@contextlib.contextmanager
def changed_settings(*settings: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes of objects, given as (object, attribute, value), and restore them afterwards."""
    with contextlib.ExitStack() as undo:
        for owner, name, value in settings:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


@contextlib.contextmanager
def _exact_settings() -> Iterator[None]:
    precisions = [_BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.rnn, *_gpu_precisions()]
    settings: list[tuple[Any, str, Any]] = [(precision, "fp32_precision", "ieee") for precision in precisions]
    settings += [(_BACKENDS.cudnn, "deterministic", True), (_BACKENDS.cudnn, "benchmark", False)]
    with contextlib.ExitStack() as undo, changed_settings(*settings), sdpa_kernel(SDPBackend.MATH):
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        undo.callback(_BACKENDS.mha.set_fastpath_enabled, _BACKENDS.mha.get_fastpath_enabled())
        _BACKENDS.mha.set_fastpath_enabled(False)
        yield
