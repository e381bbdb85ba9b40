"""Matrix products without BLAS's own threads, which wait for each other where cores are shared, and threads of ours."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import product
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.resources import num_cores

WorkItem = TypeVar("WorkItem")

# A product is cut into parts of so many rows and columns, whatever the number of threads, so no bit depends on it.
_PART_ROWS, _PART_COLUMNS = 256, 512


class _Setting:
    """The limit of this process: set by the first user and restored by the last."""

    lock = threading.Lock()
    num_users = 0
    limits: Any = None


@contextlib.contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Limit BLAS to one thread, as a context manager or during the calls of a decorated function."""
    # On a shared machine BLAS's own threads made iterations on 4,000 rows 2 to 6 times slower.
    with _Setting.lock:
        if _Setting.num_users == 0:
            _Setting.limits = _controller().limit(limits=1, user_api="blas")
        _Setting.num_users += 1
    try:
        yield
    finally:
        with _Setting.lock:
            _Setting.num_users -= 1
            if _Setting.num_users == 0:
                _Setting.limits.restore_original_limits()


_controller = cache(ThreadpoolController)


class Pool:
    """Threads that work on parts of blocks, each with single-threaded BLAS."""

    # BLAS's own threads would wait busily for each other at every call, which is slow for blocks that are not large,
    # and very slow where others use the same cores.

    def __init__(self, num_threads: int, threads: ThreadPoolExecutor) -> None:
        self.num_threads = num_threads
        self._threads = threads

    @classmethod
    @contextlib.contextmanager
    def open(cls, num_threads: int | None = None) -> Iterator["Pool"]:
        """Start threads, by default one per core; until they end, BLAS of this process has one thread."""
        count = num_threads or num_cores()
        with single_threaded_blas(), ThreadPoolExecutor(count, thread_name_prefix="products") as threads:
            yield cls(count, threads)

    def start(self, work: Callable[[WorkItem], None], items: Iterable[WorkItem]) -> list[Future[None]]:
        """Begin to work on items, in any order."""
        return [self._threads.submit(work, item) for item in items]

    def each(self, work: Callable[[WorkItem], None], items: Iterable[WorkItem]) -> None:
        """Work on all items; once no thread is at work any more, raise the error of the first that failed."""
        every = list(items)
        if self.num_threads == 1 or len(every) == 1:
            for item in every:
                work(item)
            return
        started = self.start(work, every)
        wait(started)
        for future in started:
            future.result()

    def subtract_product(self, target: FloatArray, left: FloatArray, right: FloatArray, scratch: FloatArray) -> None:
        """``target -= left @ right.T``; ``scratch`` has room for the product."""
        num_rows, num_columns = target.shape

        def work(first: tuple[int, int]) -> None:
            row, column = first
            rows, columns = slice(row, row + _PART_ROWS), slice(column, column + _PART_COLUMNS)
            into = target[rows, columns]
            place = row * num_columns + len(into) * column
            part = scratch[place : place + into.size].reshape(into.shape)
            np.matmul(left[rows], right[columns].T, out=part)
            into -= part

        self.each(work, product(range(0, num_rows, _PART_ROWS), range(0, num_columns, _PART_COLUMNS)))
