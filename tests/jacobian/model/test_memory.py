"""A run keeps the memory that it frees, and returns it before memory is measured against a limit."""

import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch

from ntkpipe.base.config import RunSpec
from ntkpipe.build import prepare

_IS_GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")
pytestmark = pytest.mark.skipif(not _IS_GLIBC, reason="another malloc")
_MIB = 2**20

# In a process of its own, which malloc's settings outlive. Batches are those of a worker: in a thread, each in pieces.
_SCRIPT = """
import json, resource, sys, threading
import torch
from ntkpipe.base.resources import process_memory
from ntkpipe.build.prepare import exact_single_thread, this_machine
from ntkpipe.jacobian.model.memory import return_freed_memory

size, faults = int(sys.argv[1]), []

def work():
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        held = [torch.ones(2**20) for _ in range(size // 2**22)]
        del held
        faults.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

with exact_single_thread():
    start = process_memory()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    kept = process_memory() - start
return_freed_memory()
print(json.dumps({"faults": faults, "kept": kept, "left": process_memory() - start}))
"""


def measured(num_bytes: int, **environment: str) -> dict:
    # Dask sets MALLOC_TRIM_THRESHOLD_ in a process that starts workers.
    settings = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))} | environment
    command = [sys.executable, "-c", _SCRIPT, str(num_bytes)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)


@pytest.mark.parametrize("num_bytes", [100 * _MIB, 400 * _MIB])
def test_later_batches_take_no_new_pages_and_the_memory_can_be_returned(num_bytes):
    found = measured(num_bytes)
    assert max(found["faults"][-3:]) < num_bytes // 4096 / 20, found
    assert found["kept"] > num_bytes / 2 > num_bytes / 10 > found["left"], found


def test_who_has_set_malloc_himself_keeps_his_settings():
    found = measured(400 * _MIB, MALLOC_TRIM_THRESHOLD_="65536")
    assert found["kept"] < 40 * _MIB, found


class StopError(Exception):
    pass


def test_memory_is_returned_before_a_limit_is_applied(monkeypatch):
    def stop() -> None:
        raise StopError

    monkeypatch.setattr(prepare, "return_freed_memory", stop)
    with pytest.raises(StopError):
        prepare.this_machine(torch.device("cpu"), 1.0, RunSpec(memory_limit=2**30))
