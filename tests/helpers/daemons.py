"""Dask schedulers and workers as processes of their own, as users start them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

DASK = (sys.executable, "-m", "dask")


@contextmanager
def running(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is asked to end when the context is left, and then made to."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def address_in(scheduler_file: Path, process: subprocess.Popen[bytes], log: Path, seconds: float = 30) -> str:
    """The address that a scheduler writes when it is ready."""
    end = monotonic() + seconds
    while monotonic() < end and process.poll() is None:
        if scheduler_file.exists() and scheduler_file.read_text().endswith("}"):
            address: str = json.loads(scheduler_file.read_text())["address"]
            return address
        sleep(0.05)
    raise AssertionError(f"no scheduler after {seconds} s:\n{log.read_text()}")


_LACKING = '''
import os, sys

class Lacking:
    """Packages that a worker has not, or that end it when they are imported."""

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top == os.environ.get("LACKS"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if top == os.environ.get("DIES_OF"):
            os._exit(3)

sys.meta_path.insert(0, Lacking())
if "CLAIMS" in os.environ:
    import importlib.metadata
    found = importlib.metadata.version
    importlib.metadata.version = lambda name: os.environ["CLAIMS"] if name == "ntkpipe" else found(name)
'''


def worker(
    folder: Path, address: str, name: str, start: Sequence[str] = (), **differing: str
) -> AbstractContextManager[Any]:
    """A worker with a nanny, in the environment of :func:`cluster`, and what differs."""
    path = os.pathsep.join([str(folder / "site"), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **differing}
    command = [*DASK, "worker", address, "--nthreads", "1", "--no-dashboard", "--memory-limit", "1GiB"]
    return running([*start, *command, "--local-directory", str(folder)], folder / f"{name}.log", environment)


@contextmanager
def cluster(folder: Path, *workers: Mapping[str, str], start: Sequence[str] = ()) -> Iterator[str]:
    """A scheduler, and a worker for each environment: ``LACKS`` or ``DIES_OF`` a package, ``CLAIMS`` a version."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(_LACKING)
    path = os.pathsep.join([str(folder / "site"), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    file, log = folder / "scheduler.json", folder / "scheduler.log"
    quiet = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
    with ExitStack() as stack:
        command = [*DASK, "scheduler", *quiet, "--scheduler-file", str(file)]
        address = address_in(file, stack.enter_context(running(command, log, environment)), log)
        for number, differing in enumerate(workers):
            stack.enter_context(worker(folder, address, str(number), start, **differing))
        yield address
