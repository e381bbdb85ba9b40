"""Runs in child processes."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small import compute

from ntkpipe.build.life import StoreSink

# Starts children in milliseconds: torch is imported once, in a server without threads.
FORKS = multiprocessing.get_context("forkserver")


def slowly(path: Path, seconds: float, run: Callable[..., Any] = compute, **changes) -> None:
    """The run of a child process, slow enough to be killed in the middle."""
    write = StoreSink.write

    def write_and_wait(*args):
        write(*args)
        time.sleep(seconds)

    StoreSink.write = write_and_wait
    run(path, **changes)
