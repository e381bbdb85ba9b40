"""On a cluster: every key once, the bits of threads, and whatever dies, leaves or grows too large is made good."""

import asyncio
import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import numpy as np
import pytest
import torch
from distributed import Client, Future, Worker
from jobs import Numbers, Pause
from small import chunks, compute, inputs, mlp
from torch import nn

from ntkpipe import verify
from ntkpipe.base.config import RunSpec
from ntkpipe.base.errors import (
    ClusterError,
    ConfigError,
    Interrupted,
    ModelError,
    ResourceError,
    StoreError,
    StoreFullError,
)
from ntkpipe.executors import connect as cluster
from ntkpipe.executors.dask import ClusterExecutor, JobPlugin
from ntkpipe.executors.payload import PLUGIN_PREFIX, pack_code

MIB = 2**20


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two workers of 768 MiB; a task that met two deaths is given back to us."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        cluster.connect("local", RunSpec(workers=2, memory_limit=1536 * MIB)) as joined,
    ):
        yield joined


def run(client: Client, job: Numbers, num_keys: int = 12, **options: int) -> Counter[int]:
    executor: ClusterExecutor[int, int] = ClusterExecutor(client, name="numbers", **options)
    return Counter(executor.run(job, range(1, num_keys + 1)))


def every(num_keys: int = 12) -> Counter[int]:
    return Counter({sign * key: 1 for key in range(1, num_keys + 1) for sign in (1, -1)})


def first_time(folder: Path, name: object) -> bool:
    """Whether this is the first call with these arguments, in whatever process."""
    try:
        (folder / str(name)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def test_every_key_is_done_once_and_every_record_arrives(client):
    assert run(client, Numbers(), 60) == every(60)


def test_a_store_has_the_bits_of_one_that_threads_computed(client, tmp_path):
    for kind in ("pntk", "ntk"):
        here = compute(tmp_path / f"{kind}-threads.zarr", kind=kind)
        there = compute(tmp_path / f"{kind}-cluster.zarr", kind=kind, client=client)
        assert there.manifest.choices == here.manifest.choices
        assert chunks(there.path) == chunks(here.path)
        assert verify(there, mlp(), progress=False).is_good


def test_what_a_killed_driver_left_on_the_cluster_is_removed(client):
    program = (
        "import os, sys; from distributed import Client; from ntkpipe.executors.dask import ClusterExecutor\n"
        "sys.path.insert(0, sys.argv[2]); from jobs import Numbers\n"
        "run = ClusterExecutor(Client(sys.argv[1]), name='killed').run(Numbers(), range(1, 9)); next(run); os._exit(1)"
    )
    command = [sys.executable, "-c", program, client.scheduler.address, str(Path(__file__).parents[1] / "helpers")]
    subprocess.run(command, check=False)
    plugins = partial(client.run_on_scheduler, lambda dask_scheduler: list(dask_scheduler.worker_plugins))
    assert any(name.startswith("ntkpipe-") for name in plugins())
    assert len(list(ClusterExecutor(client, name="numbers").run(Numbers(), range(1, 9)))) == 16
    assert not any(name.startswith("ntkpipe-") for name in plugins())


def test_nothing_is_left_on_the_cluster(client):
    def num_plugins(dask_worker: Worker) -> int:
        return sum(name.startswith(PLUGIN_PREFIX) for name in dask_worker.plugins)

    run(client, Numbers())
    assert set(client.run(num_plugins).values()) == {0}
    assert not client.futures


def test_the_client_and_the_workers_keep_nothing_of_a_run(client, tmp_path):
    from ntkpipe.build.tiles import BuildJob

    def num_jobs() -> int:
        return sum(type(each) is BuildJob for each in gc.get_objects())

    compute(tmp_path / "k.zarr", client=client)
    assert set(client.run(num_jobs).values()) == {0}
    gc.collect()
    assert num_jobs() == 0
    assert not any(type(each) is JobPlugin for each in gc.get_objects())


def test_a_worker_that_dies_while_the_job_is_delivered_loses_nothing(client, tmp_path, monkeypatch):
    def dies(plugin: JobPlugin, worker: Worker) -> None:
        if first_time(tmp_path, "died"):
            os.kill(os.getpid(), signal.SIGKILL)
        JobPlugin.setup(plugin, worker)

    monkeypatch.setattr(
        "ntkpipe.executors.dask.JobPlugin", type("Dying", (JobPlugin,), {"setup": dies, "__module__": "__main__"})
    )
    assert run(client, Numbers()) == every()
    assert list(tmp_path.iterdir())


def test_the_error_of_a_worker_reaches_the_caller_and_stops_the_others(client):
    def act(job: Numbers, key: int, pause: Pause) -> None:
        if key == 3:
            raise StoreFullError("the disk is full")
        while key > 3:
            pause()

    with pytest.raises(StoreFullError, match="the disk is full"):
        run(client, Numbers(act))
    assert run(client, Numbers()) == every()  # workers are free again


def test_a_worker_that_is_killed_loses_nothing(client, tmp_path):
    def act(job: Numbers, key: int, pause: Pause) -> None:
        if key in {2, 7} and first_time(tmp_path, key):
            os.kill(os.getpid(), signal.SIGKILL)

    assert run(client, Numbers(act)) == every()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_key_that_kills_its_workers_again_and_again_ends_the_run(client):
    def act(job: Numbers, key: int, pause: Pause) -> None:
        if key == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)

    with pytest.raises(
        ClusterError, match="block 1 failed 1 times while no other block was finished: its workers died"
    ):
        run(client, Numbers(act), 1, max_failures=1)


