"""BLAS with one thread: its own threads wait for each other where cores are shared, and ours do as much."""

import contextlib
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController


class _Setting:
    """The limit of this process: set by the first user and restored by the last."""

    lock = threading.Lock()
    num_users = 0
    limits: Any = None


@contextlib.contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Limit BLAS to one thread, as a context manager or during the calls of a decorated function.

    On a shared machine BLAS's own threads made iterations on 4,000 rows 2 to 6 times slower.
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
