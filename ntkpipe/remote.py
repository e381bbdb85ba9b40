"""A job on the workers of a Dask cluster: what reaches them, how keys are handed out, and what happens when they die.

Tasks are idempotent and return small records, so whatever is lost is simply asked for again: by Dask where a worker
dies, and here where a task has met too many deaths, the scheduler is gone, or workers were killed for their memory.
"""

import contextlib
import io
import pickle
import queue
import threading
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any, Generic, TypeVar
from uuid import uuid4

import cloudpickle
from distributed import Client, Future, KilledWorker, Reschedule, Scheduler, WorkerPlugin, get_worker
from distributed.comm.core import CommClosedError
from distributed.core import Status

from ntkpipe.errors import ClusterError, Interrupted, ModelError, ResourceError, StoreError
from ntkpipe.execute import Job, Stopped
from ntkpipe.imports import folder_first, forget_folder

Key = TypeVar("Key")
Record = TypeVar("Record")

# Of events on the scheduler: a kernel is about to be built.
TOPIC = "ntkpipe"

_Attempt = tuple[Any, int]  # a key, and how often the job was shrunk for it

# Keys that are handed out beforehand, for each thread of a worker: one runs, one waits there.
_KEYS_PER_THREAD = 2
_SPARE_KEYS = 8
_POLL_SECONDS = 1.0
# Workers that are killed for memory within this time are taken for one: they were doing the same.
_GRACE_SECONDS = 10.0
_PLUGIN_PREFIX = "ntkpipe-"
_ALONE_SECONDS = 30.0
_MEMORY_TOPIC = "worker-restart-memory"
# A store that does not answer is tried again after twice as long each time.
_BACKOFF_SECONDS = 1.0
# Sizes are halved at most so often; smaller ones gain nothing.
_MOST_SHRINKING = 8


class _ParcelMissingError(Exception):
    """A worker does not have the job: it came while a new scheduler did not have it yet."""


class ClusterExecutor(Generic[Key, Record]):
    """Workers of a Dask cluster; see :class:`ntkpipe.execute.Executor`.

    The job reaches each worker once, as a worker plugin, also those that join later. Keys are handed out in a window
    of a few for each thread, so neither driver nor scheduler holds many tasks.

    Parameters
    ----------
    client
        Connected to the cluster.
    name
        Of the tasks on the dashboard, as ``pntk``.
    code
        A zip archive with modules that the job's classes are imported from, or none; see :func:`pack_code`.
    max_failures
        A key whose workers died in so many attempts, each of several deaths, without progress elsewhere ends the run.
    """

    def __init__(self, client: Client, *, name: str, code: bytes | None = None, max_failures: int = 5) -> None:
        self._client = client
        self._name = name
        self._code = code
        self._max_failures = max_failures

    def run(self, job: Job[Key, Record], keys: Iterable[Key]) -> Generator[Record, None, None]:
        """See :class:`ntkpipe.execute.Executor`. Records of a key come when it is done.

        Yields
        ------
        What the job yields.

        Raises
        ------
        Interrupted
            On Ctrl-C; workers leave their work at the next piece.
        ModelError
            If the job cannot be pickled.
        ClusterError
            If the cluster is lost, or the same key kills its workers again and again.
        ResourceError
            If workers exceed their memory whatever is done.
        NtkpipeError
            What the job raises in a worker.
        """
        running = _Run(self._client, self._name, job, self._code, self._max_failures)
        try:
            yield from running.records(iter(keys))
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted; workers leave their work") from error
        finally:
            running.close()


