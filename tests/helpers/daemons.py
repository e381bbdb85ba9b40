"""Dask schedulers and workers as processes of their own, as users start them."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

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
