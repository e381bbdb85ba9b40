"""The workers of a Dask cluster as one pool: what they are asked, tasks for them, and who is lost."""

import asyncio
import contextlib
import queue
import socket
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from math import inf
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Generic, TypeVar
from uuid import uuid4

from distributed import Client, Future, KilledWorker, Worker
from distributed.client import ClosedClientError
from distributed.comm.core import CommClosedError
from distributed.core import Status

from ntkpipe.base.errors import ClusterError, NtkpipeError, ResourceError
from ntkpipe.base.paths import said
from ntkpipe.base.progress import note_if_slow
from ntkpipe.base.resources import available_memory, local_disk_room, process_memory

Task = TypeVar("Task")
Found = TypeVar("Found")

POLL_SECONDS = 1.0
_SAY_SECONDS = 4.0  # without workers, after which that is said
WAIT_SECONDS = 600.0  # without workers, or without a scheduler, that end a run
_HOST_SECONDS = 20  # how long a worker may take to name its host, for which it needs nothing of this package
_REPORT_SECONDS = 600  # and for its report: many may import torch from one disk
_PAUSED_SECONDS = 30.0  # how long to wait for a worker that Dask has paused for lack of memory
_SHARED_HINT = (
    "It must be at the same path on a disk that all of them share, or a URL of an object store with credentials in "
    "every worker's environment"
)
# Errors that say that a worker or the scheduler is gone, or that what a task needs was lost with one.
_LOST = (KilledWorker, CancelledError, CommClosedError)


@dataclass(frozen=True)
class Report(Generic[Found]):
    """What a worker has, and its answer to a question."""

    host: str
    version: str  # of this package
    threads: int  # that Dask gave it
    memory_limit: int | None  # bytes that it may use before its Dask ends it; none if nothing does
    base_memory: int  # bytes that it holds now
    available_memory: int  # free bytes of its host
    folder: Path  # where it and other workers of its host may leave files
    scratch_bytes: int  # free bytes there; zero where that is no disk of the host
    found: Found


