"""Memory, disk space and cores of this machine, read and never changed."""

import contextlib
import math
import os
import re
import resource
import sys
from pathlib import Path

import psutil

_BYTES = re.compile(r"\s*(\d+|\d*\.\d+)\s*(?:([kmgtpe])(i?))?b?\s*", flags=re.IGNORECASE)
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CGROUP_USAGE = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")
_LOCAL_DISKS = {"apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hfs", "overlay", "xfs", "zfs"}


def _first_number(paths: tuple[str, ...]) -> int | None:
    for path in paths:
        with contextlib.suppress(OSError):
            if (text := Path(path).read_text().strip()).isdigit():
                return int(text)
    return None


def available_memory() -> int:
    """Bytes of memory still available in the machine and the container (cgroup)."""
    available: int = psutil.virtual_memory().available
    limit, usage = _first_number(_CGROUP_LIMITS), _first_number(_CGROUP_USAGE)
    if limit is not None and usage is not None:
        # The cgroup counts reclaimable file cache as used, so assume at least a tenth of its limit.
        available = min(available, max(limit - usage, limit // 10))
    return available


def process_memory() -> int:
    """Resident memory of this process in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_process_memory() -> int:
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_disk(path: Path) -> int | None:
    """Free bytes on the disk of ``path``, which need not exist yet; None where its file system does not say."""
    absolute = path.absolute()
    existing = next(one for one in (absolute, *absolute.parents) if one.exists())
    usage = psutil.disk_usage(str(existing))
    return usage.free if usage.total else None


def local_disk_room(folder: Path) -> int:
    """Free bytes for files in a folder; zero if nothing can be written there, or memory or a network is behind it."""
    path = os.path.realpath(folder)
    mounts = [each for each in psutil.disk_partitions(all=True) if _is_below(path, each.mountpoint)]
    kind = max(mounts, key=lambda each: len(each.mountpoint)).fstype if mounts else ""
    if kind not in _LOCAL_DISKS or not os.access(path, os.W_OK | os.X_OK):
        return 0
    return free_disk(Path(path)) or 0


def _is_below(path: str, mountpoint: str) -> bool:
    return os.path.commonpath([path, mountpoint]) == mountpoint


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def format_bytes(num_bytes: float) -> str:
    """Format with a binary unit, as in ``16.0 MiB``."""
    for digits, unit in ((0, "B"), (1, "KiB"), (1, "MiB"), (1, "GiB")):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.{digits}f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def parse_bytes(text: str) -> float:
    """The number of bytes that text such as ``8GiB`` or ``1.5e9`` stands for, all of it; NaN if none."""
    if found := _BYTES.fullmatch(text):
        number, unit, is_binary = found.groups()
        power: int = " kmgtpe".index((unit or " ").lower())
        return float(number) * float(1024 if is_binary else 1000) ** power
    try:
        return float(text)
    except ValueError:
        return math.nan


def format_seconds(seconds: float) -> str:
    """Text of a duration in a readable unit."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def exceeded(limit: int, used: int) -> str:
    """What every refusal says where a process has more than its limit before it begins."""
    return (
        f"this process alone has {format_bytes(used)}, and memory_limit={format_bytes(limit)} counts all of it, Python "
        "and libraries included; give a larger memory_limit, or none for a share of what is free"
    )
