"""The workers of a cluster that own the shards of a matrix: who is there, what is asked of them, and who is lost."""

import contextlib
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from time import monotonic
from typing import Any
from uuid import uuid4

from distributed import Client, Future, KilledWorker
from distributed.comm.core import CommClosedError

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ClusterError, ConfigError, NtkpipeError, ResourceError
from ntkpipe.base.operator import Work, digest_of
from ntkpipe.base.resources import format_bytes
from ntkpipe.executors import connect as cluster
from ntkpipe.operators.on_dask import shard_holder as holding
from ntkpipe.operators.on_dask.shard_holder import Holder, Report
from ntkpipe.operators.reading import buffer_bytes
from ntkpipe.operators.shards import Stopped, share_out
from ntkpipe.operators.tiles import TileSource, cut_shards

# Of a worker's limit; from 70 % on Dask writes what it has to disk, at 80 % it lets it wait, at 95 % it ends it.
SHARE_OF_LIMIT = 0.6
_SHARE_OF_FREE = 0.5
# Of what is left beside tiles in use; the rest is for blocks and products.
_SHARE_OF_TILES = 0.75
_POLL_SECONDS = 1.0
# A worker that Dask has let wait for lack of memory is waited for.
_PAUSED_SECONDS = 30.0
# For a scheduler, or a worker that does tasks.
_WAIT_SECONDS = 600.0
_FETCHERS = 64

# What says that a worker, or the scheduler, is gone, or that what a task needs was lost with one.
_LOST = (KilledWorker, CancelledError, CommClosedError, Stopped)


@dataclass
class Member:
    """A worker that owns shards."""

    report: Report  # what it is
    holder: "Future[Holder]"  # its tiles, in its memory
    threads: int  # that it works with
    cache_bytes: int  # what it may keep
    # Tiles that it kept when it last answered, by the rows of the leading block whose shards hold them
    num_kept: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """Whom a task is for, and of which shards."""

    address: str  # address, member: the worker; no member where it is only to become one
    member: Member | None = None
    shards: tuple[int, ...] = ()  # numbers


