"""BLAS with one thread: others wait for each other where cores are shared, and threads of ours do as much."""

import contextlib
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController


class _Setting:
    """Of the process: made by whoever needs it first, and unmade by the last."""

    lock = threading.Lock()
    num_users = 0
    limits: Any = None


@contextlib.contextmanager
def single_threaded_blas() -> Iterator[None]:
    """While BLAS has one thread; as a decorator, during the calls of a function.

    On a machine that others use, too, BLAS's own threads made iterations on 4,000 rows 2 to 6 times slower.
    """
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


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
