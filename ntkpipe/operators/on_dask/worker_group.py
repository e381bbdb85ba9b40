"""The workers of a cluster that own the shards of a matrix: who is a member, and what each of them may hold."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from uuid import uuid4

from distributed import Client, Future

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError, ResourceError
from ntkpipe.base.operator import Work, digest_of
from ntkpipe.base.resources import format_bytes
from ntkpipe.executors.connect import require_workers
from ntkpipe.executors.pool import POLL_SECONDS, Pool, Report
from ntkpipe.operators.on_dask.shard_worker import ShardWorker, compare_first_tile
from ntkpipe.operators.reading import buffer_bytes
from ntkpipe.operators.shards import share_out
from ntkpipe.operators.tiles import TileSource, cut_shards

# Share of a worker's limit; from 70 % on Dask writes its data to disk, at 80 % it pauses it, at 95 % it ends it.
SHARE_OF_LIMIT = 0.6
_SHARE_OF_FREE = 0.5
_SHARE_OF_TILES = 0.75  # cached tiles' share of what is left beside tiles in use; the rest is for blocks and products
_WAIT_SECONDS = 600.0  # how long to wait for a scheduler, or for any worker that runs tasks


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
        self.client = client
        self._pool: Pool[None] = Pool(client)
        self.source = source
        self.members: dict[str, WorkerHandle] = {}  # by address
        self.work = Work()
        self._options = worker_bytes, cache_bytes, threads
        self._digest = digest_of(source.read((0, 0), None))
        self._owners: dict[int | None, dict[int, str]] = {}  # address by shard, by rows of the leading block
        self._looked_at = -POLL_SECONDS
        self.gather(len(cut_shards(source.grid, source.grid.shape[0])))

    def gather(self, most: int, *, anew: bool = False) -> None:
        """Admit workers that have joined, up to ``most``, and forget those that are gone; wait until there is one."""
        # The scheduler is asked at most once a second, except ``anew``.
        if self.members and not anew and monotonic() - self._looked_at < POLL_SECONDS:
            return
        deadline = monotonic() + _WAIT_SECONDS
        while True:
            with contextlib.suppress(OSError):  # the scheduler may come back
                alive = self._pool.alive(self.members)
                for address in self.members.keys() - alive:
                    self.forget(self.members[address])
                new = [address for address in alive if address not in self.members]
                self._admit(new[: max(0, most - len(self.members))])
                self._looked_at = monotonic()
                if self.members:
                    return
                require_workers(self.client)
            self._pool.wait(deadline)

    def _admit(self, addresses: list[str]) -> None:
        """Admit workers that reach the tiles; one that dies meanwhile is left out."""
        if not addresses:
            return
        question = compare_first_tile, self.source, self._digest
        try:
            reports = self._pool.require_shared("the matrix", *question, workers=addresses)
        except TypeError as error:  # of pickling
            raise ConfigError(f"tiles cannot be sent to workers: {error}") from error
        hosts = Counter(each.host for each in reports.values())
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