class Crew:
    """Workers that hold tiles of one matrix."""

    def __init__(
        self,
        client: Client,
        source: TileSource,
        *,
        memory_limit: int | None = None,
        cache_bytes: int | None = None,
        threads: int | None = None,
    ) -> None:
        for name, value, low in (("memory_limit", memory_limit, 1), ("cache_bytes", cache_bytes, 0)):
            if value is not None:
                check_number(name, value, low=low)
        if threads is not None:
            check_number("threads", threads, low=1)
        cluster.require_workers(client)
        cluster.require_package(client)
        self.client = client
        self.source = source
        self.members: dict[str, Member] = {}
        self.work = Work()
        self._options = memory_limit, cache_bytes, threads
        self._digest = digest_of(source.read((0, 0), None))
        self._owners: dict[int, dict[int, str]] = {}  # of shards, by rows of the leading block
        self._paused: dict[str, float] = {}
        self._looked_at = -_POLL_SECONDS
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="ntkpipe-fetcher")
        weakref.finalize(self, self._fetchers.shutdown, wait=False)
        self.gather(len(cut_shards(source.grid, source.grid.shape[0])))

    def gather(self, most: int, *, anew: bool = False) -> None:
        """Take in workers that have come, at least one and at most ``most``, and forget those that are gone.

        Who is there is looked at once a second, or ``anew``.
        """
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
                cluster.require_workers(self.client)
            if self.client.status not in {"connecting", "running"} or monotonic() > deadline:
                raise ClusterError(
                    "the cluster is lost: no worker can be asked for products; start it again, and go on from a "
                    "checkpoint if there is one"
                )
            threading.Event().wait(_POLL_SECONDS)

    def alive(self) -> list[str]:
        """Addresses of the workers that do tasks, those of different hosts first."""
        found = self.client.scheduler_info(n_workers=-1)["workers"]
        self._looked_at = monotonic()
        status = {address: each["status"] for address, each in found.items()}
        self._paused = {
            address: self._paused.get(address, monotonic()) for address, now in status.items() if now == "paused"
        }
        waited_for = {address for address, since in self._paused.items() if monotonic() - since < _PAUSED_SECONDS}
        alive = [a for a, now in status.items() if now == "running" or (a in waited_for and a in self.members)]
        seen: Counter[str] = Counter()
        ranks = {}
        for address in alive:
            host = found[address]["host"]
            ranks[address] = seen[host]
            seen[host] += 1
        return sorted(alive, key=lambda address: ranks[address])

    def _open(self, addresses: list[str]) -> None:
        """Let workers say what they are and whether they reach the tiles; one that dies meanwhile is left out."""
        holders, asked = {}, {}
        for address in addresses:
            holders[address] = self._send_source(address)
            asked[self.submit(address, "report", holding.report, holders[address])] = Asked(address)
        reports = {who.address: found for who, found in self.outcomes(asked) if not isinstance(found, BaseException)}
        hosts = Counter(each.host for each in reports.values())
        for address, found in reports.items():
            self._check(address, found)
            self.members[address] = self._hire(found, holders[address], hosts[found.host])

    def _send_source(self, address: str) -> "Future[Holder]":
        try:
            return self.submit(address, "open", holding.open_holder, self.source)
        except TypeError as error:  # what Dask makes of whatever goes wrong
            reason: BaseException = error
            while reason.__cause__ or reason.__context__:
                reason = reason.__cause__ or reason.__context__ or reason
            raise ConfigError(f"tiles cannot be sent to workers: {reason}") from error

    def _check(self, address: str, found: Report) -> None:
        here, where = version("ntkpipe"), f"the worker {address} on {found.host}"
        if found.version != here:
            raise ClusterError(f"{where} has ntkpipe {found.version}, this process {here}; install the same")
        if found.problem:
            raise ClusterError(
                f"{where} does not reach the matrix: {found.problem}. It must be at the same path on a disk that all "
                "workers share, or a URL of an object store with credentials in every worker's environment"
            )
        if found.digest != self._digest:
            raise ClusterError(f"{where} reads another first tile than this process: another disk at the same path?")

    def _hire(self, found: Report, holder: "Future[Holder]", on_host: int) -> Member:
        memory_limit, cache_bytes, threads = self._options
        threads = threads or found.threads
        if memory_limit is None and found.memory_limit:
            memory_limit = int(SHARE_OF_LIMIT * found.memory_limit)
        elif memory_limit is None:
            memory_limit = found.base_memory + int(_SHARE_OF_FREE * found.available_memory / on_host)
        room = memory_limit - found.base_memory - buffer_bytes(self.source, threads)
        if room < 0 and cache_bytes is None:
            raise ResourceError(
                f"a worker on {found.host} may have {format_bytes(memory_limit)} and has "
                f"{format_bytes(found.base_memory)}; tiles in use by its {threads} threads need "
                f"{format_bytes(buffer_bytes(self.source, threads))}. Give workers more memory, or threads=1"
            )
        return Member(found, holder, threads, int(_SHARE_OF_TILES * room) if cache_bytes is None else cache_bytes)

    def submit(self, address: str, name: str, function: Any, *arguments: Any) -> "Future[Any]":
        """A task for one worker and for no other."""
        return self.client.submit(
            function,
            *arguments,
            key=f"ntkpipe-{name}-{uuid4().hex}",
            workers=[address],
            allow_other_workers=False,
            retries=0,
            pure=False,
        )

    def outcomes(self, asked: dict["Future[Any]", Asked]) -> Iterator[tuple[Asked, Any]]:
        """What comes of tasks as they end, those that are added meanwhile too."""
        events: queue.SimpleQueue[tuple[Future[Any], Any]] = queue.SimpleQueue()
        followed: set[Future[Any]] = set()
        while asked:
            for future in asked.keys() - followed:
                followed.add(future)
                self._fetchers.submit(_fetch, future, events)
            try:
                future, found = events.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                for gone in self._gone(asked):
                    who = asked.pop(gone)
                    self.cancel([gone])
                    yield who, CommClosedError(f"{who.address} is gone")
                continue
            if future in asked:
                who = asked.pop(future)
                if isinstance(found, BaseException):
                    # The client keeps the error, which keeps every frame that it goes through, and so all there is.
                    self.cancel([future])
                if isinstance(found, BaseException) and not isinstance(found, _LOST):
                    raise found if isinstance(found, NtkpipeError) else _failure(who.address, found)
                yield who, found

    def _gone(self, asked: Mapping["Future[Any]", Asked]) -> list["Future[Any]"]:
        """Tasks of workers that are not there any more: Dask would wait for another one at their address."""
        try:
            there = self.alive()
        except (CommClosedError, OSError):  # futures say so if the scheduler does not come back
            return []
        return [future for future, who in asked.items() if who.address not in there]

    def cancel(self, futures: Iterable["Future[Any]"]) -> None:
        """Tell workers to leave what they are doing."""
        # A client that is closed, or closes this moment, has cancelled them.
        with contextlib.suppress(CommClosedError, OSError, CancelledError, RuntimeError):
            self.client.cancel(list(futures), force=True, reason="nobody waits for it")

    def owners(self, num_rows: int, numbers: Iterable[int]) -> dict[str, tuple[int, ...]]:
        """Shards of each member, moved where members have come or gone."""
        known = self._owners.get(num_rows, {})
        loads = {address: member.threads for address, member in self.members.items()}
        self._owners[num_rows] = share_out(list(numbers), loads, known)
        return {address: self.owned(num_rows, address) for address in self.members}

    def owned(self, num_rows: int, address: str) -> tuple[int, ...]:
        """Shards of one member."""
        return tuple(number for number, owner in self._owners[num_rows].items() if owner == address)

    def forget(self, address: str, member: Member | None) -> None:
        """Let go of a member; if it is there it will be asked anew what it is."""
        if member is not None and self.members.get(address) is member:
            del self.members[address]
            self.cancel([member.holder])
        self._looked_at = -_POLL_SECONDS

    def close(self) -> None:
        """Free the memory of the members."""
        members, self.members = self.members, {}
        asked = {
            self.submit(address, "close", holding.close_holder, member.holder): Asked(address)
            for address, member in members.items()
        }
        with contextlib.suppress(CommClosedError, OSError, ClusterError):
            for _ in self.outcomes(asked):
                pass
        self.cancel(member.holder for member in members.values())


def _fetch(future: "Future[Any]", events: "queue.SimpleQueue[tuple[Future[Any], Any]]") -> None:
    """Bring what a task returns, whenever it ends; a thread of its own lets others arrive meanwhile."""
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
