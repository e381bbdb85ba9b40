"""Every way onto a cluster passes one preflight: what is wrong there is said by name, soon, and before writing."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from daemons import DASK, address_in, cluster, running, worker
from distributed import Client, LocalCluster
from jobs import Numbers
from small import compute, inputs, mlp

from ntkpipe import KernelRegression, as_operator, compute_kernel, eigsh, plan_kernel, solve
from ntkpipe.app.cli import main
from ntkpipe.base.config import RunSpec
from ntkpipe.base.errors import ClusterError, ConfigError, ModelError
from ntkpipe.executors import connect, pool, preflight
from ntkpipe.executors.dask import ClusterExecutor
from ntkpipe.executors.payload import pack_code
from ntkpipe.store.kernel_store import KernelStore

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> KernelStore:
    return compute(tmp_path_factory.mktemp("kernel") / "a.zarr")


def ways(client: Any, kernel: KernelStore, path: Path) -> dict[str, Callable[[], Any]]:
    """Ways onto a cluster."""
    options = {"store": path, "client": client, "progress": False}
    return {
        "compute_kernel": lambda: compute_kernel(mlp(), inputs(), **options),
        "plan_kernel": lambda: plan_kernel(mlp(), inputs(), **options),
        "eigsh": lambda: eigsh(as_operator(kernel.train, client=client), 2),
        "solve": lambda: solve(as_operator(kernel.train, client=client), np.ones(18), ridge=1.0),
        "KernelRegression": lambda: KernelRegression(ridge=1.0).fit(
            as_operator(kernel.train, client=client), np.arange(18.0)
        ),
    }


@contextmanager
def joined(folder: Path, *workers: dict[str, str], start: Sequence[str] = ()) -> Iterator[Client]:
    with cluster(folder, *workers, start=start) as address, Client(address, set_as_default=False) as client:
        client.wait_for_workers(len(workers), timeout=60)
        yield client


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ([{"LACKS": "ntkpipe"}], rf"1 of 1 workers on {HOST} fail.*No module named 'ntkpipe'.*Install ntkpipe"),
        ([{}, {"LACKS": "ntkpipe"}], rf"1 of 2 workers on {HOST} fail.*No module named 'ntkpipe'.*Install ntkpipe"),
        ([{"CLAIMS": "9.9"}], rf"versions of ntkpipe differ: .*9\.9 on {HOST}"),
    ],
)
def test_a_worker_that_is_of_no_use_is_named_by_every_way(tmp_path, kernel, workers, words):
    (tmp_path / "there").mkdir()
    path = tmp_path / "there" / "b.zarr"
    with joined(tmp_path, *workers) as client:
        for name, act in ways(client, kernel, path).items():
            if len(workers) > 1 and name not in {"compute_kernel", "eigsh"}:
                continue
            begin = time.monotonic()
            with pytest.raises(ClusterError, match=words):
                act()
            assert time.monotonic() - begin < 30
        assert not list(path.parent.iterdir())


def test_workers_that_die_of_being_asked_end_the_wait(tmp_path, kernel):
    """A nanny starts them again and again."""
    with joined(tmp_path, {"DIES_OF": "ntkpipe"}) as client:
        for name, act in ways(client, kernel, tmp_path / "b.zarr").items():
            if name in {"compute_kernel", "eigsh"}:
                begin = time.monotonic()
                with pytest.raises(ClusterError, match=r"1 of 1 workers died .*127\.0\.0\.1.* look at their logs"):
                    act()
                assert time.monotonic() - begin < 30
    assert not (tmp_path / "b.zarr").exists()


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        ("mount -t tmpfs none {}", "cannot see what this run's driver wrote there"),
        ("mount --bind {0} {0} && mount -o remount,ro,bind {0}", "cannot write there: .*ead-only file system"),
    ],
)
def test_a_worker_that_does_not_reach_the_store(tmp_path, mount, words):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("this user may not make mount namespaces")
    there = tmp_path / "there"
    there.mkdir()
    start = ["unshare", "-m", "sh", "-c", f'{mount.format(there)} && exec "$@"', "sh"]
    with joined(tmp_path, {}, start=start) as client:
        with pytest.raises(ClusterError, match=rf"1 of 1 workers do not reach the store {there}/b.zarr: .*{words}"):
            compute_kernel(mlp(), inputs(), store=there / "b.zarr", client=client, progress=False)
        assert not list(there.iterdir())


def test_a_worker_without_the_package_that_joins_in_mid_run_stalls_nothing(tmp_path):
    """Dask gives tasks to a worker whose plugins fail while it starts, and nothing runs them."""

    def slowly(job: Numbers, key: int, pause: Callable[[], None]) -> None:
        time.sleep(0.1)

    with joined(tmp_path, {}) as client, ExitStack() as late:
        code = pack_code(Path(__file__).parents[1] / "helpers")
        run = ClusterExecutor(client, name="numbers", code=code).run(Numbers(slowly), range(1, 101))
        found = [next(run)]
        late.enter_context(worker(tmp_path, client.scheduler.address, "late", LACKS="ntkpipe"))
        found += run
        assert sorted(found) == sorted([*range(1, 101), *range(-100, 0)])
        assert "No module named 'ntkpipe'" in (tmp_path / "late.log").read_text()


@pytest.mark.parametrize("stopped", ["worker", "scheduler"])
def test_what_hangs_is_named_and_the_wait_is_not_silent(tmp_path, kernel, stopped, monkeypatch, capsys):
    monkeypatch.setattr(pool, "_HOST_SECONDS", 5)
    monkeypatch.setattr(preflight, "_SCHEDULER_SECONDS", 5)
    with joined(tmp_path, {}, {}) as client:
        pids = client.run(os.getpid)
        address = min(pids) if stopped == "worker" else client.scheduler.address
        pid = pids[address] if stopped == "worker" else client.run_on_scheduler(os.getpid)
        words = {
            "worker": rf"1 of 2 workers do not answer in 5 seconds, the first at {address}",
            "scheduler": rf"cannot use the scheduler at {address}: no answer in 5 seconds",
        }
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(ClusterError, match=words[stopped]):
                as_operator(kernel.train, client=client)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert "yet" in capsys.readouterr().err
        found = as_operator(kernel.train, client=client) @ np.eye(18)
    np.testing.assert_allclose(found, kernel.train[:], rtol=1e-12)


def test_a_scheduler_that_cannot_import_the_package(tmp_path, kernel):
    """Its metadata may be there all the same."""
    (tmp_path / "fine").mkdir()
    with cluster(tmp_path / "fine"):
        pass  # makes what lacks packages
    file, log = tmp_path / "scheduler.json", tmp_path / "scheduler.log"
    path = os.pathsep.join([str(tmp_path / "fine" / "site"), str(Path(__file__).parents[2])])
    command = [*DASK, "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file)]
    command += ["--dashboard-address", "127.0.0.1:0"]
    with running(command, log, {**os.environ, "PYTHONPATH": path, "LACKS": "ntkpipe"}) as process:
        address = address_in(file, process, log)
        with worker(tmp_path / "fine", address, "one"), Client(address, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=60)
            for name, act in ways(client, kernel, tmp_path / "b.zarr").items():
                if name in {"compute_kernel", "eigsh"}:
                    with pytest.raises(ClusterError, match=rf"scheduler at {address} cannot import ntkpipe"):
                        act()
    assert not (tmp_path / "b.zarr").exists()


@pytest.mark.parametrize("spelling", ["tcp://{}", " tcp://{}/ ", "{}", "file"])
def test_spellings_of_one_scheduler(tmp_path, kernel, spelling):
    with cluster(tmp_path, {}) as address:
        given = str(tmp_path / "scheduler.json") if spelling == "file" else spelling.format(address[6:])
        with connect.connect(given) as client:
            found = as_operator(kernel.train, client=client) @ np.eye(18)
    np.testing.assert_allclose(found, kernel.train[:], rtol=1e-12)


def test_files_that_name_no_scheduler(tmp_path):
    for text in ("", "[]", "{}", "{"):
        (tmp_path / "scheduler.json").write_text(text)
        with pytest.raises(ConfigError, match=r"a file that names no scheduler.*of `dask scheduler --scheduler-file`"):
            connect.connect(str(tmp_path / "scheduler.json")).__enter__()


MODULE = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x)

def twice(model, x):
    return 2 * model(x)
"""


