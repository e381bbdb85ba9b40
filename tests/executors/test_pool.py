"""A pool answers, loses and forgets: who dies is left out or missed, errors say where, and what is dropped is left."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
from distributed import Client, get_worker
from distributed.comm.core import CommClosedError

from ntkpipe.base.config import RunSpec
from ntkpipe.base.errors import ClusterError, ResourceError, TileError
from ntkpipe.executors.connect import connect
from ntkpipe.executors.pool import WorkerPool, differing, is_cancelled

GIB = 2**30


@pytest.fixture
def client() -> Iterator[Client]:
    options = {"dashboard_address": "127.0.0.1:0", "set_as_default": False}
    with Client(n_workers=2, threads_per_worker=1, processes=False, **options) as joined:
        yield joined


def fail(error: Exception) -> None:
    raise error


def die_in(process: int) -> int:
    """Called in every worker."""
    if os.getpid() == process:
        os.kill(process, signal.SIGKILL)
    return os.getpid()


def wait_in(folder: Path) -> None:
    """A task that ends when nobody waits for it."""
    worker = get_worker()
    task = worker.get_current_task()
    (folder / "begun").touch()
    while not is_cancelled(worker, task):
        time.sleep(0.01)
    (folder / "left").touch()


def wait_for(path: Path, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_that_dies_is_left_out_and_its_own_task_is_lost(tmp_path):
    settings = {"distributed.comm.timeouts.connect": "3 s"}  # the scheduler tries the dead one for so long
    with dask.config.set(settings), connect("local", RunSpec(workers=2, memory_limit=2 * GIB)) as client:
        (doomed, process), (address, other) = client.run(os.getpid).items()
        pool: WorkerPool[str] = WorkerPool(client)
        pool.submit("wait", "lost", wait_in, tmp_path, address=doomed)
        pool.submit("die", "done", abs, -3, address=address)
        wait_for(tmp_path / "begun")
        found = {each: report.found for each, report in pool.ask(die_in, process).items()}
        assert found.items() <= {address: other, **client.run(os.getpid)}.items()
        ended = dict(pool)
        assert ended["done"] == 3
        assert isinstance(ended["lost"], CommClosedError)
        assert not pool


def test_results_come_as_tasks_end_also_of_those_that_are_added_meanwhile(client):
    pool: WorkerPool[int] = WorkerPool(client)
    for number in range(3):
        pool.submit("numbers", number, abs, -number)
    found = {}
    for number, result in pool:
        found[number] = result
        if number < 3:
            pool.submit("numbers", number + 3, abs, -number)
    assert found == {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2}


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ModuleNotFoundError("No module named 'torch'"), ClusterError, "inproc.*torch.*Install ntkpipe"),
        (ArithmeticError("three"), ClusterError, r"the worker inproc\S* fails: ArithmeticError\('three'\)$"),
        (MemoryError("full"), ResourceError, r"inproc.*no memory left \(full\)"),
        (TileError("damaged"), TileError, "^damaged$"),
    ],
)
def test_the_error_of_a_task_for_one_worker_names_it(client, error, kind, words):
    pool: WorkerPool[None] = WorkerPool(client)
    pool.submit("fails", None, fail, error, address=next(iter(client.nthreads())))
    with pytest.raises(kind, match=words):
        list(pool)
    pool.submit("fails", None, fail, error)
    with pytest.raises(ClusterError if isinstance(error, ModuleNotFoundError) else type(error)):
        list(pool)
    tolerant: WorkerPool[str] = WorkerPool(client, (type(error),))
    tolerant.submit("fails", "it", fail, error)
    ((task, found),) = tolerant
    assert (task, type(found)) == ("it", type(error))
    assert not client.futures


def test_a_question_that_fails_says_where_and_how_often(client):
    with pytest.raises(ClusterError, match=r"2 of 2 workers on \S+ fail, the first at inproc.*TileError\('gone'\)"):
        WorkerPool(client).ask(fail, TileError("gone"))
    with pytest.raises(
        ClusterError, match=r"2 workers do not reach the store: inproc\S* on \S+: no; inproc.* same path"
    ):
        WorkerPool(client).require_shared("the store", str, "no")
    (one,) = WorkerPool(client).require_shared("the store", str, "", workers=list(client.nthreads())[:1]).values()
    assert (one.threads, one.found) == (1, "")


def test_workers_leave_what_is_dropped(client, tmp_path):
    pool: WorkerPool[str] = WorkerPool(client)
    pool.submit("wait", "one", wait_in, tmp_path)
    wait_for(tmp_path / "begun")
    assert pool.drop() == ["one"]
    assert not pool
    wait_for(tmp_path / "left")
    assert pool.next() is None


def test_a_pool_wakes(client):
    pool: WorkerPool[None] = WorkerPool(client)
    pool.wake()
    before = time.monotonic()
    assert pool.next() is None
    assert time.monotonic() < before + 0.5


def test_tasks_of_a_client_that_is_closed_are_lost_and_nobody_waits_for_it(client, tmp_path):
    with Client(client.scheduler.address, set_as_default=False) as other:
        pool: WorkerPool[str] = WorkerPool(other)
        pool.submit("wait", "one", wait_in, tmp_path)
        wait_for(tmp_path / "begun")
    ((task, found),) = pool
    assert task == "one"
    assert isinstance(found, BaseException)
    with pytest.raises(ClusterError, match="the cluster is lost"):
        pool.seen(False)
    wait_for(tmp_path / "left")


def test_what_differs_is_listed_by_value():
    assert differing([("a", "1"), ("b", "1")]) == ""
    assert differing([("b", "1"), ("a", "1"), ("c", "2")]) == "1 on a, b; 2 on c"
