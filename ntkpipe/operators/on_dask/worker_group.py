"""The workers of a cluster that own the shards of a matrix: who is there, tasks for them, and who is lost."""

import contextlib
import queue
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count
from time import monotonic
from typing import Any
from uuid import uuid4

from distributed import Client, Future, KilledWorker
from distributed.comm.core import CommClosedError

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ClusterError, ConfigError, NtkpipeError, ResourceError
from ntkpipe.base.operator import Work, digest_of
from ntkpipe.base.resources import format_bytes
from ntkpipe.executors.connect import require_package, require_workers
from ntkpipe.operators.on_dask.shard_worker import ShardWorker, WorkerReport
from ntkpipe.operators.reading import buffer_bytes
from ntkpipe.operators.shards import PassStopped, share_out
from ntkpipe.operators.tiles import TileSource, cut_shards

# Share of a worker's limit; from 70 % on Dask writes its data to disk, at 80 % it pauses it, at 95 % it ends it.
SHARE_OF_LIMIT = 0.6
_SHARE_OF_FREE = 0.5
_SHARE_OF_TILES = 0.75  # cached tiles' share of what is left beside tiles in use; the rest is for blocks and products
_POLL_SECONDS = 1.0
_PAUSED_SECONDS = 30.0  # how long to wait for a worker that Dask has paused for lack of memory
_WAIT_SECONDS = 600.0  # how long to wait for a scheduler, or for any worker that runs tasks
_FETCHERS = 64

# Errors that say that a worker or the scheduler is gone, or that what a task needs was lost with one.
_LOST = (KilledWorker, CancelledError, CommClosedError, PassStopped)


@dataclass
class WorkerHandle:
    """The driver's view of a worker that owns shards."""

    report: WorkerReport
    shard_worker: "Future[ShardWorker]"  # in the memory of the worker
    threads: int  # that multiply
    cache_bytes: int  # for tiles that it owns
    num_kept: Mapping[int, int] = field(default_factory=dict)  # of its last :class:`PassReply`


@dataclass(frozen=True)
class WorkerTask:
    """Which worker a task is for, and which shards it uses."""

    address: str
    handle: WorkerHandle | None = None  # none while the worker is not yet a member
    shards: tuple[int, ...] = ()


