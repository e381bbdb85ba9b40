"""A stored matrix as an operator on the workers of a Dask cluster: each owns shards and runs one task in each pass."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from time import monotonic, perf_counter, sleep
from typing import Any
from uuid import uuid4

import numpy as np
from distributed import Client, Future

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ClusterError, ConfigError, ResourceError
from ntkpipe.base.operator import Operator, Work, digest_of
from ntkpipe.base.paths import said
from ntkpipe.base.resources import format_bytes
from ntkpipe.executors.pool import POLL_SECONDS, Report, WorkerPool
from ntkpipe.executors.preflight import ask_all
from ntkpipe.operators.on_dask.shard_worker import PassReply, PassRequest, ShardWorker, compare_first_tile, run_pass
from ntkpipe.operators.streaming import (
    EntryRequest,
    PairwiseSum,
    PassStopped,
    Shard,
    TiledOperator,
    cut_shards,
    num_blocks_in_use,
)
from ntkpipe.operators.tiles import MatrixTiles, buffer_bytes

# Share of a worker's limit; from 70 % on Dask writes its data to disk, at 80 % it pauses it, at 95 % it ends it.
_SHARE_OF_LIMIT = 0.6
_SHARE_OF_FREE = 0.5
_SHARE_OF_TILES = 0.75  # cached tiles' share of what is left beside tiles in use; the rest is for blocks and products
_MOST_OF_LIMIT = 0.9  # share of what Dask gives a worker; a block that needs more is refused
_SMALL_BLOCK = 2**18  # a block of up to so many bytes goes with each task; a larger one is sent to the workers once
_MOST_LOSSES = 5  # in a pass while no other part arrives


@dataclass(eq=False)
class WorkerHandle:
    """The driver's view of a worker that owns shards."""

    address: str
    report: Report[str]
    shard_worker: "Future[ShardWorker]"  # in the memory of the worker
    threads: int  # that multiply
    cache_bytes: int  # for tiles that it owns
    num_kept: Mapping[int, int] = field(default_factory=dict)  # of its last :class:`PassReply`


