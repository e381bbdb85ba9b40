"""Settings of torch under which numbers are computed, whatever the user's are."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def exact_math(*, tf32: bool = False) -> Iterator[None]:
    """Settings under which numbers are computed, whatever the user's are; restored afterwards.

    float32 means float32 (no TF32 or bfloat16 inside products), cuDNN is deterministic, autocast is off in this
    thread, and fused attention paths are off: their math path has the forward-mode derivatives and batching rules that
    they lack. All but autocast is of the whole process; see :func:`exact_process`.
    """
    with exact_process(tf32=tf32), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextlib.contextmanager
def exact_process(*, tf32: bool = False, default_dtype: torch.dtype | None = None) -> Iterator[None]:
    """The part of :func:`exact_math` that is of the whole process. It may be entered and left in any order by threads.

    What was set before the first one came is restored when the last one leaves. Of several the last that came, and is
    there still, says what its arguments are about.
    """
    mine = _Exact(tf32, default_dtype or torch.get_default_dtype())
    with _EXACT_LOCK:
        if not _EXACT:
            _UNDO_EXACT.enter_context(_exact_settings())
        _EXACT.append(mine)
        mine.apply()
    try:
        yield
    finally:
        with _EXACT_LOCK:
            _EXACT.remove(mine)
            if _EXACT:
                _EXACT[-1].apply()
            else:
                _UNDO_EXACT.close()


@dataclass(frozen=True, eq=False)
class _Exact:
    """Somebody in :func:`exact_process`."""

    tf32: bool
    default_dtype: torch.dtype

    def apply(self) -> None:
        """Set what it asks for."""
        torch.set_default_dtype(self.default_dtype)
        for setting in _gpu_precisions():
            setting.fp32_precision = "tf32" if self.tf32 else "ieee"


_EXACT: list[_Exact] = []
_EXACT_LOCK = threading.Lock()
_UNDO_EXACT = contextlib.ExitStack()


def _gpu_precisions() -> list[Any]:
    backends: Any = torch.backends
    return [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]


@contextlib.contextmanager
def _exact_settings() -> Iterator[None]:
    backends: Any = torch.backends
    on_cpu = [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    precisions = [*_gpu_precisions(), *on_cpu]
    before = [setting.fp32_precision for setting in precisions]
    cudnn = backends.cudnn.deterministic, backends.cudnn.benchmark
    fastpath, default_dtype = backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    try:
        for setting in on_cpu:
            setting.fp32_precision = "ieee"
        backends.cudnn.deterministic, backends.cudnn.benchmark = True, False
        backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for setting, value in zip(precisions, before, strict=True):
            setting.fp32_precision = value
        backends.cudnn.deterministic, backends.cudnn.benchmark = cudnn
        backends.mha.set_fastpath_enabled(fastpath)
        torch.set_default_dtype(default_dtype)
