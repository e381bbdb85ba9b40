"""Clusters of this machine are reachable from it alone; addresses that are of no use say what to do."""

import asyncio
import os
import signal
import socket
import time
from collections import Counter

import dask
import pytest
from distributed import Client

from ntkpipe.base.config import RunSpec
from ntkpipe.base.errors import ClusterError, ConfigError
from ntkpipe.executors import connect as cluster
from ntkpipe.executors import preflight
from ntkpipe.executors.connect import connect


def environment() -> tuple[int, str | None]:
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2].partition("/")[0])


def test_a_local_cluster_has_single_threaded_processes_that_only_this_machine_reaches():
    with connect("local", RunSpec(workers=2, memory_limit=2 * 2**30)) as client:
        info = client.scheduler_info()
        assert client.nthreads() == dict.fromkeys(info["workers"], 1)
        assert {worker["memory_limit"] for worker in info["workers"].values()} == {2**30}
        assert len({process for process, _ in client.run(environment).values()} | {os.getpid()}) == 3
        ports = [port_of(address) for address in (info["address"], *info["workers"], client.dashboard_link)]
        outside = socket.gethostbyname(socket.gethostname())
        for port in ports if not outside.startswith("127.") else ():
            with socket.socket() as probe:
                assert probe.connect_ex((outside, port)) != 0
        scheduler = preflight.address_of(client)
    with pytest.raises(OSError, match=r"Timed out|timed out|refused"):
        Client(scheduler, timeout=0.5)


def test_a_worker_of_a_local_cluster_comes_back_however_often_it_dies():
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "50 ms"}),
        connect("local", RunSpec(workers=1, memory_limit=2**30)) as client,
    ):
        seen: set[int] = set()
        for deaths in range(1, 4):
            client.wait_for_workers(1, timeout=30)
            (process,) = [process for process, _ in client.run(environment).values()]
            seen.add(process)
            assert len(seen) == deaths
            os.kill(process, signal.SIGKILL)
            while client.nthreads():
                time.sleep(0.02)
        client.wait_for_workers(1, timeout=30)


def test_every_gpu_gets_a_process_that_sees_it_alone(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,9")
    with connect("local", RunSpec(workers=2, memory_limit=2 * 2**30), num_gpus=3) as client:
        client.wait_for_workers(2, timeout=60)
        seen = client.run(environment).values()
        assert Counter(device for _, device in seen) == {"4": 1, "7": 1}
        assert set(client.nthreads().values()) == {1}
        assert all("127.0.0.1" in address for address in client.nthreads())


@pytest.mark.parametrize(
    ("scheduler", "error", "words"),
    [
        ("localhost", ConfigError, "needed an address such as 'tcp://host:8786'"),
        ("tcp://127.0.0.1:1", ClusterError, r"cannot join .*Is it running \(`dask scheduler`\)"),
        ("nonsense://127.0.0.1:1", ClusterError, "cannot join"),
        ("tls://127.0.0.1:1", ClusterError, "takes clients with a certificate"),
    ],
)
def test_addresses_that_are_of_no_use(scheduler, error, words, monkeypatch):
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 0.5)
    with pytest.raises(error, match=words), connect(scheduler):
        pass


def test_clients_that_cannot_be_used():
    with pytest.raises(ConfigError, match=r"needed a distributed\.Client"):
        preflight.require_workers("tcp://127.0.0.1:8786")

    async def asynchronous() -> None:
        async with Client(processes=False, n_workers=1, dashboard_address="127.0.0.1:0", asynchronous=True) as client:
            with pytest.raises(ConfigError, match="asynchronous=False"):
                preflight.require_workers(client)

    asyncio.run(asynchronous())


def test_a_cluster_without_workers_and_a_scheduler_of_another_version(monkeypatch, capsys):
    with Client(processes=False, n_workers=0, dashboard_address="127.0.0.1:0", set_as_default=False) as client:
        monkeypatch.setattr(preflight, "_WAIT_SECONDS", 0.1)
        with pytest.raises(ClusterError, match=r"no worker joined .*`dask worker .* --nthreads 1`"):
            preflight.require_workers(client)
        assert "has no workers yet; waiting" in capsys.readouterr().err
        monkeypatch.undo()
        client.cluster.scale(1)
        preflight.require_workers(client)
        monkeypatch.setattr(client, "run_on_scheduler", lambda *_: "0.0.1")
        with pytest.raises(ClusterError, match=r"has ntkpipe 0\.0\.1, this process"):
            preflight.require_workers(client)

        def missing(*_: object) -> None:
            raise ModuleNotFoundError("No module named 'ntkpipe'")

        monkeypatch.setattr(client, "run_on_scheduler", missing)
        with pytest.raises(ClusterError, match="cannot import ntkpipe"):
            preflight.require_workers(client)