class WorkerPool(Generic[Task]):
    """Workers of a client's cluster, and the tasks there that a driver waits for."""

    def __init__(self, client: Client, returned: tuple[type[Exception], ...] = ()) -> None:
        self.client = client
        self._returned = _LOST + returned  # errors of tasks that are given to the caller; others are raised
        self._token = uuid4().hex[:16]
        self._count = count()
        self._paused: dict[str, float] = {}  # since when, by address
        self._pending: dict[Future[Any], tuple[Task, str]] = {}  # with the address of a worker, if it is for one
        self._alone_since, self._said_at = inf, -inf
        self._ended: queue.SimpleQueue[tuple[Future[Any], Any] | None] = queue.SimpleQueue()

    def ask(
        self, question: Callable[..., Found], *arguments: Any, workers: list[str] | None = None
    ) -> dict[str, Report[Found]]:
        """Call a function in workers, in all if none are given, busy or not; those that die meanwhile are left out."""
        options: Any = {"on_error": "return", "callback_timeout": _REPORT_SECONDS}
        with note_if_slow("workers are asked what they have, and have not answered yet"):
            hosts = self._hosts(workers or self._there())
            try:
                run = self.client.run
                replies = self.client.sync(run, _report, question, arguments, workers=list(hosts), **options)
            except TimeoutError:
                raise ClusterError(
                    f"workers have not answered in {_REPORT_SECONDS} seconds; look at their logs"
                ) from None
        failed = {address: reply for address, reply in replies.items() if isinstance(reply, BaseException)}
        # Dask reports a worker that no longer answers by an OSError, maybe before the scheduler misses it.
        if any(isinstance(error, OSError) for error in failed.values()):
            sleep(POLL_SECONDS)
            there = self.client.nthreads()
            failed = {address: e for address, e in failed.items() if address in there or not isinstance(e, OSError)}
        if failed:
            names = ", ".join(sorted({hosts[address] for address in failed}))
            address, error = next(iter(failed.items()))
            raise _failure(f"{len(failed)} of {len(replies)} workers on {names} fail, the first at {address}", error)
        reports = {address: each for address, each in replies.items() if isinstance(each, Report)}
        here = f"{socket.gethostname()} (this process)", version("ntkpipe")
        if found := differing([here, *((each.host, each.version) for each in reports.values())]):
            raise ClusterError(f"versions of ntkpipe differ: {found}; install the same one everywhere")
        return reports

    def _there(self) -> list[str]:
        """Addresses of all workers, busy or not; some that are about to end never do."""
        info = self.client.scheduler_info(n_workers=-1)["workers"]
        return [address for address, each in info.items() if each["status"] in {"running", "paused"}]

    def _hosts(self, addresses: list[str]) -> dict[str, str]:
        """Names of workers' hosts; raises ClusterError for workers that are there, but do not answer."""

        async def named(address: str) -> Any:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HOST_SECONDS):
                    return (await self.client.run(socket.gethostname, workers=[address], on_error="return"))[address]

        async def all_named() -> list[Any]:
            return await asyncio.gather(*map(named, addresses))

        found = dict(zip(addresses, self.client.sync(all_named), strict=True))
        if silent := [address for address, host in found.items() if host is None]:
            raise ClusterError(
                f"{len(silent)} of {len(found)} workers do not answer in {_HOST_SECONDS} seconds, the first at "
                f"{silent[0]}: its process hangs, or its network does. End it there, or start it again"
            )
        return {address: host for address, host in found.items() if isinstance(host, str)}

    def require_shared(
        self, what: str, question: Callable[..., str], *arguments: Any, workers: list[str] | None = None
    ) -> dict[str, Report[str]]:
        """Ask why workers cannot use stored data; an empty answer says that they can."""
        return self.require(f"do not reach {what}", _SHARED_HINT, question, *arguments, workers=workers)

    def require(
        self, what: str, hint: str, question: Callable[..., str], *arguments: Any, workers: list[str] | None = None
    ) -> dict[str, Report[str]]:
        """Ask why workers cannot do something; an empty answer says that they can."""
        reports = self.ask(question, *arguments, workers=workers)
        problems = [f"{address} on {each.host}: {each.found}" for address, each in reports.items() if each.found]
        if problems:
            found = "; ".join(problems[:5]).rstrip(".")
            raise ClusterError(f"{len(problems)} of {len(reports)} workers {what}: {found}. {hint}")
        return reports

    def alive(self, known: Collection[str]) -> list[str]:
        """Workers that run tasks, interleaved by host; those ``known`` also while they are paused for a moment."""
        info = self.client.scheduler_info(n_workers=-1)["workers"]
        now = monotonic()
        status = {address: each["status"] for address, each in info.items()}
        self._paused = {a: self._paused.get(a, now) for a, state in status.items() if state == "paused"}
        waited_for = {address for address, since in self._paused.items() if now - since < _PAUSED_SECONDS}
        alive = [a for a, state in status.items() if state == "running" or (a in waited_for and a in known)]
        places: defaultdict[str, Iterator[int]] = defaultdict(count)
        ranks = {address: next(places[info[address]["host"]]) for address in alive}
        return sorted(alive, key=lambda address: ranks[address])

    def seen(self, is_there: bool) -> bool:
        """Note whether there are workers: says so if there are none for a while, and ends where none will come."""
        now = monotonic()
        if is_there:
            self._alone_since = inf
            return True
        self._alone_since = min(self._alone_since, now)
        if self.client.status not in {"connecting", "running"} or now - self._alone_since > WAIT_SECONDS:
            raise ClusterError(
                "the cluster is lost: its scheduler is gone and did not come back in time, or no worker runs tasks. "
                "Every finished tile is stored; once it is there again, the same call or command goes on from there, "
                "and a solver from its checkpoint if there is one"
            )
        if now - max(self._alone_since, self._said_at) > _SAY_SECONDS:
            self._said_at = now
            minutes = f"{WAIT_SECONDS / 60:.0f} minutes"
            print(f"the cluster has no workers; waiting up to {minutes} for some to join", file=sys.stderr, flush=True)
        return False

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[tuple[Task, Any]]:
        """Yield what :meth:`next` finds until nothing is pending, also of tasks that are added meanwhile."""
        while self._pending:
            if (ended := self.next()) is not None:
                yield ended

    def submit(self, name: str, task: Task, function: Callable[..., Any], *arguments: Any, address: str = "") -> None:
        """Submit a task, to one worker and no other if an address is given; others run in the order of submission."""
        number = next(self._count)
        key = (f"{name}-{self._token}", address or str(task), number)
        place = {"workers": [address], "allow_other_workers": False} if address else {"priority": -number}
        future = self.client.submit(function, *arguments, key=key, pure=False, **place)
        self._pending[future] = task, address
        assert self.client.loop is not None
        # Results are fetched side by side: one after the other they would keep hundreds of workers waiting.
        self.client.loop.add_callback(_fetch, future, self._ended)

    def next(self) -> tuple[Task, Any] | None:
        """Wait for the end of a task, and return it with its result or loss; none after a while or a :meth:`wake`."""
        try:
            ended = self._ended.get(timeout=POLL_SECONDS)
        except queue.Empty:
            self._miss()
            return None
        if ended is None or ended[0] not in self._pending:
            return None
        future, found = ended
        task, address = self._pending.pop(future)
        if isinstance(found, BaseException):
            # The client keeps the error, and with it every frame that it went through and all their data.
            self._cancel([future])
            if not isinstance(found, self._returned):
                is_clear = isinstance(found, NtkpipeError) or not (address or _lacks_module(found))
                who = f"the worker {address}" if address else "a worker"
                raise found if is_clear else _failure(f"{who} fails", found)
        return task, found

    def wake(self) -> None:
        """Let :meth:`next` return now."""
        self._ended.put(None)

    def _miss(self) -> None:
        """End tasks of workers that have left, since Dask would wait for others at their addresses; or all."""
        is_over = self.client.status not in {"connecting", "running"}
        pinned = {address for _, address in self._pending.values() if address}
        with contextlib.suppress(OSError):  # tasks say so if the scheduler does not come back
            alive = self.alive(pinned) if pinned and not is_over else ()
            for future, (_, address) in self._pending.items():
                if is_over or (address and address not in alive):
                    self._ended.put((future, CommClosedError(f"{address or 'the client'} is gone")))

    def drop(self) -> list[Task]:
        """Cancel and return what is pending."""
        dropped, self._pending = self._pending, {}
        self._cancel(list(dropped))
        return [task for task, _ in dropped.values()]

    def _cancel(self, futures: list["Future[Any]"]) -> None:
        # A client that is closed, or closes this moment, has cancelled them.
        with contextlib.suppress(OSError, CancelledError, RuntimeError, ClosedClientError):
            if futures:
                self.client.cancel(futures, force=True, reason="nobody waits for it")


