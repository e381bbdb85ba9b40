"""Preloaded by the workers of a drill: while a process executes a block, a file of its number holds the task's key."""

import os
from pathlib import Path
from typing import Any

from distributed import Worker, WorkerPlugin


class _Watch(WorkerPlugin):
    def __init__(self, file: Path) -> None:
        self._file = file

    def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
        if finish == "executing":
            self._file.write_text(str(key))
        elif start == "executing":
            self._file.unlink(missing_ok=True)


async def dask_setup(worker: Worker) -> None:
    await worker.plugin_add(_Watch(Path(os.environ["DRILL_FOLDER"], str(os.getpid()))))