class WorkerGroup:
    """Workers that hold the tiles of one matrix."""

    def __init__(
        self,
        client: Client,
        source: MatrixTiles,
        *,
        worker_bytes: int | None = None,
        cache_bytes: int | None = None,
        threads: int | None = None,
    ) -> None:
        given = (("memory_limit", worker_bytes, 1), ("cache_bytes", cache_bytes, 0), ("threads", threads, 1))
        for name, value, low in given:
            if value is not None:
                check_number(name, value, low=low)
        self.client = client
        self._pool: WorkerPool[None] = WorkerPool(client)
        self.source = source
        self.members: dict[str, WorkerHandle] = {}  # by address
        self.work = Work()
        self._options = worker_bytes, cache_bytes, threads
        self._digest = digest_of(source.read((0, 0), None))
        self._owners: dict[int | None, dict[int, str]] = {}  # address by shard, by rows of the leading block
        self._looked_at = -POLL_SECONDS
        self._refused: set[str] = set()  # addresses of workers that cannot read the tiles
        reports = ask_all(client, self._ask)
        most = len(cut_shards(source.grid, source.grid.shape[0]))
        alive = [address for address in self._pool.alive(()) if address in reports]
        self._admit({address: reports[address] for address in alive[:most]})
        self.gather(most)

    def gather(self, most: int, *, anew: bool = False) -> None:
        """Admit workers that have joined, up to ``most``, and forget those that are gone; wait until there is one."""
        # The scheduler is asked at most once a second, except ``anew``.
        if self.members and not anew and monotonic() - self._looked_at < POLL_SECONDS:
            return
        while True:
            with contextlib.suppress(OSError):  # the scheduler may come back
                alive = self._pool.alive(self.members)
                for address in self.members.keys() - alive:
                    self.forget(self.members[address])
                new = [address for address in alive if address not in self.members and address not in self._refused]
                self._admit_late(new[: max(0, most - len(self.members))])
                self._looked_at = monotonic()
            if self._pool.seen(bool(self.members)):
                return
            sleep(POLL_SECONDS)

    def _ask(self, addresses: list[str] | None = None) -> dict[str, Report[str]]:
        try:
            question = compare_first_tile, self.source, self._digest
            return self._pool.require_shared("the matrix", *question, workers=addresses)
        except TypeError as error:  # of pickling
            raise ConfigError(f"tiles cannot be sent to workers: {said(error)}") from error

    def _admit_late(self, addresses: list[str]) -> None:
        """Admit workers that have joined; one that dies meanwhile, or that is of no use beside others, is left out."""
        for address in addresses:
            try:
                self._admit(self._ask([address]))
            except ClusterError as error:
                if not self.members:
                    raise
                self._refused.add(address)
                warnings.warn(f"a worker that joined is not used: {said(error)}", stacklevel=2)

    def _admit(self, reports: Mapping[str, Report[str]]) -> None:
        hosts = Counter(each.host for each in (*reports.values(), *(each.report for each in self.members.values())))
        for address, report in reports.items():
            threads, cache_bytes = self._sizes(report, hosts[report.host])
            key = f"ntkpipe-open-{uuid4().hex}"
            shard_worker = self.client.submit(ShardWorker, self.source, key=key, workers=[address], pure=False)
            self.members[address] = WorkerHandle(address, report, shard_worker, threads, cache_bytes)

    def _sizes(self, report: Report[str], num_on_host: int) -> tuple[int, int]:
        """Threads of a worker, and bytes of the tiles that it may cache."""
        worker_bytes, cache_bytes, threads = self._options
        threads = threads or report.threads
        if worker_bytes is None and report.memory_limit:
            worker_bytes = int(_SHARE_OF_LIMIT * report.memory_limit)
        elif worker_bytes is None:
            worker_bytes = report.base_memory + int(_SHARE_OF_FREE * report.available_memory / num_on_host)
        room = worker_bytes - report.base_memory - buffer_bytes(self.source, threads)
        if room < 0 and cache_bytes is None:
            raise ResourceError(
                f"a worker on {report.host} may have {format_bytes(worker_bytes)} and has "
                f"{format_bytes(report.base_memory)}; tiles in use by its {threads} threads need "
                f"{format_bytes(buffer_bytes(self.source, threads))}. Give workers more memory, or threads=1"
            )
        return threads, int(_SHARE_OF_TILES * room) if cache_bytes is None else cache_bytes

    def share(self, numbers: Iterable[int], num_rows: int | None = None) -> dict[str, tuple[int, ...]]:
        """Share shards out to the members, of a leading block to own; these move only where members come or go."""
        threads = {address: handle.threads for address, handle in self.members.items()}
        owners = share_out(list(numbers), threads, self._owners.get(num_rows, {}))
        if num_rows is not None:
            self._owners[num_rows] = owners
        return {address: tuple(n for n, owner in owners.items() if owner == address) for address in self.members}

    def forget(self, handle: WorkerHandle) -> None:
        """Remove a member; if it is still there it will be asked for a new report."""
        if self.members.get(handle.address) is handle:
            del self.members[handle.address]
        self._looked_at = -POLL_SECONDS

    def close(self) -> None:
        """Free the memory of the members."""
        self.members.clear()


