"""How memory of a CPU comes from the system: pages that a run has freed stay with it, as each new one takes 2 µs."""

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_MIB = 2**20
# Parameters of glibc's mallopt: from how many free bytes on memory is returned to the system, how many of them are kept
# then, and from how many bytes on a block is mapped by itself, to be returned when it is freed (32 MiB at most).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT = {_MMAP_THRESHOLD: 32 * _MIB, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * _MIB}
# Where glibc ends up by itself once a block of 32 MiB was freed; what it began with, it does not tell.
_USUAL = {_MMAP_THRESHOLD: 32 * _MIB, _TRIM_THRESHOLD: 64 * _MIB, _TOP_PAD: 128 * 2**10}


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory for the next batch, and return it on leaving; for the whole process, if malloc is glibc's."""
    # Threads allocate from heaps of 64 MiB, each of which glibc unmaps as soon as it is empty: after every batch.
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return

    def set_to(values: Mapping[int, int]) -> None:
        for parameter, value in values.items():
            libc.mallopt(parameter, value)

    set_to(_KEPT)
    try:
        yield
    finally:
        set_to(_USUAL)
        libc.malloc_trim(0)
