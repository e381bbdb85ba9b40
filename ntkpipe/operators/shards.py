"""Shards of tiles: who owns which, threads that work through them with single-threaded BLAS, how results add up."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.grid import Grid
from ntkpipe.operators.blas import single_threaded_blas
from ntkpipe.operators.tiles import Part, Shard, TileIndex, Tiles, multiply

Found = TypeVar("Found")

# Shards 2^level * index to 2^level * (index + 1).
Node = tuple[int, int]


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """Leaves a shard when another one has failed, or nobody waits for the pass any more."""


def map_shards(
    work: Callable[[Tiles], Found],
    shards: Iterable[Shard],
    read: Callable[[tuple[TileIndex, ...]], Tiles],
    num_threads: int,
    is_unwanted: Callable[[], bool] = lambda: False,
) -> Iterator[Found]:
    """What ``work`` finds in the tiles of each shard, in order; threads are at most one shard ahead."""
    stop = threading.Event()

    def watched(tiles: Tiles) -> Iterator[tuple[TileIndex, Any]]:
        for item in tiles:
            if stop.is_set() or is_unwanted():
                raise Stopped
            yield item

    def do(tiles: Tiles) -> Found:
        return work(watched(tiles))

    waiting: list[Future[Found]] = []
    with single_threaded_blas(), ThreadPoolExecutor(num_threads) as threads:
        try:
            for shard in shards:
                # Here and not in the thread: the first tile comes while others are still multiplied.
                waiting.append(threads.submit(do, read(shard.tiles)))
                if len(waiting) > num_threads:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            stop.set()
            for future in waiting:
                future.cancel()


class PairwiseSum:
    """Adds parts: those of neighbours, then those of neighbouring pairs, and so on.

    So whoever has neighbours may add them, in whatever order they come: the bits are the same. The error grows with
    the logarithm of the number of parts (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2).
    """

    def __init__(self) -> None:
        self.parts: dict[Node, Part] = {}

    def add(self, node: Node, part: Part) -> list[Part]:
        """Add a part, into the memory of parts before; returns those that are not needed any more."""
        done = []
        level, index = node
        while (other := self.parts.pop((level, index ^ 1), None)) is not None:
            # Rows of a shard begin where, or below where those of the one before begin.
            into, added = (other, part) if index % 2 else (part, other)
            into.values[added.start - into.start :] += added.values
            done.append(added)
            part, level, index = into, level + 1, index // 2
        self.parts[level, index] = part
        return done

    @property
    def total(self) -> NDArray[np.float64]:
        """The sum of all shards."""
        (part,) = self.parts.values()
        return part.values


def multiply_shards(
    grid: Grid,
    block: NDArray[np.float64],
    shards: tuple[Shard, ...],
    read: Callable[[tuple[TileIndex, ...]], Tiles],
    num_threads: int,
    is_unwanted: Callable[[], bool] = lambda: False,
) -> PairwiseSum:
    """What shards add to ``K @ block``, neighbours added; see :func:`map_shards`.

    Memory is a block for each thread, one that waits, and those of the sum.
    """
    total = PairwiseSum()
    free: deque[NDArray[np.float64]] = deque()

    def work(tiles: Tiles) -> Part:
        try:
            # Fresh memory costs page faults as long as a tile takes.
            memory = free.pop()
        except IndexError:
            memory = np.empty_like(block)
        return multiply(tiles, grid, block, memory)

    for shard, part in zip(shards, map_shards(work, shards, read, num_threads, is_unwanted), strict=True):
        for done in total.add((0, shard.number), part):
            assert done.values.base is not None
            free.append(done.values.base)
    return total


def share_out(numbers: list[int], workers: Mapping[str, int], known: Mapping[int, str]) -> dict[int, str]:
    """Owner of each shard: its present one if still there; about equally many shards for each thread."""
    if not set(known.values()) & set(workers):
        known, threads, position = {}, sum(workers.values()), 0
        fresh = {}
        for address, count in workers.items():
            first, position = position, position + count
            for number in numbers[len(numbers) * first // threads : len(numbers) * position // threads]:
                fresh[number] = address
        return fresh
    owners = {number: known[number] for number in numbers if known.get(number) in workers}
    held = Counter({address: 0 for address in workers})
    held.update(owners.values())

    def give(number: int) -> None:
        owners[number] = min(workers, key=lambda address: (held[address] + 1) / workers[address])
        held[owners[number]] += 1

    for number in numbers:
        if number not in owners:
            give(number)
    while True:
        fullest = max(workers, key=lambda address: held[address] / workers[address])
        emptiest = min(workers, key=lambda address: (held[address] + 1) / workers[address])
        if (held[emptiest] + 1) / workers[emptiest] >= held[fullest] / workers[fullest]:
            return dict(sorted(owners.items()))
        moved = max(number for number, owner in owners.items() if owner == fullest)
        held[fullest] -= 1
        owners[moved] = emptiest
        held[emptiest] += 1
