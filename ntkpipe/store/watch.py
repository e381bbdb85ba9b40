"""Follow a run from another process by reading its store; loads neither torch nor dask."""

import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from ntkpipe.base.errors import ClusterError, StoreNotFoundError
from ntkpipe.base.paths import said
from ntkpipe.base.progress import Ticks
from ntkpipe.store.kernel_store import KernelStore, open_kernel

_POLL_SECONDS = 2.0
_SILENCE_SECONDS = 300.0  # a live driver writes to the store every half minute


def watch(where: str | Path, *, pause: Callable[[float], None] = sleep) -> KernelStore:
    """Show the progress of a run until its store is complete and its driver, if it was submitted, has finished."""
    for attempt in count():
        try:
            store = open_kernel(where)
            break
        except StoreNotFoundError as error:
            if attempt == 0:
                print(f"{said(error)}; waiting until there is one", file=sys.stderr)
            pause(_POLL_SECONDS)
    progress, driver = store.progress, _Driver(store)
    seen, total = progress.tiles_done, progress.tiles_total
    with Ticks(total, done=seen, what=store.manifest.kind, unit="tile") as ticks:
        while not progress.is_complete:
            driver.is_running()
            pause(_POLL_SECONDS)
            progress = store.progress
            for _ in range(seen, progress.tiles_done):
                ticks.tick()
            seen = max(seen, progress.tiles_done)
    while driver.is_running():  # with the steps of its workflow
        pause(_POLL_SECONDS)
    return store


class _Driver:
    """State of the submitted driver, if any, from what it writes to the store."""

    def __init__(self, store: KernelStore) -> None:
        self._store = store
        self._last: dict[str, Any] = {}
        self._changed_at = monotonic()

    def is_running(self) -> bool:
        """Whether the driver reports that it runs; raises ClusterError if it failed or fell silent."""
        found = self._store.store.read_result("driver") or {}
        if found.get("state") == "failed":
            raise ClusterError(f"the driver on {found.get('host')} failed: {found.get('message')}")
        if found.get("state") != "running":
            return False
        if found != self._last:
            self._last, self._changed_at = found, monotonic()
        elif monotonic() - self._changed_at > _SILENCE_SECONDS:
            raise ClusterError(
                f"the driver on {found.get('host')} has said nothing since {found.get('time')}: it was lost, with its "
                "worker or its cluster. Every finished tile is stored; submit again, and it resumes"
            )
        return True
