"""Threads that share the products of blocks, each with a BLAS of one thread."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.resources import num_cores
from ntkpipe.operators.blas import single_threaded_blas

Part = TypeVar("Part")

# A product is shared out in parts of so many rows and columns, however many threads there are: so no bit depends on it.
_PART_ROWS, _PART_COLUMNS = 256, 512


class Pool:
    """A number of threads that work on parts of blocks.

    BLAS with threads of its own lets them wait busily for each other at every call, which is slow for blocks that are
    not large and very slow where others use the same cores.
    """

    def __init__(self, num_threads: int, threads: ThreadPoolExecutor) -> None:
        self.num_threads = num_threads
        self._threads = threads

    @classmethod
    @contextlib.contextmanager
    def open(cls, num_threads: int | None = None) -> Iterator["Pool"]:
        """Threads for a while, one for each core unless told otherwise; BLAS of this process has one until the end."""
        count = num_threads or num_cores()
        with single_threaded_blas(), ThreadPoolExecutor(count, thread_name_prefix="products") as threads:
            yield cls(count, threads)

    def start(self, work: Callable[[Part], None], parts: Iterable[Part]) -> list[Future[None]]:
        """Begin with the parts, in any order."""
        return [self._threads.submit(work, part) for part in parts]

    def each(self, work: Callable[[Part], None], parts: Iterable[Part]) -> None:
        """Do all parts; the error of the first that has one is raised once none is at work any more."""
        every = list(parts)
        if self.num_threads == 1 or len(every) == 1:
            for part in every:
                work(part)
            return
        started = self.start(work, every)
        wait(started)
        for future in started:
            future.result()

    @staticmethod
    def finish(started: Iterable[Future[None]]) -> None:
        """Wait until none of what was begun is at work; what has not begun does not begin."""
        wait([future for future in started if not future.cancel()])

    def subtract_product(
        self,
        target: NDArray[np.float64],
        left: NDArray[np.float64],
        right: NDArray[np.float64],
        scratch: NDArray[np.float64],
    ) -> None:
        """``target -= left @ right.T`` by way of ``scratch``, which has room for the product."""

        def work(part: tuple[slice, slice, int]) -> None:
            rows, columns, place = part
            aim = target[rows, columns]
            product = scratch[place : place + aim.size].reshape(aim.shape)
            np.matmul(left[rows], right[columns].T, out=product)
            aim -= product

        def parts() -> Iterator[tuple[slice, slice, int]]:
            place = 0
            for row in range(0, target.shape[0], _PART_ROWS):
                rows = slice(row, min(row + _PART_ROWS, target.shape[0]))
                for column in range(0, target.shape[1], _PART_COLUMNS):
                    columns = slice(column, min(column + _PART_COLUMNS, target.shape[1]))
                    yield rows, columns, place
                    place += (rows.stop - rows.start) * (columns.stop - columns.start)

        self.each(work, parts())
