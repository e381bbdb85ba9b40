"""Follow a run from outside, by what its store says; loads neither torch nor dask."""

from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep
from typing import Any

from ntkpipe.errors import ClusterError, StoreNotFoundError
from ntkpipe.kernel import KernelStore, open_kernel
from ntkpipe.progress import show_progress

_POLL_SECONDS = 2.0


def watch(where: str | Path, *, pause: Callable[[float], None] = sleep) -> KernelStore:
    """Show the progress of a run until its store is complete and its driver, if it was submitted, has finished.

    Parameters
    ----------
    where
        Path or URL of the store, which may not exist yet.
    pause
        Waits a number of seconds.

    Returns
    -------
    The store.

    Raises
    ------
    ClusterError
        If the driver that was submitted has failed, with its message.
    """
    while True:
        try:
            store = open_kernel(where)
            break
        except StoreNotFoundError:
            pause(_POLL_SECONDS)
    first = store.progress
    tiles = _new_tiles(store, first.tiles_done, pause)
    for _ in show_progress(
        tiles, total=first.tiles_total, done=first.tiles_done, what=store.manifest.kind, unit="tile"
    ):
        pass
    while _driver(store).get("state") == "running":  # the steps of its workflow
        pause(_POLL_SECONDS)
    return store


def _new_tiles(store: KernelStore, seen: int, pause: Callable[[float], None]) -> Iterator[int]:
    """A number for each tile that appears, until there is none to come."""
    while True:
        progress = store.progress
        yield from range(seen, progress.tiles_done)
        seen = max(seen, progress.tiles_done)
        if progress.is_complete:
            return
        _driver(store)
        pause(_POLL_SECONDS)


def _driver(store: KernelStore) -> dict[str, Any]:
    """What the driver that was submitted says of itself; nothing where there is none."""
    found = store.store.read_result("driver") or {}
    if found.get("state") == "failed":
        raise ClusterError(f"the driver on {found.get('host')} failed: {found.get('message')}")
    return found
