"""Several hosts: scheduler and workers in network namespaces of their own, and a cable that is pulled in mid-run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from daemons import DASK, address_in, running
from small import chunks

from ntkpipe.app import workflow as workflows

SCRIPT = Path(__file__).parents[2] / "cluster" / "hosts" / "hosts.sh"
# 11 s is the least that Dask takes.
FLAKY = {"distributed": {"comm": {"timeouts": {"connect": "3s", "tcp": "11s"}}}}
STUDY = """
import numpy as np
import torch
from torch import nn


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()


def data():
    return {"inputs": np.random.default_rng(0).standard_normal((48, 4)).astype(np.float32)}
"""
# Preloaded by workers: a tile takes as many seconds as a file says.
PACE = """
import os
from pathlib import Path
from time import sleep


def dask_setup(worker):
    from ntkpipe.build.life import StoreSink  # torch; a nanny reads this file, too

    write = StoreSink.write

    def write_slowly(*arguments):
        sleep(float(Path(os.environ["PACE"]).read_text()))
        write(*arguments)

    StoreSink.write = write_slowly
"""
WORKFLOW = "store: {store}\nmodel: {{factory: 'study:model'}}\ndata: {{factory: 'study:data'}}\nkernel: {{tile: 3}}\n"


def hosts(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture
def prefix() -> Iterator[str]:
    """Three hosts that reach each other; the name of the Nth is the prefix and N."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2 (apt-get install iproute2)")
    name = f"ntk{os.getpid()}-"
    try:
        made = hosts("up", name, 3)
        if made.returncode != 0:
            pytest.skip(f"this machine makes no network namespaces: {made.stderr}")
        yield name
    finally:
        hosts("down", name)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 150) -> None:
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, f"not after {seconds} s: {what}"
        sleep(0.1)


def finished_by(store: Path) -> set[int]:
    """Processes that have finished a block."""
    lines = [line for log in store.glob("results/runs/*/blocks.jsonl") for line in log.read_text().splitlines()]
    return {json.loads(line)["process"] for line in lines}


def test_a_host_that_is_cut_off_and_comes_back(prefix: str, tmp_path: Path) -> None:
    """Its blocks go to others, it joins again by itself, and every tile has the bits of an undisturbed run."""
    (tmp_path / "study.py").write_text(STUDY)
    preload = tmp_path / "slowly.py"
    preload.write_text(PACE)
    store = tmp_path / "kernel.zarr"
    (tmp_path / "workflow.yaml").write_text(WORKFLOW.format(store=store))
    (tmp_path / "dask").mkdir()
    (tmp_path / "dask" / "flaky.yaml").write_text(json.dumps(FLAKY))

    def pace(seconds: float) -> None:
        (tmp_path / "pace.new").write_text(str(seconds))
        (tmp_path / "pace.new").rename(tmp_path / "pace")

    pace(0.1)
    environment = {**os.environ, "DASK_CONFIG": str(tmp_path / "dask"), "PACE": str(tmp_path / "pace")}
    logs = {name: tmp_path / f"{name}.log" for name in ("scheduler", "worker2", "worker3", "driver")}

    def on(host: int, *command: str | Path) -> list[str | Path]:
        return ["ip", "netns", "exec", f"{prefix}{host}", *command]

    def pids(host: int) -> set[int]:
        listed = subprocess.run(["ip", "netns", "pids", f"{prefix}{host}"], capture_output=True, text=True, check=True)
        return set(map(int, listed.stdout.split()))

    with ExitStack() as stack:
        file = tmp_path / "scheduler.json"
        command = [*DASK, "scheduler", "--host", "10.77.0.1", "--dashboard-address", "127.0.0.1:0"]
        command += ["--scheduler-file", str(file)]
        scheduler = stack.enter_context(running(on(1, *command), logs["scheduler"], environment))
        address = address_in(file, scheduler, logs["scheduler"])
        # A worker that has lost its scheduler ends: whoever started it starts it again.
        forever = ["sh", "-c", 'while :; do "$@"; sleep 0.2; done', "sh"]
        worker = [*DASK, "worker", address, "--nthreads", "1", "--memory-limit", "2GiB", "--preload", preload]
        for host in (2, 3):
            command = on(host, *forever, *worker, "--host", f"10.77.0.{host}")
            stack.enter_context(running(command, logs[f"worker{host}"], environment))
        wait_until(lambda: logs["scheduler"].read_text().count("Register worker") == 2, "two workers")
        run = [sys.executable, "-m", "ntkpipe", "run", str(tmp_path / "workflow.yaml"), "--scheduler", address]
        driver = stack.enter_context(running(on(1, *run), logs["driver"], environment))

        def working() -> bool:
            assert driver.poll() is None, logs["driver"].read_text()
            return bool(finished_by(store) & pids(3))

        wait_until(working, "host 3 has finished a block")
        before = pids(3)
        hosts("cut", prefix, 3)
        pace(1)  # so that the other host leaves something to do
        wait_until(lambda: "Remove worker addr: tcp://10.77.0.3" in logs["scheduler"].read_text(), "host 3 is lost")
        hosts("mend", prefix, 3)
        wait_until(lambda: logs["scheduler"].read_text().count("Register worker") == 3, "host 3 is there again")
        pace(0.1)
        wait_until(lambda: working() and finished_by(store) & (pids(3) - before), "host 3 works again")
        pace(0)
        assert driver.wait(150) == 0, logs["driver"].read_text()

    undisturbed = tmp_path / "undisturbed.zarr"
    for _ in workflows.run(workflows.load(tmp_path / "workflow.yaml", [f"store={undisturbed}"])):
        pass
    found = chunks(store)
    assert len([name for name in found if name.startswith("kernel/train")]) == 16 * 17 // 2
    assert found == chunks(undisturbed)