def share_out(numbers: list[int], workers: Mapping[str, int], known: Mapping[int, str]) -> dict[int, str]:
    """Assign shards to workers, given as addresses with numbers of threads: about equally many to each thread."""
    if not set(known.values()) & set(workers):
        slots = [address for address, count in workers.items() for _ in range(count)]
        cuts = [len(numbers) * slot // len(slots) for slot in range(len(slots) + 1)]
        runs = zip(slots, pairwise(cuts), strict=True)
        return {number: address for address, (first, stop) in runs for number in numbers[first:stop]}
    # A shard stays with its known owner where that is still there and not overloaded.
    owners = {number: known[number] for number in numbers if known.get(number) in workers}
    held = Counter(owners.values())

    def load_with_one_more(address: str) -> float:
        return (held[address] + 1) / workers[address]

    for number in numbers:
        if number not in owners:
            owners[number] = min(workers, key=load_with_one_more)
            held[owners[number]] += 1
    while True:
        fullest = max(workers, key=lambda address: held[address] / workers[address])
        emptiest = min(workers, key=load_with_one_more)
        if load_with_one_more(emptiest) >= held[fullest] / workers[fullest]:
            return dict(sorted(owners.items()))
        moved = max(number for number, owner in owners.items() if owner == fullest)
        held[fullest] -= 1
        owners[moved] = emptiest
        held[emptiest] += 1


class WorkersOperator(TiledOperator):
    """A symmetric matrix of tiles, which the workers of a cluster read and cache.

    Every worker owns some of the shards that :class:`ntkpipe.operators.streaming.StreamingOperator` multiplies, caches
    as many of their tiles as its memory holds, and reads the others ahead. A pass is one task for each worker: it adds
    the products of neighbouring shards, and the driver the rest in the same pairs, so results have the bits of the
    operator on one machine, also where a worker dies and others do its part. Workers that join are given shards before
    the next pass. There are 128 shards for 2,048 tiles or more, 16 for 64; threads beyond that have nothing to do.

    Memory of a worker is its tiles, the block, and products of its size: one for each thread and about four more. The
    driver has the block, and one or two products for each worker, which is also what travels.
    """

    def __init__(self, group: WorkerGroup, num_rows: int | None = None) -> None:
        super().__init__(group.source, num_rows or group.source.grid.shape[0])
        self._group = group

    @property
    def num_workers(self) -> int:
        """Number of workers that own shards."""
        return len(self._group.members)

    @property
    def share_kept(self) -> float:
        """Share of the tiles that workers had in memory when they last replied."""
        num_kept = sum(handle.num_kept.get(self.num_rows, 0) for handle in self._group.members.values())
        return num_kept / sum(len(shard.tiles) for shard in self._shards)

    @property
    def work(self) -> Work:
        """See :attr:`Operator.work`; a pass is all tiles of the whole matrix. Lost parts count as done."""
        return self._group.work

    def _leading(self, num_rows: int) -> Operator:
        return WorkersOperator(self._group, num_rows)

    def _multiply(self, block: FloatArray) -> FloatArray:
        total = PairwiseSum()
        for node, part in self._pass(block=block):
            total.add(node, np.require(part, requirements="W"))
        return total.total

    def _measured(self) -> Iterator[Any]:
        return (part for _, part in sorted(self._pass()))

    def _gather(self, request: EntryRequest, values: FloatArray) -> None:
        for _, placed in self._pass(request):
            for where, entries in placed:
                values[where] = entries

    def _pass(self, entries: EntryRequest | None = None, block: FloatArray | None = None) -> Iterator[tuple[Any, Any]]:
        """Yield :attr:`PassReply.results` of all workers, in any order."""
        return _Pass(self._group, self._shards, self.num_rows, entries, block).results()

    def close(self) -> None:
        """See :meth:`Operator.close`."""
        self._group.close()


@dataclass
class _Pass:
    """One pass: its requests to workers, repeated for those that are lost."""

    group: WorkerGroup
    shards: tuple[Shard, ...]
    num_rows: int
    entries: EntryRequest | None
    block: FloatArray | None
    sent: "FloatArray | Future[Any] | None" = None  # the block as it reaches workers
    losses: int = 0

    def __post_init__(self) -> None:
        # Of tasks for a member, with the shards that each uses.
        self.pool: WorkerPool[tuple[WorkerHandle, tuple[int, ...]]] = WorkerPool(self.group.client, (PassStopped,))

    def results(self) -> Iterator[tuple[Any, Any]]:
        """Yield results as they arrive."""
        start = perf_counter()
        try:
            self._send_block()
            self.owned = self.group.share((shard.number for shard in self.shards), self.num_rows)
            self._request(self.owned)
            for (handle, shards), found in self.pool:
                if isinstance(found, PassReply):
                    self.losses = 0
                    self._count(found.num_tiles, found.bytes_read)
                    handle.num_kept = found.num_kept
                    yield from found.results.items()
                else:
                    self._request_again(handle, shards, found)
        finally:
            self.pool.drop()
            self.group.work += Work(seconds=perf_counter() - start)

    def _request(self, shares: dict[str, tuple[int, ...]]) -> None:
        name = "entries" if self.entries is not None else "product" if self.block is not None else "measure"
        for address, shards in shares.items():
            if shards:
                handle, owned = self.group.members[address], self.owned.get(address, ())
                self._require_room(handle)
                request = PassRequest(self.num_rows, shards, owned, handle.cache_bytes, handle.threads, self.entries)
                arguments = handle.shard_worker, request, self.sent
                self.pool.submit(f"ntkpipe-{name}", (handle, shards), run_pass, *arguments, address=address)

    def _require_room(self, handle: WorkerHandle) -> None:
        """Check that a block fits a worker; cached tiles give way to a large one, for good."""
        limit = handle.report.memory_limit
        if self.block is None or not limit:
            return
        needed = (1 + num_blocks_in_use(handle.threads, len(self.shards))) * self.block.nbytes
        free = limit - handle.report.base_memory - buffer_bytes(self.group.source, handle.threads)
        if needed > free - (1 - _MOST_OF_LIMIT) * limit:
            raise ResourceError(
                f"a block of {self.block.shape[1]} columns needs {format_bytes(needed)} of {handle.address}, which has "
                f"{format_bytes(free)}; give fewer columns at a time, more memory or more workers"
            )
        handle.cache_bytes = max(0, min(handle.cache_bytes, int(free - (1 - _SHARE_OF_LIMIT) * limit - needed)))

    def _send_block(self) -> None:
        """Gather the members, and send them a large block before its tasks."""
        group = self.group
        group.gather(len(self.shards))
        self.sent = self.block
        if self.block is None or self.block.nbytes <= _SMALL_BLOCK:
            return
        for attempt in range(_MOST_LOSSES):
            try:
                # Hashed by its content, an equal block of another pass would be the same to Dask, and go with it.
                self.sent = group.client.scatter(self.block, workers=list(group.members), broadcast=True, hash=False)
            except Exception as error:  # Dask says in many ways that a worker dies this moment
                if attempt == _MOST_LOSSES - 1:
                    raise ClusterError(f"a block does not reach the workers: {error!r}; look at their logs") from error
                group.gather(len(self.shards), anew=True)
            else:
                return

    def _request_again(self, handle: WorkerHandle, lost: tuple[int, ...], reason: BaseException) -> None:
        """Request the shards of a lost worker from others; they own them only from the next pass on."""
        group, grid = self.group, self.group.source.grid
        tiles = (tile for number in lost for tile in self.shards[number].tiles)
        num_tiles = sum(self.entries is None or self.entries.touches(tile, grid) for tile in tiles)
        self._count(num_tiles, num_tiles * group.source.tile_bytes)
        self.losses += 1
        if self.losses > _MOST_LOSSES:
            raise ClusterError(
                f"workers were lost {self.losses} times while no part of a pass arrived, {handle.address} the last "
                f"({reason}). Look at their logs; if they were killed for their memory, give them more, or "
                "cache_bytes or blocks of fewer columns"
            ) from reason
        group.forget(handle)
        self._send_block()
        self._request(group.share(lost))

    def _count(self, num_tiles: int, bytes_read: int) -> None:
        self.group.work += Work(num_tiles / self.group.source.grid.num_tiles, bytes_read)
