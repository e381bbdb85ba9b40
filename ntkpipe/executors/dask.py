"""Run a job on the workers of a Dask cluster, and recover when workers or the scheduler die."""

import contextlib
import pickle
import warnings
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from itertools import islice
from time import monotonic, sleep
from typing import Any, Generic

from distributed import Client, KilledWorker, Scheduler
from distributed.comm.core import CommClosedError

from ntkpipe.base.errors import ClusterError, Interrupted, ResourceError, StoreError
from ntkpipe.executors.payload import PLUGIN_PREFIX, JobPlugin, PayloadMissingError, pickle_job, run_key
from ntkpipe.executors.pool import POLL_SECONDS, WorkerPool
from ntkpipe.executors.threads import Job, Key, Record

TOPIC = "ntkpipe"  # of scheduler events that announce a kernel about to be built

_KEYS_PER_THREAD = 2  # submitted in advance for each thread of a worker: one runs, one waits there
_SPARE_KEYS = 8
_GRACE_SECONDS = 10.0  # workers killed for memory within this time count once: they were doing the same
_MEMORY_TOPIC = "worker-restart-memory"
_BACKOFF_SECONDS = 1.0  # delay before an unreachable store is tried again; doubled each time
_MOST_SHRINKING = 8  # halvings of sizes; smaller ones gain nothing


def _plugins_of_the_dead(dask_scheduler: Scheduler) -> list[str]:
    """Plugins of killed drivers, whose models the scheduler would keep and give to every new worker."""
    plugins = [name for name in dask_scheduler.worker_plugins if name.startswith(PLUGIN_PREFIX)]
    return [name for name in plugins if name.partition("@")[2] not in dask_scheduler.clients]


@dataclass(frozen=True)
class ClusterExecutor(Generic[Key, Record]):
    """Workers of a Dask cluster; see :class:`ntkpipe.executors.threads.Executor`."""

    client: Client
    name: str  # of the run, in Dask's dashboard
    code: bytes | None = None  # zip archive of modules that the job needs
    max_failures: int = 5  # of a key, without progress elsewhere, that end the run

    def run(self, job: Job[Key, Record], keys: Iterable[Key]) -> Generator[Record, None, None]:
        """See :class:`ntkpipe.executors.threads.Executor`; all records of a key come when it is done."""
        running = _Run(self, job)
        try:
            yield from running.records(iter(keys))
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted; workers leave their work") from error
        finally:
            running.close()


