"""Before a run on a cluster every worker says what it is, and proves that it reaches the store."""

import asyncio
import socket
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client
from small import compute, inputs, mlp

from ntkpipe import plan_kernel
from ntkpipe.base.errors import ClusterError
from ntkpipe.build import workers
from ntkpipe.build.plan import SHARE_OF_LIMIT
from ntkpipe.build.workers import WorkerFacts, inspect_workers, require_shared_medium
from ntkpipe.executors import preflight
from ntkpipe.executors.pool import Report
from ntkpipe.store.media.folder import Folder

GIB = 2**30
FACTS = WorkerFacts(workers.versions(), device="cpu", arithmetic="AVX2, torch 2.13", flops_per_second=60e9)
USUAL = Report(
    host="one",
    version=version("ntkpipe"),
    threads=1,
    memory_limit=4 * GIB,
    base_memory=GIB // 2,
    available_memory=9 * GIB,
    folder=Path("scratch"),
    scratch_bytes=GIB,
    found=FACTS,
)


class Answers:
    """A client whose workers give prepared answers."""

    def __init__(self, *reports: object) -> None:
        self.reports = {f"tcp://worker-{number}:1": report for number, report in enumerate(reports)}
        self.asked = self.reports or {"tcp://worker-0:1": None}

    def scheduler_info(self, n_workers: int) -> dict[str, object]:
        return {"workers": {address: {"status": "running"} for address in self.asked}}

    def sync(self, function: Callable[..., Any], *arguments: object, **options: object) -> Any:
        return asyncio.run(function(*arguments, **options))

    async def run(self, question: object, *arguments: object, **options: object) -> dict[str, object]:
        return dict.fromkeys(self.asked, "host") if question is socket.gethostname else self.reports


@pytest.fixture(autouse=True)
def ready(monkeypatch):
    """Prepared answers come from no cluster."""
    require = preflight.require_workers
    monkeypatch.setattr(preflight, "_RESTART_SECONDS", 0)
    monkeypatch.setattr(preflight, "require_workers", lambda c: set(c.asked) if isinstance(c, Answers) else require(c))


def inspect(*reports: object):
    return inspect_workers(Answers(*reports), torch.float32)


def other(host: str, *, facts: dict[str, object] = {}, **changes: object) -> Report[WorkerFacts]:  # noqa: B006
    return replace(USUAL, host=host, found=replace(FACTS, **facts), **changes)


def test_a_plan_is_made_for_the_weakest_of_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = inspect(USUAL, other("two", memory_limit=2 * GIB, base_memory=GIB, facts={"flops_per_second": 40e9}))
    assert (found.processes, found.workers, found.device) == (2, 1, "cpu")
    assert found.memory_limit == int(SHARE_OF_LIMIT * 2 * GIB)
    assert found.is_remote
    assert found.base_memory == GIB
    assert found.flops_per_second == 50e9


def test_files_of_workers_are_planned_for_the_fullest_disk_and_each_folder():
    reports = [USUAL, replace(USUAL, scratch_bytes=GIB // 2), replace(USUAL, folder=Path("other")), other("two")]
    assert [inspect(*reports[:count]).num_scratch for count in (1, 2, 3, 4)] == [1, 1, 2, 3]
    assert inspect(*reports).scratch_bytes == GIB // 2


def test_what_differs_is_said_with_the_names_of_hosts():
    versions = {**FACTS.versions, "torch": "2.9.0"}
    with pytest.warns(UserWarning, match=r"versions of torch differ: .* on one, .*this process\); 2\.9\.0 on two"):
        inspect(USUAL, other("two", facts={"versions": versions}))
    with pytest.warns(UserWarning, match=r"compute differently: AVX2.* on one; AVX512.* on three, two; tiles agree"):
        inspect(USUAL, *(other(host, facts={"arithmetic": "AVX512"}) for host in ("two", "three")))


@pytest.mark.parametrize(
    ("reports", "words"),
    [
        ([], r"1 of 1 workers died while .* tcp://worker-0:1 among them"),
        ([other("two", facts={"device": "cuda:0"}, threads=2)], "several threads; a GPU has one worker"),
        ([USUAL, other("two", facts={"device": "cuda:0"})], "different devices: cpu on one; cuda:0 on two"),
        ([other("two", version="0.0.1")], r"versions of ntkpipe differ: .*0\.0\.1 on two"),
        (
            [USUAL, ModuleNotFoundError("No module named 'torch'")],
            r"1 of 2 workers on host fail.*worker-1.*Install ntkpipe",
        ),
    ],
)
def test_workers_that_cannot_work_together_are_refused(reports, words):
    with pytest.raises(ClusterError, match=words):
        inspect(*reports)


@pytest.fixture(scope="module")
def client():
    with Client(n_workers=2, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as threads:
        yield threads


def test_workers_are_asked_for_real(client):
    found = inspect_workers(client, torch.float32, "cpu")
    assert (found.processes, found.workers, found.device) == (2, 1, "cpu")
    assert found.flops_per_second > 1e8
    limits = {worker.memory_manager.memory_limit for worker in client.cluster.workers.values()}
    assert found.base_memory < found.memory_limit < min(limits)
    with pytest.raises(ClusterError, match="torch sees 0 CUDA devices"):
        inspect_workers(client, torch.float32, "cuda:7")


def test_a_plan_for_a_cluster_is_made_for_its_workers(client, tmp_path):
    options = {"store": tmp_path / "run.zarr", "tile": 4, "client": client, "progress": False}
    plan, _ = plan_kernel(mlp(), inputs(), **options)
    assert plan.machine.is_remote
    assert (plan.machine.processes, plan.sample_seconds) == (2, None)
    assert not (tmp_path / "run.zarr").exists()


def test_every_worker_writes_reads_and_deletes_in_the_store(client, tmp_path, monkeypatch):
    store = compute(tmp_path / "run.zarr").store
    before = sorted(tmp_path.rglob("*"))
    require_shared_medium(client, store.medium)
    assert sorted(tmp_path.rglob("*")) == before

    elsewhere = compute(tmp_path / "elsewhere.zarr").store
    monkeypatch.setattr(Folder, "__reduce__", lambda self: (Folder, (Path(elsewhere.root),)))
    with pytest.raises(
        ClusterError, match=r"2 workers do not reach the store .*cannot see what this run's driver wrote"
    ):
        require_shared_medium(client, store.medium)
    monkeypatch.undo()

    def refuse(self: Folder, name: str, *parts: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    put, calls = Folder.put, []

    def only_the_driver(self: Folder, name: str, *parts: bytes) -> None:
        calls.append(name)
        (put if len(calls) == 1 else refuse)(self, name, *parts)

    monkeypatch.setattr(Folder, "put", only_the_driver)
    with pytest.raises(ClusterError, match=r"process .* cannot write there: .*Permission denied.* same path on a disk"):
        require_shared_medium(client, store.medium)
    assert not list(Path(store.root).glob("*.partial"))
