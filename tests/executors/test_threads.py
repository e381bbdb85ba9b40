"""Every key once; an error, an interrupt or a caller that leaves stops every worker."""

import itertools
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from ntkpipe.base.errors import Interrupted
from ntkpipe.executors.threads import ThreadExecutor

WORKERS = pytest.mark.parametrize("workers", [1, 2, 5])


class Job:
    """Does a key by a function of (key, pause); counts its workers, and those that have left."""

    def __init__(self, do: Callable[[int, Callable[[], None]], Iterator[int]]) -> None:
        self.do = do
        self.pauses: list[Callable[[], None]] = []

    def open(self, pause):
        self.pauses.append(pause)
        return lambda key: self.do(key, pause)


def twice(key, pause):
    yield key
    pause()
    yield -key


def forever(key, pause):
    """A key that ends only when the run is stopped."""
    while True:
        pause()
        yield key


def my_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ntkpipe-")]


@WORKERS
@pytest.mark.parametrize("num_keys", [0, 1, 40])
def test_every_key_is_done_once_and_every_record_arrives(workers, num_keys):
    job = Job(twice)
    records = list(ThreadExecutor(workers).run(job, iter(range(1, num_keys + 1))))
    assert Counter(records) == {sign * key: 1 for key in range(1, num_keys + 1) for sign in (1, -1)}
    assert len(job.pauses) == workers
    assert my_threads() == []


@WORKERS
def test_the_error_of_a_worker_reaches_the_caller_and_stops_the_others(workers):
    def do(key, pause):
        if key == 3:
            raise ArithmeticError("key 3")
        return forever(key, pause) if key > 3 else twice(key, pause)

    with pytest.raises(ArithmeticError, match="key 3"):
        list(ThreadExecutor(workers).run(Job(do), itertools.count(1)))
    assert my_threads() == []


def test_records_before_an_error_are_not_lost():
    def do(key, pause):
        yield key
        if key == 2:
            raise ArithmeticError
        yield 10 * key

    found = []
    with pytest.raises(ArithmeticError):
        found.extend(iter_into(found, ThreadExecutor(1).run(Job(do), range(1, 9))))
    assert found == [1, 10, 2]


def iter_into(found, records):
    for record in records:
        found.append(record)
    return ()


def test_an_error_on_opening_a_worker_reaches_the_caller():
    class Closed:
        def open(self, pause):
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        list(ThreadExecutor(2).run(Closed(), range(3)))


def test_an_error_of_the_keys_reaches_the_caller():
    def keys():
        yield 1
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(ThreadExecutor(2).run(Job(twice), keys()))


@WORKERS
def test_an_interrupt_stops_every_worker(workers):
    def do(key, pause):
        if key == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return forever(key, pause) if key >= 4 else twice(key, pause)

    with pytest.raises(Interrupted):
        list(ThreadExecutor(workers).run(Job(do), itertools.count(1)))
    assert my_threads() == []


@WORKERS
def test_a_caller_that_leaves_stops_every_worker(workers):
    with closing(ThreadExecutor(workers).run(Job(forever), itertools.count(1))) as records:
        assert next(records) >= 1
        assert len(my_threads()) == workers
    assert my_threads() == []


def test_keys_are_taken_one_by_one():
    """A plan of millions of tasks is never listed."""
    taken = []

    def keys():
        for key in itertools.count(1):
            taken.append(key)
            yield key

    def do(key, pause):
        if key == 5:
            raise ArithmeticError
        yield key

    with pytest.raises(ArithmeticError):
        list(ThreadExecutor(1).run(Job(do), keys()))
    assert taken == [1, 2, 3, 4, 5]