class _Run(Generic[Key, Record]):
    def __init__(self, executor: ClusterExecutor[Key, Record], job: Job[Key, Record]) -> None:
        self._client, self._name, self._max_failures = executor.client, executor.name, executor.max_failures
        self._plugin = JobPlugin(pickle_job(job), executor.code, owner=self._client.id)
        self._pool: WorkerPool[Key] = WorkerPool(self._client, (PayloadMissingError, StoreError))
        self._again: list[tuple[float, Key]] = []  # keys to submit once more, and when
        self._failures: Counter[str] = Counter()
        self._busy: set[str] = set()  # addresses of workers that have begun a key of this run
        self._killed: deque[float] = deque()  # times at which one of them was killed for its memory
        self._shrinking = 0
        self._shrunk_at = -_GRACE_SECONDS
        self._num_threads = 0
        self._counted_at = -POLL_SECONDS

    def records(self, keys: Iterator[Key]) -> Iterator[Record]:
        for name in self._client.run_on_scheduler(_plugins_of_the_dead):
            # A worker may die at this moment, or another driver remove the same plugin.
            with contextlib.suppress(OSError, ValueError):
                self._client.unregister_worker_plugin(name)
        self._deliver()
        while True:
            if self._killed:
                self._shrink(self._killed.popleft())
            now = monotonic()
            due = [key for when, key in self._again if when <= now]
            self._again = [(when, key) for when, key in self._again if when > now]
            for key in [*due, *islice(keys, max(0, self._window() - len(self._pool) - len(due)))]:
                # The scheduler unpickles arguments, and may lack the classes of keys.
                arguments = self._plugin.name, pickle.dumps(key), self._shrinking
                self._pool.submit(self._name, key, run_key, *arguments)
            if not self._pool and not self._again:
                return
            if (ended := self._pool.next()) is not None:
                yield from self._finish(*ended)

    def _deliver(self) -> None:
        # The client keeps its handlers: they must not refer to the job.
        busy, killed, wake = self._busy, self._killed, self._pool.wake

        def note_memory(event: tuple[float, dict[str, Any]]) -> None:
            if event[1]["worker"] in busy:
                killed.append(monotonic())
                wake()

        self._client.subscribe_topic(self._plugin.name, lambda event: busy.add(event[1]["worker"]))
        self._client.subscribe_topic(_MEMORY_TOPIC, note_memory)
        # A worker may die at this moment. Others that lack the job, and a lost scheduler, are noticed later.
        with contextlib.suppress(OSError):
            self._client.register_plugin(self._plugin.carried(), name=self._plugin.name)

    def _window(self) -> int:
        # Only a few keys per thread are submitted at a time, so neither driver nor scheduler holds many tasks.
        if monotonic() - self._counted_at > POLL_SECONDS:
            # If the scheduler is gone, its tasks are lost, which _finish sees.
            with contextlib.suppress(OSError):
                self._num_threads = sum(self._client.nthreads().values())
            self._counted_at = monotonic()
            self._pool.seen(bool(self._num_threads))
        return _KEYS_PER_THREAD * self._num_threads + _SPARE_KEYS

    def _finish(self, key: Key, found: Any) -> Iterable[Record]:
        match found:
            case KilledWorker():
                self._fail(key, f"its workers died ({found.last_worker.address} the last)", found)
            case CancelledError() | CommClosedError():
                self._again += [(0.0, lost) for lost in (key, *self._pool.drop())]
                while not self._pool.seen(self._has_workers()):
                    sleep(POLL_SECONDS)
                self._deliver()
            case PayloadMissingError():
                self._deliver()
                self._again.append((0.0, key))
            case StoreError():
                if type(found) is not StoreError:  # a full disk, a damaged chunk
                    raise found
                # A shared disk or a network may be gone for a moment.
                self._fail(key, str(found), found, backoff=_BACKOFF_SECONDS)
            case _:
                self._failures.clear()
                return found  # type: ignore[no-any-return]
        return ()

    def _fail(self, key: Key, reason: str, error: Exception, *, backoff: float = 0.0) -> None:
        self._failures[str(key)] += 1
        failures = self._failures[str(key)]
        if failures >= self._max_failures:
            raise ClusterError(
                f"block {key} failed {failures} times while no other block was finished: {reason}. Look at "
                "the workers' logs; if they were killed for their memory, start them with a nanny, more memory or "
                "fewer threads each, or plan for less with memory_limit"
            ) from error
        self._again.append((monotonic() + backoff * 2**failures, key))

    def _has_workers(self) -> bool:
        with contextlib.suppress(OSError):
            return self._client.status == "running" and bool(self._client.nthreads())
        return False

    def _shrink(self, seen: float) -> None:
        """After a worker was killed for its memory, retry all unfinished keys in half the memory."""
        if seen - self._shrunk_at < _GRACE_SECONDS:
            return
        self._shrunk_at, self._shrinking = seen, self._shrinking + 1
        if self._shrinking > _MOST_SHRINKING:
            raise ResourceError(
                "workers were killed for their memory again and again, even with single samples at a time; give them "
                "more, or fewer threads each"
            )
        warnings.warn(
            "a worker was killed for exceeding its memory; blocks that are not done are tried in half the memory",
            stacklevel=2,
        )
        self._again = [(0.0, key) for key in (*self._pool.drop(), *(key for _, key in self._again))]

    def close(self) -> None:
        """Make workers stop, and forget the job."""
        self._pool.drop()
        # The scheduler may go at this moment, or the run have ended before the job was delivered.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            if self._client.status == "running":
                self._client.unsubscribe_topic(_MEMORY_TOPIC)
                self._client.unsubscribe_topic(self._plugin.name)
                self._client.unregister_worker_plugin(self._plugin.name)
