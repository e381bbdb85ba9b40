"""On a cluster: every key once, the bits of threads, and whatever dies, leaves or grows too large is made good."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from distributed import Client
from small import chunks, compute, mlp

from ntkpipe import cluster, verify
from ntkpipe.remote import ClusterExecutor


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with cluster.connect("local", workers=2, memory_limit=2 * 2**30) as joined:
        yield joined


@dataclass(frozen=True)
class Numbers:
    """Yields a key and its negative; ``act`` is called in the worker with (job, key, pause)."""

    act: Callable[["Numbers", int, Callable[[], None]], None] = lambda job, key, pause: None
    folder: str = ""
    size: int = 64

    def session(self):
        return nullcontext()

    def shrunk(self):
        return replace(self, size=self.size // 2)

    def open(self, pause):
        def do(key: int) -> Iterator[int]:
            yield key
            self.act(self, key, pause)
            yield -key

        return do


def once(folder: str, name: str) -> bool:
    """True the first time that it is called with these arguments, in whatever process."""
    try:
        Path(folder, name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def test_every_key_is_done_once_and_every_record_arrives(client):
    executor = ClusterExecutor(client, name="numbers")
    found = Counter(executor.run(Numbers(), range(1, 61)))
    assert found == {sign * key: 1 for key in range(1, 61) for sign in (1, -1)}


def test_a_store_has_the_bits_of_one_that_threads_computed(client, tmp_path):
    for kind in ("pntk", "ntk", "trace"):
        here = compute(tmp_path / f"{kind}-threads.zarr", kind=kind)
        there = compute(tmp_path / f"{kind}-cluster.zarr", kind=kind, client=client)
        assert there.manifest.choices == here.manifest.choices
        assert chunks(there.path) == chunks(here.path)
        assert verify(there, mlp()).is_good


def test_what_a_killed_driver_left_on_the_cluster_is_removed(client):
    program = (
        "import os, sys; from distributed import Client; from ntkpipe.remote import ClusterExecutor\n"
        "sys.path.insert(0, sys.argv[2]); from test_remote import Numbers\n"
        "run = ClusterExecutor(Client(sys.argv[1]), name='killed').run(Numbers(), range(1, 9)); next(run); os._exit(1)"
    )
    command = [sys.executable, "-c", program, client.scheduler.address, str(Path(__file__).parent)]
    subprocess.run(command, check=False)
    plugins = partial(client.run_on_scheduler, lambda dask_scheduler: list(dask_scheduler.worker_plugins))
    assert any(name.startswith("ntkpipe-") for name in plugins())
    assert len(list(ClusterExecutor(client, name="numbers").run(Numbers(), range(1, 9)))) == 16
    assert not any(name.startswith("ntkpipe-") for name in plugins())
