"""Memory that a run frees is used again without page faults, and goes back to the system at its end."""

import ctypes
import sys
from threading import Thread

import pytest
import torch

from ntkpipe.base.resources import process_memory
from ntkpipe.jacobian.model.device import exact_math
from ntkpipe.jacobian.model.memory import kept_memory

resource = pytest.importorskip("resource")
_IS_GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")
pytestmark = pytest.mark.skipif(not _IS_GLIBC, reason="another malloc")
_MIB = 2**20


def use_memory(num_bytes: int) -> None:
    tensors = [torch.ones(4 * _MIB // 4) for _ in range(num_bytes // (4 * _MIB))]
    del tensors


def faults_of_batches(count: int, num_bytes: int) -> list[int]:
    """Page faults of each of some equal batches, in a thread of its own, as a worker is."""
    found = []

    def work() -> None:
        for _ in range(count):
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            use_memory(num_bytes)
            found.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    return found


def test_the_memory_is_returned_at_the_end():
    with kept_memory():  # what earlier tests left goes back
        use_memory(4 * _MIB)
    with kept_memory():
        before = process_memory()
        faults_of_batches(2, 300 * _MIB)
        kept = process_memory() - before
    left = process_memory() - before
    assert kept > 200 * _MIB
    assert left < 100 * _MIB


def test_memory_is_kept_until_the_last_context_is_left():
    num_bytes = 200 * _MIB
    with exact_math():
        with exact_math():
            pass
        found = faults_of_batches(8, num_bytes)
    assert max(found[-2:]) < num_bytes // 4096 / 20, found