def test_deaths_are_forgiven_while_other_keys_are_finished(client, tmp_path):
    """A key is given back after two deaths; one such failure is allowed, then another key must be finished."""

    def act(job: Numbers, key: int, pause: Pause) -> None:
        if key == 1 and (first_time(tmp_path, "a") or first_time(tmp_path, "b") or first_time(tmp_path, "c")):
            os.kill(os.getpid(), signal.SIGKILL)

    assert run(client, Numbers(act), 4, max_failures=2) == every(4)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_store_that_is_out_of_reach_for_a_moment_is_tried_again(client, tmp_path, monkeypatch):
    monkeypatch.setattr("ntkpipe.executors.dask._BACKOFF_SECONDS", 0.01)

    def act(job: Numbers, key: int, pause: Pause) -> None:
        if key == 5 and (first_time(tmp_path, "a") or first_time(tmp_path, "b")):
            raise StoreError("the network disk does not answer")

    assert run(client, Numbers(act)) == every()
    with pytest.raises(ClusterError, match=r"block \d+ failed 3 times .*: gone for good"):
        run(client, Numbers(gone_for_good), max_failures=3)


def gone_for_good(job: Numbers, key: int, pause: Pause) -> None:
    raise StoreError("gone for good")


def greedy(job: Numbers, key: int, pause: Pause) -> None:
    """Takes more memory than a worker has, until the job has shrunk."""
    taken = []
    while job.size == 64:
        taken.append(np.ones(64 * MIB, np.uint8))
        pause()
        time.sleep(0.05 * (len(taken) > 10))


def test_a_worker_that_is_killed_for_its_memory_makes_the_work_smaller(client):
    with pytest.warns(UserWarning, match="killed for exceeding its memory"):
        assert run(client, Numbers(greedy), 3) == every(3)


class Large:
    """Stands for memory."""


def fail_with(taken: weakref.WeakSet[Large], job: Numbers, key: int, pause: Pause) -> None:
    large = Large()
    taken.add(large)
    raise StoreError("it fails")


def test_an_error_keeps_no_memory_of_the_work_that_failed(tmp_path):
    """A worker that is paused for its memory, and whose key is given up, would stay paused."""
    taken: weakref.WeakSet[Large] = weakref.WeakSet()
    place = {"address": "here", "local_directory": str(tmp_path)}
    worker = SimpleNamespace(**place, get_current_task=lambda: "key", log_event=lambda *_: None)
    plugin = JobPlugin(b"", None, owner="me")
    plugin.setup(worker)
    plugin._job = Numbers(partial(fail_with, taken))
    with pytest.raises(StoreError, match="it fails") as failure:
        plugin.run(worker, 1, 0)
    assert failure.value.__traceback__ is not None
    assert not taken


def test_memory_that_never_suffices_ends_the_run(client, monkeypatch):
    monkeypatch.setattr("ntkpipe.executors.dask._MOST_SHRINKING", 0)
    with pytest.raises(ResourceError, match="killed for their memory again and again"):
        run(client, Numbers(greedy), 2)


