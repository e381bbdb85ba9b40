"""A stored matrix as an operator on the workers of a Dask cluster: each owns shards of tiles and is asked once a pass.

What solvers know is with the driver, and an order holds all that a worker needs: with a worker one part of one pass is
lost, which is asked for again elsewhere.
"""

from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import ClusterError, ResourceError
from ntkpipe.base.operator import Operator, Statistics, Work
from ntkpipe.base.resources import format_bytes
from ntkpipe.operators.on_dask import shard_holder as holding
from ntkpipe.operators.on_dask.shard_holder import Answer, Order, Request
from ntkpipe.operators.on_dask.workers import SHARE_OF_LIMIT, Asked, Crew, Member
from ntkpipe.operators.reading import buffer_bytes
from ntkpipe.operators.shards import PairwiseSum, share_out
from ntkpipe.operators.tiled import TiledOperator, join_measures
from ntkpipe.operators.tiles import Part, Shard, TileSource, cut_shards

if TYPE_CHECKING:
    from distributed import Client, Future

# Of what Dask gives a worker; beyond it a block is refused.
_MOST_OF_LIMIT = 0.9
# A block of so many bytes goes with each task; a larger one is brought to the workers once.
_SMALL_BLOCK = 2**18
# Losses in a pass while no other part arrives.
_MOST_LOSSES = 5


class WorkersOperator(TiledOperator):
    """A symmetric matrix of tiles, which the workers of a cluster read and keep.

    Every worker owns some of the shards that :class:`ntkpipe.operators.streaming.StreamingOperator` multiplies, keeps
    as many of their tiles as its memory holds, and reads the others ahead in each pass. A pass is one task for each
    worker. It adds what neighbouring shards give, and the driver the rest in the same pairs, so results have the bits
    of the operator on one machine, whatever the number of workers. There are 128 shards for 2,048 tiles or more, 16 for
    64; threads beyond that have nothing to do.

    A worker that dies or leaves costs its part of the pass, which others do: results have the same bits, and
    :attr:`work` holds what that cost. Workers that join are given shards before the next pass.

    Memory of a worker is its tiles, the block, and products of at most the size of the block: one for each thread and
    about four more. Memory of the driver is the block, and one or two products for each worker, which is also what
    travels.
    """

    def __init__(
        self,
        source: TileSource,
        client: "Client",
        *,
        memory_limit: int | None = None,
        cache_bytes: int | None = None,
        threads: int | None = None,
    ) -> None:
        crew = Crew(client, source, memory_limit=memory_limit, cache_bytes=cache_bytes, threads=threads)
        self._begin(crew, source.grid.shape[0])

    def _begin(self, crew: Crew, num_rows: int) -> None:
        self._crew = crew
        super().__init__(num_rows, crew.source.dtype)
        self._shards = cut_shards(crew.source.grid, num_rows)

    @property
    def num_workers(self) -> int:
        """Workers that own shards."""
        return len(self._crew.members)

    @property
    def share_kept(self) -> float:
        """Share of the tiles that workers had in memory when they were last asked."""
        num_kept = sum(member.num_kept.get(self.num_rows, 0) for member in self._crew.members.values())
        return num_kept / sum(len(shard.tiles) for shard in self._shards)

    @property
    def work(self) -> Work:
        """See :attr:`Operator.work`; a pass is all tiles of the whole matrix.

        Parts that were lost with their worker count as if they had been done.
        """
        return self._crew.work

    def identity(self) -> str:
        """See :meth:`Operator.identity`."""
        whole = self._crew.source.identity()
        return whole if self.num_rows == self._crew.source.grid.shape[0] else f"leading({whole}, {self.num_rows})"

    def _leading(self, num_rows: int) -> Operator:
        found = WorkersOperator.__new__(WorkersOperator)
        found._begin(self._crew, num_rows)
        return found

    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        total = PairwiseSum()
        for node, part in self._pass(None, block):
            total.add(node, Part(part.start, np.require(part.values, requirements="W")))
        return total.total

    def _measure(self) -> Statistics:
        return join_measures((part for _, part in sorted(self._pass(None, None))), self.num_rows)

    def _gather(self, request: Request, shape: tuple[int, int]) -> NDArray[np.float64]:
        values = np.empty(shape)
        if values.size:
            for _, pieces in self._pass(request, None):
                for where, entries in pieces:
                    values[where] = entries
        return values

    def _pass(self, request: Request, block: NDArray[np.float64] | None) -> Iterator[tuple[Any, Any]]:
        """What is found, see :class:`ntkpipe.operators.on_dask.shard_holder.Answer`, in any order."""
        start = perf_counter()
        this = _Pass(self._crew, self._shards, self.num_rows, request, block)
        try:
            yield from this.results()
        finally:
            this.close()
            self._crew.work += Work(seconds=perf_counter() - start)

    def close(self) -> None:
        """See :meth:`Operator.close`."""
        self._crew.close()