class WorkerGroup:
    """Workers that hold the tiles of one matrix."""

    def __init__(
        self,
        client: Client,
        source: TileSource,
        *,
        worker_bytes: int | None = None,
        cache_bytes: int | None = None,
        threads: int | None = None,
    ) -> None:
        given = (("memory_limit", worker_bytes, 1), ("cache_bytes", cache_bytes, 0), ("threads", threads, 1))
        for name, value, low in given:
            if value is not None:
                check_number(name, value, low=low)
        require_workers(client)
        require_package(client)
        self.client = client
        self.source = source
        self.members: dict[str, WorkerHandle] = {}  # by address
        self.work = Work()
        self._options = worker_bytes, cache_bytes, threads
        self._digest = digest_of(source.read((0, 0), None))
        self._owners: dict[int, dict[int, str]] = {}  # address by shard, by rows of the leading block
        self._paused: dict[str, float] = {}  # since when, by address
        self._looked_at = -_POLL_SECONDS
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="ntkpipe-fetcher")
        weakref.finalize(self, self._fetchers.shutdown, wait=False)
        self.gather(len(cut_shards(source.grid, source.grid.shape[0])))

    def gather(self, most: int, *, anew: bool = False) -> None:
        """Admit workers that have joined, up to ``most``, and forget those that are gone; wait until there is one."""
        # The scheduler is asked at most once a second, except ``anew``.
        if self.members and not anew and monotonic() - self._looked_at < _POLL_SECONDS:
            return
        deadline = monotonic() + _WAIT_SECONDS
        while True:
            alive: list[str] = []
            with contextlib.suppress(CommClosedError, OSError):  # the scheduler may come back
                alive = self.alive()
            for address in self.members.keys() - alive:
                self.forget(address, self.members[address])
            new = [address for address in alive if address not in self.members]
            self._open(new[: max(0, most - len(self.members))])
            if self.members:
                return
            with contextlib.suppress(CommClosedError, OSError):
                require_workers(self.client)
            if self.client.status not in {"connecting", "running"} or monotonic() > deadline:
                raise ClusterError(
                    "the cluster is lost: no worker can be asked for products; start it again, and go on from a "
                    "checkpoint if there is one"
                )
            threading.Event().wait(_POLL_SECONDS)

    def alive(self) -> list[str]:
        """Addresses of the workers that run tasks, interleaved so that the first ones are on different hosts."""
        info = self.client.scheduler_info(n_workers=-1)["workers"]
        now = self._looked_at = monotonic()
        status = {address: each["status"] for address, each in info.items()}
        self._paused = {a: self._paused.get(a, now) for a, state in status.items() if state == "paused"}
        waited_for = {address for address, since in self._paused.items() if now - since < _PAUSED_SECONDS}
        alive = [a for a, state in status.items() if state == "running" or (a in waited_for and a in self.members)]
        places: defaultdict[str, Iterator[int]] = defaultdict(count)
        ranks = {address: next(places[info[address]["host"]]) for address in alive}
        return sorted(alive, key=lambda address: ranks[address])

    def _open(self, addresses: list[str]) -> None:
        """Admit workers that reach the tiles; one that dies meanwhile is left out."""
        shard_workers, pending = {}, {}
        for address in addresses:
            shard_workers[address] = self._send_source(address)
            future = self.submit(address, "report", ShardWorker.report, shard_workers[address])
            pending[future] = WorkerTask(address)
        outcomes = self.outcomes(pending)
        reports = {task.address: found for task, found in outcomes if not isinstance(found, BaseException)}
        hosts = Counter(each.host for each in reports.values())
        for address, report in reports.items():
            self._check(address, report)
            self.members[address] = self._admit(report, shard_workers[address], hosts[report.host])

    def _send_source(self, address: str) -> "Future[ShardWorker]":
        try:
            return self.submit(address, "open", ShardWorker, self.source)
        except TypeError as error:  # Dask raises it for whatever goes wrong
            reason: BaseException = error
            while reason.__cause__ or reason.__context__:
                reason = reason.__cause__ or reason.__context__ or reason
            raise ConfigError(f"tiles cannot be sent to workers: {reason}") from error

    def _check(self, address: str, report: WorkerReport) -> None:
        here, where = version("ntkpipe"), f"the worker {address} on {report.host}"
        if report.version != here:
            raise ClusterError(f"{where} has ntkpipe {report.version}, this process {here}; install the same")
        if report.problem:
            raise ClusterError(
                f"{where} does not reach the matrix: {report.problem}. It must be at the same path on a disk that all "
                "workers share, or a URL of an object store with credentials in every worker's environment"
            )
        if report.digest != self._digest:
            raise ClusterError(f"{where} reads another first tile than this process: another disk at the same path?")

    def _admit(self, report: WorkerReport, shard_worker: "Future[ShardWorker]", num_on_host: int) -> WorkerHandle:
        worker_bytes, cache_bytes, threads = self._options
        threads = threads or report.threads
        if worker_bytes is None and report.memory_limit:
            worker_bytes = int(SHARE_OF_LIMIT * report.memory_limit)
        elif worker_bytes is None:
            worker_bytes = report.base_memory + int(_SHARE_OF_FREE * report.available_memory / num_on_host)
        room = worker_bytes - report.base_memory - buffer_bytes(self.source, threads)
        if room < 0 and cache_bytes is None:
            raise ResourceError(
                f"a worker on {report.host} may have {format_bytes(worker_bytes)} and has "
                f"{format_bytes(report.base_memory)}; tiles in use by its {threads} threads need "
                f"{format_bytes(buffer_bytes(self.source, threads))}. Give workers more memory, or threads=1"
            )
        if cache_bytes is None:
            cache_bytes = int(_SHARE_OF_TILES * room)
        return WorkerHandle(report, shard_worker, threads, cache_bytes)

    def submit(self, address: str, name: str, function: Any, *arguments: Any) -> "Future[Any]":
        """Submit a task to one worker and to no other."""
        key = f"ntkpipe-{name}-{uuid4().hex}"
        return self.client.submit(
            function, *arguments, key=key, workers=[address], allow_other_workers=False, retries=0, pure=False
        )

    def outcomes(self, pending: dict["Future[Any]", WorkerTask]) -> Iterator[tuple[WorkerTask, Any]]:
        """Yield results and losses of tasks as they end, also of tasks that are added meanwhile."""
        events: queue.SimpleQueue[tuple[Future[Any], Any]] = queue.SimpleQueue()
        followed: set[Future[Any]] = set()
        while pending:
            for future in pending.keys() - followed:
                followed.add(future)
                self._fetchers.submit(_fetch, future, events)
            try:
                future, found = events.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                for gone in self._gone(pending):
                    task = pending.pop(gone)
                    self.cancel([gone])
                    yield task, CommClosedError(f"{task.address} is gone")
                continue
            if future in pending:
                task = pending.pop(future)
                if isinstance(found, BaseException):
                    # The client keeps the error, and with it every frame that it went through and all their data.
                    self.cancel([future])
                    if not isinstance(found, _LOST):
                        raise found if isinstance(found, NtkpipeError) else _failure(task.address, found)
                yield task, found

    def _gone(self, pending: Mapping["Future[Any]", WorkerTask]) -> list["Future[Any]"]:
        """Tasks of workers that have left: Dask would wait for another worker at their address."""
        try:
            alive = self.alive()
        except (CommClosedError, OSError):  # futures say so if the scheduler does not come back
            return []
        return [future for future, task in pending.items() if task.address not in alive]

    def cancel(self, futures: Iterable["Future[Any]"]) -> None:
        """Tell workers to abandon tasks."""
        # A client that is closed, or closes this moment, has cancelled them.
        with contextlib.suppress(CommClosedError, OSError, CancelledError, RuntimeError):
            if futures := list(futures):
                self.client.cancel(futures, force=True, reason="nobody waits for it")

    def share(self, num_rows: int, numbers: Iterable[int]) -> None:
        """Share shards out to the members; they move only where members have come or gone."""
        self._owners[num_rows] = share_out(list(numbers), self.threads(), self._owners.get(num_rows, {}))

    def owned(self, num_rows: int, address: str) -> tuple[int, ...]:
        """Shards of one member."""
        return tuple(number for number, owner in self._owners[num_rows].items() if owner == address)

    def threads(self) -> dict[str, int]:
        """Number of threads of each member."""
        return {address: handle.threads for address, handle in self.members.items()}

    def forget(self, address: str, handle: WorkerHandle | None) -> None:
        """Remove a member; if it is still there it will be asked for a new report."""
        if handle is not None and self.members.get(address) is handle:
            del self.members[address]
            self.cancel([handle.shard_worker])
        self._looked_at = -_POLL_SECONDS

    def close(self) -> None:
        """Free the memory of the members."""
        members, self.members = self.members, {}
        pending = {
            self.submit(address, "close", ShardWorker.close, handle.shard_worker): WorkerTask(address)
            for address, handle in members.items()
        }
        with contextlib.suppress(CommClosedError, OSError, ClusterError):
            for _ in self.outcomes(pending):
                pass
        self.cancel(handle.shard_worker for handle in members.values())


def _fetch(future: "Future[Any]", events: "queue.SimpleQueue[tuple[Future[Any], Any]]") -> None:
    """Wait for the result of a task, in a thread of its own so that others can arrive meanwhile."""
    try:
        events.put((future, future.result()))
    except BaseException as error:  # noqa: BLE001 - carried to the caller's thread and raised there
        events.put((future, error))


def _failure(address: str, error: BaseException) -> NtkpipeError:
    if isinstance(error, MemoryError):
        return ResourceError(f"the worker {address} has no memory left for a pass ({error}); give it more")
    missing = isinstance(error, ModuleNotFoundError | AttributeError)
    hint = ". Install what this process has there, ntkpipe[cluster] in the same version" if missing else ""
    failure = ClusterError(f"the worker {address} fails: {error!r}{hint}")
    failure.__cause__ = error
    return failure