def test_a_model_whose_module_workers_lack(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "only_here.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    import only_here

    options: dict[str, Any] = {"inputs": inputs(), "store": tmp_path / "b.zarr", "progress": False}
    with joined(tmp_path, {}) as client:
        for changes in ({"model": only_here.Net()}, {"model": mlp(), "forward": only_here.twice}):
            for act in (compute_kernel, plan_kernel):
                with pytest.raises(ClusterError, match=rf"{HOST}: .*No module named 'only_here'.*code='FOLDER'"):
                    act(**options, **changes, client=client)
        with pytest.raises(ConfigError, match="is not a folder"):
            compute_kernel(only_here.Net(), **options, client=client, code=tmp_path / "gone")
        lock = __import__("threading").Lock()
        with pytest.raises(ModelError, match="cannot be sent to workers"):
            compute_kernel(mlp(), **options, client=client, forward=lambda y, lock=lock: y)
        assert not (tmp_path / "b.zarr").exists()
        there = compute_kernel(only_here.Net(), **options, client=client, code=tmp_path / "code")
        here = compute_kernel(only_here.Net(), **{**options, "store": tmp_path / "c.zarr"})
    np.testing.assert_array_equal(there.train[:], here.train[:])
    x = np.asarray(inputs(), np.float64)
    np.testing.assert_allclose(here.train[:], x @ x.T + 1, rtol=1e-5, atol=1e-5)


def test_a_scheduler_without_workers(tmp_path, kernel, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "_WAIT_SECONDS", 0.5)
    with cluster(tmp_path) as address, Client(address, set_as_default=False) as client:
        for act in ways(client, kernel, tmp_path / "b.zarr").values():
            with pytest.raises(ClusterError, match=rf"no worker joined {address} in 0 seconds.*wait_for_workers"):
                act()
            assert f"{address} has no workers yet; waiting" in capsys.readouterr().err
        with dask.config.set({"ntkpipe.wait-for-workers": "1200 ms"}):
            begin = time.monotonic()
            with pytest.raises(ClusterError, match="in 1 seconds"):
                preflight.require_workers(client)
            assert time.monotonic() - begin > 1
    assert not (tmp_path / "b.zarr").exists()


def test_a_cluster_that_adapts_is_given_time_and_starts_a_worker(kernel):
    options = {"dashboard_address": "127.0.0.1:0", "processes": False, "threads_per_worker": 1}
    with LocalCluster(n_workers=0, **options) as local:
        local.adapt(minimum=0, maximum=1, interval="100ms")
        with Client(local, set_as_default=False) as client:
            found = as_operator(kernel.train, client=client) @ np.eye(18)
    np.testing.assert_allclose(found, kernel.train[:], rtol=1e-12)


def test_clients_that_are_gone_or_none(tmp_path, kernel, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "_SCHEDULER_SECONDS", 1)
    with cluster(tmp_path, {}) as address:
        closed = Client(address, set_as_default=False)
        closed.close()
        lost = Client(address, set_as_default=False)
    for client, kind, words in (
        (closed, ClusterError, "the client is closed; make a new one"),
        (lost, ClusterError, rf"cannot use the scheduler at {address}: [^.].*[^.]\. Is it running|client is clos"),
        (address, ConfigError, r"needed a distributed\.Client .*such as Client\("),
        (object(), ConfigError, r"needed a distributed\.Client"),
    ):
        for act in ways(client, kernel, tmp_path / "b.zarr").values():
            begin = time.monotonic()
            with pytest.raises(kind, match=words):
                act()
            assert time.monotonic() - begin < 30
    lost.close(timeout=1)
    assert not (tmp_path / "b.zarr").exists()


@pytest.fixture
def mute() -> Iterator[str]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def web() -> Iterator[str]:
    """A server of another protocol, as at the port of a dashboard."""
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"], stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        port = server.stdout.readline().split(b" port ")[1].split()[0].decode()
        yield f"tcp://127.0.0.1:{port}"
        server.terminate()


@pytest.mark.parametrize("server", ["mute", "web"])
def test_what_answers_is_no_scheduler(server, request, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(connect, "_CONNECT_SECONDS", 4)
    address = request.getfixturevalue(server)
    with pytest.raises(ClusterError, match=rf"cannot join the scheduler at {address}: .*8787 is its dashboard"):
        connect.connect(address).__enter__()
    if server == "mute":
        assert f"{address} does not answer yet" in capsys.readouterr().err


def test_a_worker_is_no_scheduler():
    with connect.connect("local", RunSpec(workers=1)) as client:
        client.wait_for_workers(1, timeout=60)
        (worker,) = client.nthreads()
        with pytest.raises(ClusterError, match="a Worker answers there"):
            connect.connect(worker).__enter__()


def test_the_commands_say_it_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(connect, "_CONNECT_SECONDS", 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.py").write_text("import torch\ndef model(): return torch.nn.Linear(4, 3)\n")
    (tmp_path / "w.yaml").write_text(
        "store: b.zarr\nmodel: {factory: 'torch.nn:Linear', arguments: {in_features: 4, out_features: 3}}\n"
        "data: {factory: 'study:data'}\n"
    )
    (tmp_path / "study.py").write_text("import numpy as np\ndef data(): return {'inputs': np.ones((6, 4))}\n")
    for command in (["run"], ["submit"]):
        with pytest.raises(SystemExit):
            main([*command, "w.yaml", "--scheduler", "tcp://127.0.0.1:1"])
        assert "cannot join the scheduler at tcp://127.0.0.1:1: " in capsys.readouterr().err
    assert not (tmp_path / "b.zarr").exists()


def test_without_workers_a_run_says_so_and_ends(monkeypatch, capsys):
    """After a loss; what was computed is kept by whoever runs it."""
    monkeypatch.setattr(pool, "_SAY_SECONDS", 0.1)
    monkeypatch.setattr(pool, "WAIT_SECONDS", 0.4)
    options = {"dashboard_address": "127.0.0.1:0", "set_as_default": False}
    with Client(n_workers=0, processes=False, **options) as client:
        waiting: pool.WorkerPool[int] = pool.WorkerPool(client)
        assert waiting.seen(True)
        assert not waiting.seen(False)
        time.sleep(0.2)
        assert not waiting.seen(False)
        assert not waiting.seen(False)
        assert capsys.readouterr().err.count("the cluster has no workers; waiting up to") == 1
        assert waiting.seen(True)
        assert not waiting.seen(False)
        time.sleep(0.5)
        with pytest.raises(ClusterError, match=r"the cluster is lost.*Every finished tile is stored"):
            waiting.seen(False)
