"""Shards of tiles: who owns which, how threads work through them with single-threaded BLAS, and how results add up."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.grid import Grid
from ntkpipe.operators.blas import single_threaded_blas
from ntkpipe.operators.tiles import PartialProduct, Shard, TileIndex, Tiles, multiply

ShardResult = TypeVar("ShardResult")

SumNode = tuple[int, int]  # level and index: the sum of shards 2^level * index to 2^level * (index + 1)


class PassStopped(Exception):  # noqa: N818 - a request, not an error
    """Raised in a shard when another one has failed, or nobody waits for the pass any more."""


def map_shards(
    work: Callable[[Tiles], ShardResult],
    shards: Iterable[Shard],
    read: Callable[[tuple[TileIndex, ...]], Tiles],
    num_threads: int,
    is_unwanted: Callable[[], bool] = lambda: False,
) -> Iterator[ShardResult]:
    """Yield the result of ``work`` on the tiles of each shard, in order; threads are at most one shard ahead."""
    stop = threading.Event()

    def watched(tiles: Tiles) -> Iterator[tuple[TileIndex, Any]]:
        for item in tiles:
            if stop.is_set() or is_unwanted():
                raise PassStopped
            yield item

    waiting: list[Future[ShardResult]] = []
    with single_threaded_blas(), ThreadPoolExecutor(num_threads) as threads:
        try:
            for shard in shards:
                # Read from here and not in the thread: the first tile comes while others are still multiplied.
                waiting.append(threads.submit(work, watched(read(shard.tiles))))
                if len(waiting) > num_threads:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            stop.set()
            for future in waiting:
                future.cancel()


class PairwiseSum:
    """Adds partial products of neighbouring shards, then of neighbouring pairs, and so on.

    So whoever has neighbours may add them, in any order of arrival, and the bits are the same. The error grows with
    the logarithm of the number of parts (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2).
    """

    def __init__(self) -> None:
        self.parts: dict[SumNode, PartialProduct] = {}

    def add(self, node: SumNode, part: PartialProduct) -> list[PartialProduct]:
        """Add a part, into the memory of earlier parts; returns those that are not needed any more."""
        done = []
        level, index = node
        while (other := self.parts.pop((level, index ^ 1), None)) is not None:
            # The rows of a shard begin at or below the first row of the shard before.
            into, added = (other, part) if index % 2 else (part, other)
            into.values[added.start - into.start :] += added.values
            done.append(added)
            part, level, index = into, level + 1, index // 2
        self.parts[level, index] = part
        return done

    @property
    def total(self) -> FloatArray:
        """The sum of all shards."""
        (part,) = self.parts.values()
        return part.values


def multiply_shards(
    grid: Grid,
    block: FloatArray,
    shards: tuple[Shard, ...],
    read: Callable[[tuple[TileIndex, ...]], Tiles],
    num_threads: int,
    is_unwanted: Callable[[], bool] = lambda: False,
) -> PairwiseSum:
    """Sum what shards contribute to ``K @ block``; memory is :func:`num_blocks_in_use` blocks."""
    total = PairwiseSum()
    free: deque[FloatArray] = deque()

    def work(tiles: Tiles) -> PartialProduct:
        try:
            # Page faults of fresh memory would take as long as a tile.
            memory = free.pop()
        except IndexError:
            memory = np.empty_like(block)
        return multiply(tiles, grid, block, memory)

    for shard, part in zip(shards, map_shards(work, shards, read, num_threads, is_unwanted), strict=True):
        for done in total.add((0, shard.number), part):
            assert done.values.base is not None
            free.append(done.values.base)
    return total


def num_blocks_in_use(num_threads: int, num_shards: int) -> int:
    """Blocks that :func:`multiply_shards` holds at most: one in each thread, one waiting, and those not yet added."""
    return num_threads + 1 + num_shards.bit_length()


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
