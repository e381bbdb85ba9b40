"""What this machine has: memory, disk, cores. Everything here only looks."""

import os
import resource
import sys
from pathlib import Path

import psutil

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CGROUP_USAGE = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def _first_number(paths: tuple[str, ...]) -> int | None:
    for path in paths:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return int(text)
    return None


def available_memory() -> int:
    """Bytes of memory that can still be used, by the machine's and the container's (cgroup) account."""
    available: int = psutil.virtual_memory().available
    limit, usage = _first_number(_CGROUP_LIMITS), _first_number(_CGROUP_USAGE)
    if limit is not None and usage is not None:
        # The cgroup counts file cache as used although it can be dropped; never trust it below a tenth of its limit.
        available = min(available, max(limit - usage, limit // 10))
    return available


def process_memory() -> int:
    """Bytes of resident memory of this process."""
    rss: int = psutil.Process().memory_info().rss
    return rss


def memory_room(memory_limit: int | None, share: float = 0.5) -> int:
    """Bytes that may be allocated where this process may have ``memory_limit``; by default this share of what is free.

    Negative if it has more already.
    """
    return int(share * available_memory()) if memory_limit is None else memory_limit - process_memory()


def half_of_room(memory_limit: int | None) -> int | None:
    """The limit for each of two who share what this process may still allocate; none stays none."""
    return None if memory_limit is None else memory_limit - memory_room(memory_limit) // 2


def peak_process_memory() -> int:
    """Bytes of resident memory that this process has had at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_disk(path: Path) -> int:
    """Bytes that can be written below ``path``, which need not exist yet."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return psutil.disk_usage(str(existing)).free


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def format_bytes(num_bytes: float) -> str:
    """``num_bytes`` with a binary unit, as in ``16.0 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(num_bytes) < 1024 or unit == "TiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError
