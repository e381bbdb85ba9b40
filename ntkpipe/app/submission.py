"""Submit a workflow, whose driver then runs on a cluster. The scheduler imports this module, so it keeps torch out."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import sleep
from typing import Any
from uuid import uuid4

from distributed import Client, Future, fire_and_forget, get_worker, secede

from ntkpipe.base.config import load_workflow
from ntkpipe.base.errors import ClusterError, ConfigError, StoreError, StoreNotFoundError
from ntkpipe.base.progress import note_if_slow
from ntkpipe.base.tables import TableRows
from ntkpipe.executors import connect
from ntkpipe.executors.dask import TOPIC
from ntkpipe.executors.payload import pack_code, unpack_code
from ntkpipe.executors.pool import WorkerPool
from ntkpipe.executors.preflight import ask_all
from ntkpipe.store.media.opening import medium_at
from ntkpipe.store.store import Mode, Store

_POLL_SECONDS = 0.5
# How often a driver says that it is there; `ntkpipe info --watch` waits ten times as long.
_BEAT_SECONDS = 30.0


def submit(
    path: Path, overrides: Sequence[str] = (), *, scheduler: str, mode: Mode = "a", grow: bool = False
) -> TableRows:
    """Send a workflow file, with all files of its folder, to a cluster and let it run there; says what and where."""
    if scheduler == connect.LOCAL:
        raise ConfigError(
            "a local cluster would end with this command; start one with `dask scheduler` and `dask worker` and give "
            "its address, or use `ntkpipe run --scheduler local`"
        )
    where = str(medium_at(load_workflow(path, overrides).store).root)
    store = where if "://" in where else str(Path(where).absolute())
    code = pack_code(path.resolve().parent, everything=True)
    with connect.connect(scheduler) as client:
        ask_all(client, lambda: WorkerPool[None](client).ask(_can_drive))
        key = f"ntkpipe-driver-{uuid4().hex}"
        seen = len(_announced(client, store))
        future: Future[None] = client.submit(
            _drive, code, path.name, [*overrides, f"store={store}"], mode, grow, key, key=key, pure=False
        )
        fire_and_forget(future)
        with note_if_slow(f"the driver has begun no block of {store} yet"):
            while not future.done() and len(_announced(client, store)) == seen:
                sleep(_POLL_SECONDS)
        if future.done():
            future.result()
        rows = [("driver", key), ("store", store), ("dashboard", client.dashboard_link)]
        return [*rows, ("follow it", f"ntkpipe info {store} --watch")]


def _can_drive() -> None:
    from ntkpipe.app import workflow  # noqa: F401 - the answer is that it is there


def _announced(client: Client, store: str) -> list[Any]:
    return [event for _, event in client.get_events(TOPIC) if event["store"] == store]


def _drive(code: bytes, name: str, overrides: Sequence[str], mode: Mode, grow: bool, key: str) -> None:
    """The driver: a task that gives its thread back to the worker, and that Dask may repeat elsewhere."""
    from ntkpipe.app import workflow

    worker = get_worker()
    folder = Path(worker.local_directory) / f"ntkpipe-{uuid4().hex}"
    unpack_code(code, folder)
    loaded = workflow.load(folder / name, overrides)
    store = loaded.workflow.store
    if _is_driven_by(store, key):  # Dask repeats it: mode="w" has started over, and what came since is kept
        mode = "a"
    secede()  # the worker gets its thread back, and the client is this driver's alone: another may be beside it
    own = Client(worker.scheduler.address, security=worker.security, set_as_default=False)
    with own as client, _state_kept(client, store, key):
        results = workflow.run(loaded, mode=mode, grow=grow, client=client)
        if bad := [result.step for result in results if not result.is_good]:
            raise ClusterError(f"the kernel is complete, but steps found something wrong: {', '.join(bad)}")


@contextlib.contextmanager
def _state_kept(client: Client, where: str | Path, key: str) -> Iterator[None]:
    """Say in ``results/driver`` of the store what becomes of the driver, from when blocks of it are handed out.

    Before that the store may not be there, or another kernel's, of which nothing is said then.
    """
    seen, is_over = len(_announced(client, str(where))), threading.Event()

    def note(event: tuple[float, dict[str, Any]]) -> None:
        if event[1]["store"] == str(where) and not is_over.is_set():
            _write_state(where, key, "running", "")

    client.subscribe_topic(TOPIC, note)
    try:
        with _beating(where, key):
            yield
    except BaseException as error:
        is_over.set()
        if _is_driven_by(where, key) or len(_announced(client, str(where))) > seen:
            _write_state(where, key, "failed", f"{type(error).__name__}: {error}")
        raise
    is_over.set()
    client.unsubscribe_topic(TOPIC)
    _write_state(where, key, "finished", "")


@contextlib.contextmanager
def _beating(where: str | Path, key: str) -> Iterator[None]:
    """Say now and then that the driver is there: one that is lost with its machine says nothing any more."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT_SECONDS):
            # A disk that does not answer now may do so at the next beat, and is the run's to complain about.
            with contextlib.suppress(StoreError):
                if _is_driven_by(where, key):
                    _write_state(where, key, "running", "")

    beating = threading.Thread(target=beat, name="ntkpipe-driver", daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()


def _is_driven_by(where: str | Path, key: str) -> bool:
    try:
        found = Store.open(where).read_result("driver")
    except StoreError:  # none, or a damaged one
        return False
    return found is not None and found.get("key") == key


def _write_state(where: str | Path, key: str, state: str, message: str) -> None:
    try:
        store = Store.open(where)
    except StoreNotFoundError:  # not begun yet, or refused before it was
        return
    now = datetime.now(UTC).isoformat(timespec="seconds")
    driver = {"key": key, "host": socket.gethostname(), "process": os.getpid()}
    store.write_result("driver", {"state": state, "message": message, **driver, "time": now})