class Greedy(nn.Module):
    """Takes 28 MiB a sample, which no plan can see, since torch does not allocate it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        taken = np.ones(28 * MIB * len(x), np.uint8)
        time.sleep(0.4 * (len(x) > 10))  # a nanny looks every 0.1 s
        return self.inner(x) * float(taken[0])


def test_a_greedy_model_gets_smaller_batches_and_the_same_kernel_to_rounding(client, tmp_path):
    options = {"model": Greedy(), "inputs": inputs(20), "targets": None, "test_inputs": None, "tile": 20}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = compute(tmp_path / "greedy.zarr", client=client, **options)
    found = " ".join(str(warning.message) for warning in caught)
    assert "killed for exceeding its memory" in found
    assert "agrees with an undisturbed run to rounding" in found
    expected = compute(tmp_path / "modest.zarr", **{**options, "model": mlp()}).train[:]
    assert np.abs(store.train[:] - expected).max() <= 1e-6 * expected.diagonal().max()
    (run,) = store.store.read_results("runs")
    assert run["batch"] == store.manifest.choices.batch
    assert run["batch_used"] < run["batch"]


def interrupt_once(is_time: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not is_time() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


def test_results_do_not_wait_for_each_other(client, monkeypatch):
    fetch, together = Future._result, asyncio.Barrier(2)

    async def result(future: Any, *args: Any) -> Any:
        await asyncio.wait_for(together.wait(), timeout=60)
        return await fetch(future, *args)

    monkeypatch.setattr(Future, "_result", result)
    executor: ClusterExecutor[int, int] = ClusterExecutor(client, name="numbers")
    assert len(list(executor.run(Numbers(), range(1, 9)))) == 16


def test_workers_leave_work_that_nobody_waits_for(client, tmp_path):
    def act(job: Numbers, key: int, pause: Pause) -> None:
        (tmp_path / f"{key}.begun").touch()
        try:
            while True:
                time.sleep(0.01)
                pause()
        finally:
            (tmp_path / f"{key}.left").touch()

    executor: ClusterExecutor[int, int] = ClusterExecutor(client, name="numbers")
    threading.Thread(target=interrupt_once, args=(lambda: list(tmp_path.glob("*.begun")),)).start()
    with pytest.raises(Interrupted), closing(executor.run(Numbers(act), count(1))) as records:
        list(records)
    deadline = time.monotonic() + 10
    while len(list(tmp_path.glob("*.left"))) < len(list(tmp_path.glob("*.begun"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_may_join_and_leave(client, tmp_path):
    def act(job: Numbers, key: int, pause: Pause) -> None:
        (tmp_path / f"{os.getpid()}").touch()
        for _ in range(5):
            time.sleep(0.01)
            pause()

    def change() -> None:
        client.cluster.scale(3)
        client.wait_for_workers(3, timeout=60)
        client.retire_workers(list(client.nthreads())[:1])

    changing = threading.Thread(target=change)
    changing.start()
    executor: ClusterExecutor[int, int] = ClusterExecutor(client, name="numbers")
    keys = takewhile(lambda key: changing.is_alive() or len(list(tmp_path.iterdir())) < 3, count(1))
    try:
        found = Counter(executor.run(Numbers(act), keys))
    finally:
        changing.join()
        client.cluster.scale(2)
    assert found == every(max(found))


class TestWhatReachesTheWorkers:
    def write(self, folder: Path, sign: int) -> None:
        """A module of one name and another content."""
        folder.mkdir()
        (folder / "parts").mkdir()
        (folder / "parts" / "__init__.py").write_text(f"SIGN = {sign}\n")
        (folder / "numbers_of_mine.py").write_text(
            "from parts import SIGN\n\ndef act(job, key, pause):\n    assert SIGN == job.size, SIGN\n"
        )
        (folder / "data.bin").write_bytes(b"x" * 100)

    def job(self, folder: Path, size: int) -> Numbers:
        from ntkpipe.base.imports import import_object

        return Numbers(import_object("numbers_of_mine:act", folder), size)

    def test_a_folder_of_modules_is_sent_along_and_each_run_sees_its_own(self, client, tmp_path):
        for sign in (1, -1, 2):
            folder = tmp_path / str(sign)
            self.write(folder, sign)
            executor: ClusterExecutor[int, int] = ClusterExecutor(client, name="numbers", code=pack_code(folder))
            assert Counter(executor.run(self.job(folder, sign), range(1, 5))) == every(4)

    def test_without_it_the_error_says_what_to_do(self, client, tmp_path):
        self.write(tmp_path / "a", 1)
        with pytest.raises(ClusterError, match=r"cannot load the model: ModuleNotFoundError.*workflow's folder"):
            run(client, self.job(tmp_path / "a", 1))

    def test_what_cannot_be_pickled_is_refused_here(self, client):
        lock = threading.Lock()
        with pytest.raises(ModelError, match=r"cannot be sent to workers .*cannot pickle"):
            run(client, Numbers(lambda job, key, pause: lock.acquire()))

    def test_data_and_stores_stay_at_home(self, tmp_path):
        self.write(tmp_path / "a", 1)
        (tmp_path / "a" / "run.zarr").mkdir()
        (tmp_path / "a" / "run.zarr" / "zarr.json").write_text("{}")
        (tmp_path / "a" / ".git").mkdir()
        names = {False: set(), True: set()}
        for everything, found in names.items():
            archive = zipfile.ZipFile(io.BytesIO(pack_code(tmp_path / "a", everything=everything)))
            found.update(archive.namelist())
        assert names[False] == {"numbers_of_mine.py", "parts/__init__.py"}
        assert names[True] == names[False] | {"data.bin"}
        with pytest.raises(ClusterError, match=r"0 MiB of files .* the largest is .*data.bin"):
            pack_code(tmp_path / "a", everything=True, most_bytes=120)

    def test_a_folder_may_be_old_and_have_links_and_environments(self, tmp_path):
        folder = tmp_path / "a"
        self.write(folder, 1)
        os.utime(folder / "numbers_of_mine.py", (0, 0))
        (folder / "loop").symlink_to(folder)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "more.py").touch()
        (folder / "linked").symlink_to(tmp_path / "elsewhere")
        (folder / "venv").mkdir()
        (folder / "venv" / "pyvenv.cfg").touch()
        (folder / "venv" / "site.py").touch()
        with zipfile.ZipFile(io.BytesIO(pack_code(folder))) as archive:
            assert set(archive.namelist()) == {"numbers_of_mine.py", "parts/__init__.py", "linked/more.py"}

    def test_what_is_no_folder_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="is not a folder"):
            pack_code(tmp_path / "nothing")
