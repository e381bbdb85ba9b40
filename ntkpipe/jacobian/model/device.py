"""What differs between devices, and settings of torch under which numbers are computed, independent of the user's.

Devices differ in how work is cut, how exhausted memory is recognised, and which sums are repeatable.
"""

import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint

from ntkpipe.base.errors import NtkpipeError
from ntkpipe.base.resources import peak_process_memory

# How failed allocations without an exception of their own are reported: by torch's CPU allocator, CUDA, cuBLAS, cuDNN.
_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
_MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """How work is cut on one type of device, by default a CPU, whose cores' caches hold a block."""

    piece_rows: int = 2560  # rows of the pieces in which strips are contracted
    piece_entry_bytes: int = 16  # scratch for each pair of rows of a piece: sums, on a GPU products of the same size
    scratch_bytes: int = 112 * _MIB  # other scratch: Jacobians that are multiplied out late, waiting gradients
    batch_bytes: int = 512 * _MIB  # all tensors of one forward and backward pass; larger batches gain nothing
    tensor_bytes: int = 24 * _MIB  # the largest of them: glibc returns those above 32 MiB to the system, which is slow
    smallest_block: int = 64  # edge of a block of products where a piece meets itself: small ones multiply slowly
    largest_block: int = 512  # the same at most: where a piece meets itself, large ones waste half
    position_rows: int = 128  # rows (samples * positions) of products over several positions
    position_bytes: int = 2**62  # bytes of such a product; on a CPU rows alone decide
    late_bytes: int = 24 * _MIB  # Jacobians that are multiplied out late, at a time
    gradient_bytes: int = 64 * _MIB  # gradients of several covectors that wait to be multiplied with the inputs at once
    unfolded_bytes: int = _MIB  # unfolded inputs of a few samples
    rate_size: int = 1024  # edge of the matrices by which the rate of products is measured
    entry_flops: float = 32.0  # operations of a product that usually take the time of one multiplied and added entry


# Not measured: chosen so that a product or a pass takes a good part of a millisecond, far more than its launch.
_GPU = Sizes(
    piece_rows=8192,
    piece_entry_bytes=32,
    scratch_bytes=1280 * _MIB,
    batch_bytes=4096 * _MIB,
    tensor_bytes=1024 * _MIB,
    smallest_block=1024,
    largest_block=8192,
    position_rows=8192,
    position_bytes=256 * _MIB,
    late_bytes=128 * _MIB,
    gradient_bytes=256 * _MIB,
    unfolded_bytes=64 * _MIB,
    rate_size=4096,
    entry_flops=256.0,
)
SIZES = {"cpu": Sizes(), "cuda": _GPU}


