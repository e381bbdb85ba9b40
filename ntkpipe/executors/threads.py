"""Jobs and executors: map an idempotent function over keys, on workers that keep their own state."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from ntkpipe.base.errors import Interrupted

Key = TypeVar("Key")
Record = TypeVar("Record")
KeyIn = TypeVar("KeyIn", contravariant=True)
RecordOut = TypeVar("RecordOut", covariant=True)


class RunStopped(Exception):  # noqa: N818 - a request, not an error
    """Raised inside a worker to leave its work when the run stops."""


class Job(Protocol[KeyIn, RecordOut]):
    """What an executor runs; pickled if it is sent to other processes."""

    def session(self) -> AbstractContextManager[None]:
        """Process-wide settings while keys run; entered by the owner of the process."""

    def shrunk(self) -> "Job[KeyIn, RecordOut]":
        """The same work in less memory, after workers were killed for theirs; agrees to rounding."""

    def open(self, pause: Callable[[], None], folder: Path | None = None) -> Callable[[KeyIn], Iterator[RecordOut]]:
        """Prepare one worker, in its thread; the result yields the records of a key. Files may be left in a folder."""

    def close(self) -> None:
        """Release what this process holds beside memory, once the run has ended."""


class Executor(Protocol[Key, Record]):
    """Runs a job: threads of this process here, workers of a cluster in :mod:`ntkpipe.executors.dask`."""

    def run(self, job: Job[Key, Record], keys: Iterable[Key]) -> Generator[Record, None, None]:
        """Run every key once, and yield records as they come, in no particular order."""


@dataclass(frozen=True)
class ThreadExecutor(Generic[Key, Record]):
    """Workers as threads of this process."""

    num_workers: int  # threads

    def run(self, job: Job[Key, Record], keys: Iterable[Key]) -> Generator[Record, None, None]:
        """See :class:`Executor`. The first error of a worker, or closing the generator, stops the others."""
        stop = threading.Event()
        records: queue.SimpleQueue[list[Record]] = queue.SimpleQueue()  # one at a time, none at the end of a worker
        failures: list[BaseException] = []
        pending = iter(keys)
        lock = threading.Lock()

        def pause() -> None:
            if stop.is_set():
                raise RunStopped

        def work() -> None:
            try:
                do = job.open(pause)
                while True:
                    pause()
                    with lock:
                        key = next(pending)
                    for record in do(key):
                        records.put([record])
            except (StopIteration, RunStopped):
                pass
            except BaseException as error:  # noqa: BLE001 - carried to the caller's thread and raised there
                failures.append(error)
                stop.set()
            records.put([])

        threads = [
            threading.Thread(target=copy_context().run, args=(work,), name=f"ntkpipe-{number}", daemon=True)
            for number in range(self.num_workers)
        ]
        try:
            for thread in threads:
                thread.start()
            active = len(threads)
            while active:
                found = records.get()
                yield from found
                active -= not found
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted; every worker has left its work") from error
        finally:
            stop.set()
            for thread in threads:
                if thread.ident is not None:  # an interrupt may come before all are started
                    thread.join()
        if failures:
            raise failures[0]
