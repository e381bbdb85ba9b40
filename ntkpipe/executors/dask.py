"""Run a job on the workers of a Dask cluster, and recover when workers or the scheduler die."""

import contextlib
import pickle
import queue
import threading
import warnings
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import Future as Fetched
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Any, Generic
from uuid import uuid4

from distributed import Client, Future, KilledWorker, Scheduler
from distributed.comm.core import CommClosedError

from ntkpipe.base.errors import ClusterError, Interrupted, ResourceError, StoreError
from ntkpipe.executors.payload import PLUGIN_PREFIX, JobPlugin, Payload, PayloadMissingError, pickle_job, run_key
from ntkpipe.executors.threads import Job, Key, Record

TOPIC = "ntkpipe"  # of scheduler events that announce a kernel about to be built

_Attempt = tuple[Any, int]  # a key, and how often the job was shrunk for it

_KEYS_PER_THREAD = 2  # submitted in advance for each thread of a worker: one runs, one waits there
_SPARE_KEYS = 8
_FETCHERS = 32  # results fetched at a time: one after the other they would keep hundreds of workers waiting
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 10.0  # workers killed for memory within this time count once: they were doing the same
_ALONE_SECONDS = 30.0
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
        self._client, self._max_failures = executor.client, executor.max_failures
        self._token = uuid4().hex[:16]
        self._prefix = f"{executor.name}-{self._token}"
        self._plugin = JobPlugin(Payload(self._token, pickle_job(job), executor.code), owner=self._client.id)
        self._pending: dict[Future[list[Record]], _Attempt] = {}
        self._again: deque[_Attempt] = deque()
        self._later: list[tuple[float, _Attempt]] = []
        self._failures: Counter[str] = Counter()
        # Futures with what fetching their records came to, and times at which a worker was killed for its memory.
        self._events: queue.SimpleQueue[tuple[Future[list[Record]], Fetched[list[Record]]] | float]
        self._events = queue.SimpleQueue()
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="ntkpipe-fetcher")
        self._busy: set[str] = set()  # addresses of workers that have begun a key of this run
        self._is_delivered = False
        self._shrinking = 0
        self._shrunk_at = -_GRACE_SECONDS
        self._attempts = 0
        self._num_threads = 0
        self._alone_since: float | None = None
        self._counted_at = -_POLL_SECONDS

    def records(self, keys: Iterator[Key]) -> Iterator[Record]:
        for name in self._client.run_on_scheduler(_plugins_of_the_dead):
            # A worker may die at this moment, or another driver remove the same plugin.
            with contextlib.suppress(CommClosedError, OSError, ValueError):
                self._client.unregister_worker_plugin(name)
        self._deliver()
        is_exhausted = False
        while True:
            self._again += [attempt for due, attempt in self._later if due <= monotonic()]
            self._later = [(due, attempt) for due, attempt in self._later if due > monotonic()]
            while not is_exhausted and len(self._pending) + len(self._again) < self._window():
                try:
                    self._again.append((next(keys), self._shrinking))
                except StopIteration:
                    is_exhausted = True
            while self._again:
                self._submit(*self._again.popleft())
            if not self._pending and not self._later:
                return
            with contextlib.suppress(queue.Empty):
                event = self._events.get(timeout=_POLL_SECONDS)
                if isinstance(event, float):
                    self._shrink(event)
                elif event[0] in self._pending:
                    yield from self._finish(*event)

    def _deliver(self) -> None:
        busy, events = self._busy, self._events  # the client keeps its handlers: they must not refer to the job

        def note_memory(event: tuple[float, dict[str, Any]]) -> None:
            if event[1]["worker"] in busy:
                events.put(monotonic())

        self._client.subscribe_topic(self._plugin.name, lambda event: busy.add(event[1]["worker"]))
        self._client.subscribe_topic(_MEMORY_TOPIC, note_memory)
        self._is_delivered = True
        # A worker may die at this moment. Others that lack the job, and a lost scheduler, are noticed later.
        with contextlib.suppress(CommClosedError, OSError):
            self._client.register_plugin(self._plugin, name=self._plugin.name)

    def _window(self) -> int:
        # Only a few keys per thread are submitted at a time, so neither driver nor scheduler holds many tasks.
        if monotonic() - self._counted_at > _POLL_SECONDS:
            # If the scheduler is gone, its futures are cancelled, which _finish sees.
            with contextlib.suppress(CommClosedError, OSError):
                self._num_threads = sum(self._client.nthreads().values())
            self._counted_at = monotonic()
            self._warn_if_alone()
        return _KEYS_PER_THREAD * self._num_threads + _SPARE_KEYS

    def _warn_if_alone(self) -> None:
        """Warn once each time that the cluster has had no worker for a while."""
        if self._num_threads:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = monotonic()
        elif monotonic() - self._alone_since > _ALONE_SECONDS:
            self._alone_since = inf
            warnings.warn("the cluster has no workers; waiting for some to join", stacklevel=2)

    def _submit(self, key: Key, shrinking: int) -> None:
        self._attempts += 1
        future: Future[list[Record]] = self._client.submit(
            run_key,
            self._token,
            pickle.dumps(key),  # the scheduler unpickles arguments, and may lack the classes of keys
            shrinking,
            key=(self._prefix, str(key), self._attempts),
            priority=-self._attempts,
            pure=False,
        )
        self._pending[future] = (key, shrinking)
        future.add_done_callback(self._fetch_soon)

    def _fetch_soon(self, future: "Future[list[Record]]") -> None:
        with contextlib.suppress(RuntimeError):  # the run is over
            fetching = self._fetchers.submit(future.result)
            fetching.add_done_callback(lambda fetched: self._events.put((future, fetched)))

    def _finish(self, future: "Future[list[Record]]", fetched: "Fetched[list[Record]]") -> Iterator[Record]:
        key, shrinking = self._pending.pop(future)
        try:
            records = fetched.result()
        except KilledWorker as error:
            self._fail((key, shrinking), f"its workers died ({error.last_worker.address} the last)", error)
        except (CancelledError, CommClosedError) as error:
            self._reconnect((key, shrinking), error)
        except PayloadMissingError:
            self._deliver()
            self._again.append((key, shrinking))
        except StoreError as error:
            if type(error) is not StoreError:  # a full disk, a damaged chunk
                raise
            # A shared disk or a network may be gone for a moment.
            self._fail((key, shrinking), str(error), error, wait=True)
        else:
            self._failures.clear()
            yield from records

    def _fail(self, attempt: _Attempt, reason: str, error: Exception, *, wait: bool = False) -> None:
        key = str(attempt[0])
        self._failures[key] += 1
        if self._failures[key] >= self._max_failures:
            raise ClusterError(
                f"block {key} failed {self._failures[key]} times while no other block was finished: {reason}. Look at "
                "the workers' logs; if they were killed for their memory, start them with a nanny, more memory or "
                "fewer threads each, or plan for less with memory_limit"
            ) from error
        if wait:
            self._later.append((monotonic() + _BACKOFF_SECONDS * 2 ** self._failures[key], attempt))
        else:
            self._again.append(attempt)

    def _reconnect(self, attempt: _Attempt, error: Exception) -> None:
        """Wait for a lost scheduler, or another one at its address, and submit all its tasks again."""
        self._again += [attempt, *self._pending.values()]
        self._pending.clear()
        while not self._is_delivered_again():
            threading.Event().wait(_POLL_SECONDS)
            if self._client.status not in {"connecting", "running"}:
                raise ClusterError(
                    "the scheduler is gone and did not come back in time; every finished tile is stored, and the same "
                    "call or command resumes once it is there again"
                ) from error

    def _is_delivered_again(self) -> bool:
        """Send the job to the workers of a scheduler that is back, if it has any and stays."""
        if self._client.status != "running":
            return False
        try:
            if not self._client.nthreads():
                return False
            self._deliver()
        except (CommClosedError, OSError):
            return False
        return True

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
        futures, attempts = list(self._pending), [key for key, _ in self._pending.values()]
        self._pending.clear()
        self._client.cancel(futures, force=True)
        waiting = [*(key for key, _ in self._again), *(key for _, (key, _) in self._later)]
        self._again, self._later = deque((key, self._shrinking) for key in [*attempts, *waiting]), []

    def close(self) -> None:
        """Make workers stop, and forget the job."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        if self._client.status != "running" or not self._is_delivered:
            return
        with contextlib.suppress(CommClosedError, OSError):  # the scheduler may go at this moment
            self._client.unsubscribe_topic(_MEMORY_TOPIC)
            self._client.unsubscribe_topic(self._plugin.name)
            if self._pending:
                self._client.cancel(list(self._pending), force=True)
            self._client.unregister_worker_plugin(self._plugin.name)