def sizes_of(device: torch.device | str) -> Sizes:
    """The sizes of a device, by its type; those of a GPU for any that is not a CPU."""
    return SIZES["cpu" if torch.device(device).type == "cpu" else "cuda"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be allocated, on the host or a GPU."""
    if isinstance(error, NtkpipeError):  # what is refused beforehand is not tried in halves
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def release_memory() -> None:
    """Free what a failed attempt left; call it outside the exception handler, whose exception keeps tensors alive."""
    gc.collect()  # frames of the attempt may be part of a cycle with the exception
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def count_gpus() -> int:
    """Number of GPUs that torch sees."""
    return torch.cuda.device_count()


def describe_arithmetic(device: torch.device) -> str:
    """What decides the last bits beside the manifest: the instruction set or the GPU, and the version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"{name}, torch {torch.__version__}"


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that can still be used: what is free, and what torch has reserved unused."""
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserved


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """The most bytes in use: on a GPU by tensors since entering, on a CPU by the process since its start."""
    if device.type == "cpu":
        yield peak_process_memory
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device)


def without_tf32(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Compute products of float32 in float32, also in a run whose model may use TF32; for the whole process."""
    on_gpu: Any = torch.backends.cuda.matmul
    return contextlib.nullcontext() if device.type == "cpu" else changed_settings((on_gpu, "fp32_precision", "ieee"))


def add_rows(target: Tensor, dim: int, index: Tensor, values: Tensor) -> Tensor:
    """Compute ``target.index_add_(dim, index, values)``; on a GPU the order of sums is the same in every run."""
    if target.device.type == "cpu":
        return target.index_add_(dim, index, values)
    # index_add_ adds with atomics there, in any order; index_put_ sorts first.
    moved = target.movedim(dim, 0)
    moved.index_put_((index,), values.movedim(dim, 0), accumulate=True)
    return target


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


class Alone(contextlib.AbstractContextManager[None]):
    """A context in which one thread of the process is at a time, for models whose threads would disturb each other."""

    # Without a state, so that it can be pickled.
    def __enter__(self) -> None:
        _ONE_AT_A_TIME.acquire()

    def __exit__(self, *_: object) -> None:
        _ONE_AT_A_TIME.release()


_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def watched_sharing(parameters: Iterable[Tensor]) -> Iterator[Callable[[], bool]]:
    """Tell whether what runs inside uses what threads share: forward mode, or gradients kept with parameters."""
    # Levels of forward mode belong to the process: what two threads compute at one ends with the first that leaves it.
    used: list[None] = []
    enter: Any = forward_ad.enter_dual_level

    def entering() -> int:
        used.append(None)
        return int(enter())

    with contextlib.ExitStack() as undo:
        undo.enter_context(Alone())
        undo.enter_context(changed_settings((forward_ad, "enter_dual_level", entering)))
        is_keeping = undo.enter_context(watched_gradients(parameters))
        yield lambda: bool(used) or is_keeping()


@contextlib.contextmanager
def watched_gradients(parameters: Iterable[Tensor]) -> Iterator[Callable[[], bool]]:
    """Tell whether what runs inside adds gradients to those that are kept with parameters."""
    used: list[None] = []
    with contextlib.ExitStack() as undo:
        for parameter in parameters:
            undo.callback(parameter.register_post_accumulate_grad_hook(lambda _: used.append(None)).remove)
        yield lambda: bool(used)


def _apply(tf32: bool, default_dtype: torch.dtype) -> None:
    torch.set_default_dtype(default_dtype)
    for setting in _gpu_precisions():
        setting.fp32_precision = "tf32" if tf32 else "ieee"


class _Unchecked:
    """In place of re-entrant checkpoints, through which ``autograd.grad`` gets no gradients of parameters: a call."""

    @staticmethod
    def apply(function: Callable[..., Any], preserves_random_state: bool, *arguments: Any) -> Any:
        return function(*arguments)


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
    settings += [(checkpoint, "CheckpointFunction", _Unchecked)]
    with contextlib.ExitStack() as undo, changed_settings(*settings), sdpa_kernel(SDPBackend.MATH):
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        undo.callback(_BACKENDS.mha.set_fastpath_enabled, _BACKENDS.mha.get_fastpath_enabled())
        _BACKENDS.mha.set_fastpath_enabled(False)
        if "torch._dynamo" in sys.modules:  # what torch.compile made would compile our recorder, and round as it likes
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def without_cudnn_rnns(module: nn.Module) -> None:
    """Run the RNNs of a module without cuDNN, whose backward pass exists in train mode only, and not under vmap."""
    # cuDNN has no switch for RNNs alone, and other layers should use it: it is off during the forward pass of an RNN,
    # which the backward pass follows. A copy of a module has its hooks already.
    for child in module.modules():
        if isinstance(child, nn.RNNBase) and not hasattr(child, "_ntkpipe_cudnn"):
            child._ntkpipe_cudnn = True
            child.register_forward_pre_hook(_switch_cudnn_off)
            child.register_forward_hook(_restore_cudnn, always_call=True)


def _switch_cudnn_off(module: nn.Module, args: Any) -> None:
    cudnn: Any = torch.backends.cudnn
    module._ntkpipe_cudnn, cudnn.enabled = cudnn.enabled, False


def _restore_cudnn(module: nn.Module, args: Any, output: Any) -> None:
    cudnn: Any = torch.backends.cudnn
    cudnn.enabled = module._ntkpipe_cudnn
