"""A submitted workflow runs on the cluster as it would run here, and says in its store what becomes of it."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client
from small import chunks, compute, times

from ntkpipe import open_kernel
from ntkpipe.app import submission as submission_module
from ntkpipe.app import workflow
from ntkpipe.app.cli import main
from ntkpipe.app.submission import _beating, _drive, _write_state, submit
from ntkpipe.base.config import RunSpec
from ntkpipe.base.errors import ClusterError, ConfigError, StoreExistsError, StoreMismatchError
from ntkpipe.executors import connect as cluster
from ntkpipe.executors.payload import pack_code
from ntkpipe.executors.preflight import address_of
from ntkpipe.store import watch as watching
from ntkpipe.store.watch import watch

FACTORIES = """
import numpy as np, torch
from parts import WIDTH

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(4, WIDTH), torch.nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))

def model(): return Net().eval()
def broken(): return Net().train().eval().append(1)
def data():
    return {"inputs": np.random.default_rng(0).standard_normal((18, 4)).astype(np.float32), "targets": np.arange(18)}
"""
YAML = """
store: runs/small.zarr
model: {factory: "factories:model"}
data: {factory: "factories:data"}
kernel: {kind: ntk, tile: 4}
steps: [{step: verify}]
"""


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with cluster.connect("local", RunSpec(workers=2, memory_limit=3 * 2**30)) as joined:
        yield joined


@pytest.fixture(scope="module")
def scheduler(client: Client) -> str:
    return address_of(client)


def write_study(folder: Path) -> Path:
    folder.mkdir()
    (folder / "factories.py").write_text(FACTORIES)
    (folder / "parts.py").write_text("WIDTH = 5\n")
    (folder / "study.yaml").write_text(YAML)
    return folder / "study.yaml"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_study(tmp_path / "study")


@pytest.fixture(scope="module")
def submitted(scheduler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study that was submitted there, and its store, which is finished."""
    root = tmp_path_factory.mktemp("submitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        submission = dict(submit(write_study(root / "study"), scheduler=scheduler))
    assert submission["store"] == str(root / "runs" / "small.zarr")
    watch(submission["store"])
    return root


@pytest.fixture
def copied(submitted: Path, tmp_path: Path) -> Path:
    """A copy of that store."""
    return shutil.copytree(submitted / "runs" / "small.zarr", tmp_path / "copied.zarr")


def test_a_submitted_workflow_ends_as_one_that_runs_here(submitted, file, tmp_path, capsys):
    path = submitted / "runs" / "small.zarr"
    store = watch(path)
    driver = store.store.read_result("driver")
    assert driver["state"] == "finished"
    assert store.progress.is_complete
    assert store.store.read_result("certificate")["kernels"][0]["is_good"]
    list(workflow.run(workflow.load(file, [f"store={tmp_path / 'here.zarr'}"]), progress=False))
    assert chunks(tmp_path / "here.zarr") == chunks(path)
    capsys.readouterr()
    main(["info", str(path), "--watch"])
    assert "finished on" in capsys.readouterr().out


def test_the_same_command_computes_on_the_cluster(scheduler, file, tmp_path, capsys):
    main(["run", str(file), "--scheduler", scheduler])
    assert "2 workers of 1 thread on cpu" in capsys.readouterr().err
    main(["run", str(file), "--set", "store=here.zarr"])
    assert chunks(tmp_path / "here.zarr") == chunks(tmp_path / "runs" / "small.zarr")


def test_what_is_wrong_is_said_before_the_command_returns(scheduler, file):
    with pytest.raises(ConfigError, match="factories:broken"):
        submit(file, ["model.factory=factories:broken"], scheduler=scheduler)
    assert not Path("runs").exists()


def test_a_driver_that_fails_later_is_reported(copied):
    store = open_kernel(copied).store
    store.write_result("driver", {"state": "failed", "host": "far", "message": "the disk is full"})
    with pytest.raises(ClusterError, match="the driver on far failed: the disk is full"):
        watch(copied)


def test_a_driver_that_is_lost_is_reported(copied, monkeypatch):
    store = open_kernel(copied).store
    store.write_result("driver", {"state": "running", "host": "far", "time": "then"})
    monkeypatch.setattr(watching, "_SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(watching, "_POLL_SECONDS", 0.05)
    with pytest.raises(ClusterError, match="the driver on far has said nothing since then"):
        watch(copied)


def test_a_driver_that_is_refused_says_nothing_of_a_store_of_others(scheduler, file, copied):
    before = open_kernel(copied).store.read_result("driver")
    with pytest.raises(StoreMismatchError):
        submit(file, [f"store={copied}", "kernel.kind=pntk"], scheduler=scheduler)
    assert open_kernel(copied).store.read_result("driver") == before


def test_a_driver_says_now_and_then_that_it_is_there(tmp_path, monkeypatch):
    store = compute(tmp_path / "small.zarr").store
    monkeypatch.setattr(submission_module, "_BEAT_SECONDS", 0.02)
    _write_state(store.root, "mine", "running", "")
    with _beating(store.root, "mine"):
        said = {store.read_result("driver")["time"]}
        deadline = time.monotonic() + 30
        while len(said) < 3:
            assert time.monotonic() < deadline
            said.add(store.read_result("driver")["time"])
            time.sleep(0.02)
        store.write_result("driver", {"state": "running", "key": "another's", "time": "now"})
        time.sleep(0.2)
        assert store.read_result("driver")["key"] == "another's"


@pytest.mark.parametrize(
    ("address", "words"),
    [("local", "would end with this command"), ("host", "needed an address"), ("tcp://127.0.0.1:1", "cannot join")],
)
def test_addresses_that_are_of_no_use(file, address, words, monkeypatch):
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 0.5)
    with pytest.raises((ConfigError, ClusterError), match=words):
        submit(file, scheduler=address)


def test_a_driver_that_dask_repeats_does_not_start_over_again(scheduler, file, tmp_path):
    def drive(mode: str, key: str) -> dict[str, int]:
        code = pack_code(file.parent, everything=True)
        client.submit(_drive, code, file.name, [f"store={store}"], mode, False, key, pure=False).result()
        return times(store)

    store = tmp_path / "k.zarr"
    with Client(scheduler, set_as_default=False) as client:
        first = drive("w", "one")
        assert drive("w", "one") == drive("w-", "one") == first
        with pytest.raises(StoreExistsError):
            drive("w-", "two")
        assert open_kernel(store).store.read_result("driver")["key"] == "one"
        assert drive("w", "two") != first


def test_two_drivers_on_one_worker_do_not_meet(client, scheduler, file):
    client.cluster.scale(1)
    try:
        while len(client.scheduler_info()["workers"]) > 1:
            time.sleep(0.05)
        stores = [dict(submit(file, [f"store={name}.zarr"], scheduler=scheduler))["store"] for name in "ab"]
        for store in stores:
            assert watch(store).store.read_result("driver")["state"] == "finished"
    finally:
        client.cluster.scale(2)