class _Run(Generic[Key, Record]):
    """One call of :meth:`ClusterExecutor.run`."""

    def __init__(self, client: Client, name: str, job: Job[Key, Record], code: bytes | None, max_failures: int) -> None:
        self._client = client
        self._token = uuid4().hex[:16]
        self._prefix = f"{name}-{self._token}"
        self._max_failures = max_failures
        self._plugin = _JobPlugin(_Parcel(self._token, _pickle(job), code), owner=client.id)
        self._pending: dict[Future[list[Record]], _Attempt] = {}
        self._again: deque[_Attempt] = deque()
        self._later: list[tuple[float, _Attempt]] = []
        self._failures: Counter[str] = Counter()
        self._events: queue.SimpleQueue[Future[list[Record]] | float] = queue.SimpleQueue()
        self._busy: set[str] = set()  # addresses of workers that have begun a key of this run
        self._shrinking = 0
        self._shrunk_at = -_GRACE_SECONDS
        self._attempts = 0
        self._num_threads = 0
        self._alone_since: float | None = None
        self._counted_at = -_POLL_SECONDS

    def records(self, keys: Iterator[Key]) -> Iterator[Record]:
        for name in self._client.run_on_scheduler(_plugins_of_the_dead):
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
                elif event in self._pending:
                    yield from self._finish(event)

    def _deliver(self) -> None:
        """Give the job to every worker that is there, and to those that will come."""
        self._client.subscribe_topic(self._plugin.name, lambda event: self._busy.add(event[1]["worker"]))
        self._client.subscribe_topic(_MEMORY_TOPIC, self._note_memory)
        self._client.register_plugin(self._plugin, name=self._plugin.name)

    def _note_memory(self, event: tuple[float, dict[str, Any]]) -> None:
        """A nanny has killed a worker; others' work may be on the same cluster."""
        if event[1]["worker"] in self._busy:
            self._events.put(monotonic())

    def _window(self) -> int:
        if monotonic() - self._counted_at > _POLL_SECONDS:
            # Where the scheduler is gone, its futures are cancelled and say so.
            with contextlib.suppress(CommClosedError, OSError):
                self._num_threads = sum(self._client.nthreads().values())
            self._counted_at = monotonic()
            self._warn_if_alone()
        return _KEYS_PER_THREAD * self._num_threads + _SPARE_KEYS

    def _warn_if_alone(self) -> None:
        """Say that nothing goes on, once each time that the last worker has been gone for a while."""
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
            _run_key,
            self._token,
            pickle.dumps(key),  # the scheduler looks into arguments, and shall not need what keys are made of
            shrinking,
            key=(self._prefix, str(key), self._attempts),
            priority=-self._attempts,
            pure=False,
        )
        self._pending[future] = (key, shrinking)
        future.add_done_callback(self._events.put)

    def _finish(self, future: "Future[list[Record]]") -> Iterator[Record]:
        key, shrinking = self._pending.pop(future)
        try:
            records = future.result()
        except KilledWorker as error:
            self._fail((key, shrinking), f"its workers died ({error.last_worker.address} the last)", error)
        except (CancelledError, CommClosedError) as error:
            self._reconnect((key, shrinking), error)
        except _ParcelMissingError:
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
        """The scheduler is gone, and every task with it: wait for it, or for another one at its address."""
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
        """Give the job to the workers of a scheduler that is there again, if it has any and stays."""
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
        """A nanny killed a worker for its memory: everything that is not done is tried in half the memory."""
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
        """Tell workers to leave what they are doing, and to forget the job."""
        if self._client.status != "running":
            return
        with contextlib.suppress(CommClosedError, OSError):  # the scheduler may go this moment
            self._client.unsubscribe_topic(_MEMORY_TOPIC)
            self._client.unsubscribe_topic(self._plugin.name)
            if self._pending:
                self._client.cancel(list(self._pending), force=True)
            self._client.unregister_worker_plugin(self._plugin.name)


def _pickle(job: object) -> bytes:
    try:
        pickled: bytes = cloudpickle.dumps(job)
    except Exception as error:
        raise ModelError(
            f"the model cannot be sent to workers (pickling it raised {error!r}): define its class in a module, in the "
            "workflow's folder, or in __main__, and keep open files, locks and scripted modules out of it"
        ) from error
    return pickled


