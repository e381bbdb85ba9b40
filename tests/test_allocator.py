"""Workers of a cluster keep the memory that they free, while they compute."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
from ntkpipe.allocator import keep_freed_memory, return_freed_memory
import numpy as np

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(2**20)  # 8 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
faults()
kept = faults()
return_freed_memory()
print(first, kept, faults())
"""


def count(environment: dict[str, str]) -> list[int]:
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="thresholds of glibc")
def test_memory_that_is_freed_is_used_again_where_a_nanny_would_have_it_returned():
    before, kept, after = count({"MALLOC_TRIM_THRESHOLD_": "65536"})
    assert kept < before / 50
    assert after > before / 2


@pytest.mark.skipif(sys.platform != "linux", reason="thresholds of glibc")
def test_a_process_of_no_nanny_is_left_as_it_is():
    source = "from unittest import mock; import ctypes\nwith mock.patch('ctypes.CDLL') as library:\n"
    source += "    from ntkpipe.allocator import *\n    keep_freed_memory(); return_freed_memory()\n"
    source += "assert not library.called"
    # A nanny that another test has started in this process leaves the variable behind.
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_TRIM_THRESHOLD_"}
    subprocess.run([sys.executable, "-c", source], env=environment, check=True)