async def _fetch(future: "Future[Any]", ended: "queue.SimpleQueue[tuple[Future[Any], Any] | None]") -> None:
    try:
        ended.put((future, await future))
    except asyncio.CancelledError:
        ended.put((future, CommClosedError("the client is closed")))
    except BaseException as error:  # noqa: BLE001 - carried to the caller's thread and raised there
        ended.put((future, error))


def _failure(start: str, error: BaseException) -> NtkpipeError:
    """An error of a worker as one that says what to do there."""
    if isinstance(error, MemoryError):
        return ResourceError(f"{start}: it has no memory left ({said(error)}); give it more")
    hint = ". Install ntkpipe[compute,cluster] there, in the version that is used here" if _lacks_module(error) else ""
    # Dask gives an error that the client could not unpickle, or had no class for, as text.
    failure = ClusterError(f"{start}: {error if type(error) is Exception else repr(error)}{hint}")
    failure.__cause__ = error
    return failure


def _lacks_module(error: BaseException) -> bool:
    return isinstance(error, ModuleNotFoundError | AttributeError) or (
        type(error) is Exception and str(error).startswith(("ModuleNotFoundError", "AttributeError"))
    )


def differing(values: Iterable[tuple[str, str]]) -> str:
    """``2.13 on a, b; 2.12 on c`` if the values of (host, value) differ, else an empty text."""
    hosts: defaultdict[str, set[str]] = defaultdict(set)
    for host, value in values:
        hosts[value].add(host)
    if len(hosts) == 1:
        return ""
    return "; ".join(f"{value} on {', '.join(sorted(names))}" for value, names in sorted(hosts.items()))


# What follows runs in a worker.


def _report(
    question: Callable[..., Found], arguments: tuple[Any, ...], dask_worker: Worker | None = None
) -> Report[Found]:
    """Report of this worker; Dask fills in the last argument by its name."""
    assert dask_worker is not None
    found, folder = question(*arguments), shared_folder(dask_worker)
    return Report(
        host=socket.gethostname(),
        version=version("ntkpipe"),
        threads=dask_worker.state.nthreads,
        memory_limit=dask_worker.memory_manager.memory_limit,
        base_memory=process_memory(),
        available_memory=available_memory(),
        folder=folder,
        scratch_bytes=local_disk_room(folder),
        found=found,
    )


def shared_folder(worker: Any) -> Path:
    """The folder in which workers of this host have theirs."""
    return Path(worker.local_directory).parent


def is_cancelled(worker: Any, task: Any) -> bool:
    """Whether nobody waits for a task of this worker any more."""
    state = worker.state.tasks.get(task)
    return state is None or state.state == "cancelled"


def is_leaving(worker: Any) -> bool:
    """Whether this worker cannot finish its tasks, since it is about to close."""
    return worker.status in (Status.closing, Status.closing_gracefully, Status.closed)


@contextlib.contextmanager
def without_frames() -> Iterator[None]:
    """Clear the frames of an error; Dask keeps it and their memory, and a worker paused for that would stay so."""
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