def pack_code(folder: Path, *, everything: bool = False, most_bytes: int = 64 * 2**20) -> bytes:
    """A zip archive of a folder's Python files, or of all its files but stores and hidden ones.

    Raises
    ------
    ClusterError
        If it is too large, naming the largest file.
    """
    sizes = {path: path.stat().st_size for path in _files_of(folder, everything)}
    if sum(sizes.values()) > most_bytes:
        largest = max(sizes, key=lambda path: sizes[path])
        raise ClusterError(
            f"{folder} has {sum(sizes.values()) >> 20} MiB of files to send to workers, at most {most_bytes >> 20} MiB "
            f"are sent; the largest is {largest} ({sizes[largest] >> 20} MiB): keep data outside of the folder"
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sizes:
            archive.write(path, path.relative_to(folder))
    return buffer.getvalue()


def _files_of(folder: Path, everything: bool) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            if not (path / "zarr.json").exists():
                yield from _files_of(path, everything)
        elif path.is_file() and (everything or path.suffix == ".py"):
            yield path


@dataclass(frozen=True)
class _Parcel:
    """What a worker needs of a run.

    Attributes
    ----------
    token
        Of the run.
    job
        Pickled: opened by the first task, so that what goes wrong is an error of the task and not of the worker.
    code
        Zip archive with its modules.
    """

    token: str
    job: bytes
    code: bytes | None


class _JobPlugin(WorkerPlugin):
    """Brings a parcel to every worker, and removes what it has become there; its name says whose it is."""

    def __init__(self, parcel: _Parcel, owner: str) -> None:
        self.name = f"{_PLUGIN_PREFIX}{parcel.token}@{owner}"
        self.parcel = parcel

    def setup(self, worker: Any) -> None:
        _OPENED[worker.id, self.parcel.token] = _Opened(self.parcel, Path(worker.local_directory), self.name)

    def teardown(self, worker: Any) -> None:
        _OPENED.pop((worker.id, self.parcel.token), None)


def _plugins_of_the_dead(dask_scheduler: Scheduler) -> list[str]:
    """Plugins of drivers that were killed: a scheduler would keep their models, and give them to every new worker."""
    plugins = [name for name in dask_scheduler.worker_plugins if name.startswith(_PLUGIN_PREFIX)]
    return [name for name in plugins if name.partition("@")[2] not in dask_scheduler.clients]


# In a worker's process: the parcels that have arrived, by worker (threads of one process may hold several) and run.
_OPENED: dict[tuple[str, str], "_Opened"] = {}


class _Opened:
    """A parcel in a worker."""

    def __init__(self, parcel: _Parcel, folder: Path, topic: str) -> None:
        self._parcel = parcel
        self._topic = topic
        self._folder = folder / f"ntkpipe-{parcel.token}"
        self._lock = threading.Lock()
        self._jobs: dict[int, Job[Any, Any]] = {}
        self._mine = threading.local()
        self._session = contextlib.ExitStack()
        self._num_running = 0

    def run(self, worker: Any, key: Any, shrinking: int) -> list[Any]:
        self._mine.worker, self._mine.task = worker, worker.get_current_task()
        job = self._job(shrinking)
        with self._in_session(job):
            opened = vars(self._mine).setdefault("opened", {})
            if shrinking not in opened:
                opened.clear()  # larger ones are not wanted any more
                worker.log_event(self._topic, {"worker": worker.address})
                opened[shrinking] = job.open(self._pause)
            return list(opened[shrinking](key))

    def _job(self, shrinking: int) -> Job[Any, Any]:
        with self._lock:
            if not self._jobs:
                self._jobs[0] = self._unpickle()
            for level in range(len(self._jobs), shrinking + 1):
                self._jobs[level] = self._jobs[level - 1].shrunk()
            return self._jobs[shrinking]

    def _unpickle(self) -> Job[Any, Any]:
        parcel = self._parcel
        try:
            if parcel.code is None:
                found = cloudpickle.loads(parcel.job)
            else:
                unpack_code(parcel.code, self._folder)
                with folder_first(self._folder):
                    found = cloudpickle.loads(parcel.job)
                forget_folder(self._folder)  # another run may have modules of the same names
        except Exception as error:
            raise ClusterError(
                f"a worker cannot load the model: {error!r}. Install the same packages there, or put the module into "
                "the workflow's folder, which is sent along"
            ) from error
        job: Job[Any, Any] = found
        return job

    @contextlib.contextmanager
    def _in_session(self, job: Job[Any, Any]) -> Iterator[None]:
        """Settings of the process, entered by the first thread and left by the last one."""
        with self._lock:
            if self._num_running == 0:
                self._session.enter_context(job.session())
            self._num_running += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_running -= 1
                if self._num_running == 0:
                    self._session.close()

    def _pause(self) -> None:
        """Leave work that nobody waits for any more, or that this worker will not finish since it is about to leave."""
        worker = self._mine.worker
        state = worker.state.tasks.get(self._mine.task)
        if state is None or state.state == "cancelled":
            raise Stopped
        if worker.status in (Status.closing, Status.closing_gracefully, Status.closed):
            raise Reschedule


def unpack_code(code: bytes, folder: Path) -> None:
    """Unpack what :func:`pack_code` packed; a folder that is there is complete."""
    if folder.exists():
        return
    temporary = folder.with_name(f"{folder.name}.{uuid4().hex}.partial")
    with zipfile.ZipFile(io.BytesIO(code)) as archive:
        archive.extractall(temporary)
    temporary.rename(folder)


def _run_key(token: str, key: bytes, shrinking: int) -> list[Any]:
    """What Dask runs for one key."""
    worker = get_worker()
    opened = _OPENED.get((worker.id, token))
    if opened is None:
        raise _ParcelMissingError(token)
    return opened.run(worker, pickle.loads(key), shrinking)