class _Pass:
    """One pass: what is asked of whom, and asked again."""

    def __init__(
        self,
        crew: Crew,
        shards: tuple[Shard, ...],
        num_rows: int,
        request: Request,
        block: NDArray[np.float64] | None,
    ) -> None:
        self._crew = crew
        self._shards = shards
        self._num_rows = num_rows
        self._request = request
        self._block = block
        self._sent: NDArray[np.float64] | Future[Any] | None = None  # the block as it reaches workers
        self._asked: dict[Future[Any], Asked] = {}
        self._losses = 0

    def results(self) -> Iterator[tuple[Any, Any]]:
        """What is found, as it arrives."""
        crew = self._crew
        self._bring()
        owned = crew.owners(self._num_rows, (shard.number for shard in self._shards))
        for address, numbers in owned.items():
            self._ask(address, numbers, numbers)
        for who, found in crew.outcomes(self._asked):
            if isinstance(found, Answer):
                self._losses = 0
                self._count(who, found)
                yield from found.found.items()
            else:
                self._ask_again(who, found)

    def _ask(self, address: str, numbers: tuple[int, ...], owned: tuple[int, ...]) -> None:
        if not numbers:
            return
        crew, member = self._crew, self._crew.members[address]
        self._require_room(address, member)
        order = Order(self._num_rows, numbers, owned, member.cache_bytes, member.threads, self._request)
        name = "entries" if self._request is not None else "product" if self._block is not None else "measure"
        future = crew.submit(address, name, holding.answer, member.holder, order, self._sent)
        self._asked[future] = Asked(address, member, numbers)

    def _require_room(self, address: str, member: Member) -> None:
        """Tiles give way to a large block, for good."""
        limit = member.report.memory_limit
        if self._block is None or not limit:
            return
        products = member.threads + 1 + len(self._shards).bit_length()  # in threads, waiting, not yet added
        needed = (1 + products) * self._block.nbytes
        free = limit - member.report.base_memory - buffer_bytes(self._crew.source, member.threads)
        if needed > free - (1 - _MOST_OF_LIMIT) * limit:
            raise ResourceError(
                f"a block of {self._block.shape[1]} columns needs {format_bytes(needed)} of the worker {address}, "
                f"which has {format_bytes(free)}; give fewer columns at a time, more memory or more workers"
            )
        member.cache_bytes = min(member.cache_bytes, int(free - (1 - SHARE_OF_LIMIT) * limit - needed))
        member.cache_bytes = max(member.cache_bytes, 0)

    def _bring(self) -> None:
        """Let the members have the block before they are asked."""
        crew = self._crew
        crew.gather(len(self._shards))
        self._sent = self._block
        if self._block is None or self._block.nbytes <= _SMALL_BLOCK:
            return
        for attempt in range(_MOST_LOSSES):
            try:
                # By its content, the block of another pass would be the same to Dask, and go with it.
                self._sent = crew.client.scatter(self._block, workers=list(crew.members), broadcast=True, hash=False)
            except Exception as error:  # Dask says in many ways that a worker dies this moment
                if attempt == _MOST_LOSSES - 1:
                    raise ClusterError(f"a block does not reach the workers: {error!r}; look at their logs") from error
                crew.gather(len(self._shards), anew=True)
            else:
                return

    def _ask_again(self, who: Asked, reason: BaseException) -> None:
        """Ask others; tiles stay owned by whom they were until the next pass."""
        crew = self._crew
        self._count(who, None)
        self._losses += 1
        if self._losses > _MOST_LOSSES:
            raise ClusterError(
                f"workers were lost {self._losses} times while no part of a pass arrived, {who.address} the last "
                f"({reason}). Look at their logs; if they were killed for their memory, give them more, or "
                "cache_bytes or blocks of fewer columns"
            ) from reason
        crew.forget(who.address, who.member)
        self._bring()
        loads = {address: member.threads for address, member in crew.members.items()}
        shares = share_out(list(who.shards), loads, {})
        for address in loads:
            numbers = tuple(number for number, owner in shares.items() if owner == address)
            self._ask(address, numbers, crew.owned(self._num_rows, address))

    def _count(self, who: Asked, found: Answer | None) -> None:
        source = self._crew.source
        if found is None:
            grid, request = source.grid, self._request
            tiles = (tile for number in who.shards for tile in self._shards[number].tiles)
            num_tiles = sum(request is None or request.touches(tile, grid) for tile in tiles)
            bytes_read = num_tiles * source.tile_bytes
        else:
            num_tiles, bytes_read = found.num_tiles, found.bytes_read
            if who.member is not None:
                who.member.num_kept = found.num_kept
        self._crew.work += Work(num_tiles / source.grid.num_tiles, bytes_read)

    def close(self) -> None:
        """Tell workers to leave what nobody waits for."""
        if self._asked:
            self._crew.cancel(self._asked)
            self._asked.clear()
