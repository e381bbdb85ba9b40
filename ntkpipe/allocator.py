"""Memory that was freed: whether the C library keeps it for the next use or gives it back to the system."""

import contextlib
import ctypes
import os

# Dask's nannies set it low, for workers of many small objects. It also has the C library map every larger block anew,
# so that each tensor of a forward pass is paid for in page faults, which took half as long again as the pass itself.
_SET_BY_NANNY = "MALLOC_TRIM_THRESHOLD_"

# mallopt(3)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 128 * 2**20
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_SMALLEST_MMAP_THRESHOLD = 128 * 2**10


def keep_freed_memory() -> None:
    """Have this process of a cluster keep up to 128 MiB that it frees; no other process is changed."""
    if _SET_BY_NANNY in os.environ:
        _set(_KEPT_BYTES, _LARGEST_MMAP_THRESHOLD)


def return_freed_memory() -> None:
    """Undo :func:`keep_freed_memory`, and give back what was kept."""
    if _SET_BY_NANNY in os.environ and _set(int(os.environ[_SET_BY_NANNY]), _SMALLEST_MMAP_THRESHOLD):
        ctypes.CDLL(None).malloc_trim(0)


def _set(trim: int, mmap: int) -> bool:
    """Set both thresholds; false where the C library is not glibc and has none."""
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_TRIM_THRESHOLD, trim) and mallopt(_MMAP_THRESHOLD, mmap))
    return False
