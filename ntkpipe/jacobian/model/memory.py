"""How memory comes from the system: a run keeps what it frees, since each new page takes a microsecond or two."""

import ctypes
import os
import sys
from functools import cache
from typing import Any

_MIB = 2**20
# What glibc's mallopt is told. Threads allocate from one heap: theirs are in pieces of 64 MiB, each of which
# is unmapped whenever it is empty, after every batch. Blocks up to 32 MiB (its most) come from there, as they do anyway
# once one of that size was freed; and 512 MiB of freed memory are kept, not twice the largest block.
_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1
_KEPT = {_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: 32 * _MIB, _M_TRIM_THRESHOLD: 512 * _MIB}
# Who sets one of these knows better: Dask has its workers return what they free, as a full one stays paused.
_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@cache
def keep_freed_memory() -> None:
    """Have this process keep what it frees, from now on; nothing where malloc is not glibc's or the user has set it."""
    libc = _glibc()
    if libc is not None and not any(name in os.environ for name in _SETTINGS):
        for parameter, value in _KEPT.items():
            libc.mallopt(parameter, value)


def return_freed_memory() -> None:
    """Give back to the system what is kept, before memory is measured against a limit."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> Any:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if libc is not None and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
