"""Before anything is done on a cluster: its scheduler answers, has this package, and workers that answer, too."""

import asyncio
from collections.abc import Callable
from concurrent.futures import CancelledError
from importlib.metadata import version
from time import monotonic, sleep
from typing import Any, TypeVar
from uuid import uuid4

import dask
from dask.utils import parse_timedelta
from distributed import Client
from distributed.client import ClosedClientError

from ntkpipe.base.errors import ClusterError, ConfigError
from ntkpipe.base.paths import said
from ntkpipe.base.progress import note_if_slow

Answer = TypeVar("Answer")

_SCHEDULER_SECONDS = 20  # how long a scheduler may take for an answer
_WAIT_SECONDS = 20.0  # how long to wait for a first worker, where nothing says that one will come
_QUEUE_SECONDS = 600.0  # and where a cluster starts them: they may wait in the queue of a batch system
_WAIT_SETTING = "ntkpipe.wait-for-workers"  # of Dask's configuration: a time that replaces both
_RESTART_SECONDS = 3.0  # how long a nanny takes to start a worker again
_GONE = (OSError, CancelledError, RuntimeError, ClosedClientError)  # what Dask says of a scheduler that is gone


def why_silent(error: BaseException, seconds: float) -> str:
    """Why a scheduler does not answer."""
    while error.__cause__ is not None:  # such as a refused connection, or a name that nobody knows
        error = error.__cause__
    is_late = isinstance(error, TimeoutError | CancelledError | asyncio.CancelledError)
    return f"no answer in {seconds:.0f} seconds" if is_late else said(error)


def ask_all(client: object, ask: Callable[[], dict[str, Answer]]) -> dict[str, Answer]:
    """Answers of all workers by address; every way onto a cluster begins with this.

    Workers that die of being asked once may do so by chance, such as after a run that took too much memory.
    """
    before, found = require_workers(client), ask()
    if dead := before - found.keys():
        sleep(_RESTART_SECONDS)
        before, found = require_workers(client), ask()
        if again := before - found.keys():
            raise ClusterError(
                f"{len(again)} of {len(before)} workers died while they were asked what they are, {min(again)} among "
                f"them, as {len(dead)} did just before ({min(dead)}): look at their logs there. `import ntkpipe` may "
                "end the process, or it has too little memory"
            )
    return found


def require_workers(client: object) -> set[str]:
    """Addresses of running workers, once there are any; the scheduler must answer, and have this package.

    It unpickles tasks, but does not need torch.
    """
    if not isinstance(client, Client) or client.asynchronous:
        raise ConfigError(
            f"client={client!r}; needed a distributed.Client with asynchronous=False, such as "
            "Client('tcp://host:8786') or Client(cluster)"
        )
    if client.status not in {"running", "connecting"}:
        raise ClusterError(f"the client is {client.status}; make a new one, as Client('tcp://host:8786')")
    address, here = address_of(client), version("ntkpipe")
    try:
        with note_if_slow(f"{address} does not answer yet; waiting up to {_SCHEDULER_SECONDS} seconds"):
            found = _running(client)
        found = found or _first(client, address)
    except ClusterError:
        raise
    except _GONE as error:
        raise ClusterError(
            f"cannot use the scheduler at {address}: {why_silent(error, _SCHEDULER_SECONDS)}. Is it running "
            "(`dask scheduler`), and reachable from here? Make a new client once it is"
        ) from error
    try:
        there = client.run_on_scheduler(_version)
    except Exception as error:  # whatever happens there comes back as it is
        raise ClusterError(
            f"the scheduler at {address} cannot import ntkpipe ({error!r}); install ntkpipe[cluster] there"
        ) from error
    if there != here:
        raise ClusterError(f"the scheduler at {address} has ntkpipe {there}, this process {here}; install the same")
    return found


def address_of(client: Client) -> str:
    """Address of the client's scheduler."""
    return str(getattr(client.scheduler, "address", None))


def _version() -> str:
    """Version of this package at the scheduler, which must import this module for it."""
    return version("ntkpipe")


def _running(client: Client) -> set[str]:
    # Not ``client.scheduler_info``, which gives what it knew where the scheduler is gone.
    scheduler: Any = client.scheduler
    workers = client.sync(scheduler.identity, n_workers=-1, callback_timeout=_SCHEDULER_SECONDS)["workers"]
    return {address for address, each in workers.items() if each["status"] == "running"}


def _first(client: Client, address: str) -> set[str]:
    """Wait for workers, with a word."""
    given, cluster = dask.config.get(_WAIT_SETTING, None), client.cluster
    is_scaling = bool(getattr(cluster, "requested", None) or getattr(cluster, "_adaptive", None))
    seconds = parse_timedelta(given) if given else _QUEUE_SECONDS if is_scaling else _WAIT_SECONDS
    start_one = f"`dask worker {address} --nthreads 1`"
    waiting = f"{address} has no workers yet; waiting up to {seconds:.0f} seconds for one ({start_one} starts one)"
    deadline = monotonic() + seconds
    # A cluster that adapts starts workers where there is something to do.
    wanted = client.submit(abs, 0, key=f"ntkpipe-wanted-{uuid4().hex}", pure=False)
    try:
        with note_if_slow(waiting, after=0):
            while not (found := _running(client)):
                if monotonic() > deadline:
                    raise ClusterError(
                        f"no worker joined {address} in {seconds:.0f} seconds; start some with {start_one}, and look "
                        "at the logs of those that you started. Where they wait in a queue, set "
                        "DASK_NTKPIPE__WAIT_FOR_WORKERS='10 minutes' in the environment, or in Python call "
                        "client.wait_for_workers(1) first"
                    )
                sleep(0.2)
    finally:
        wanted.release()
    return found
