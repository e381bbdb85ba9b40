"""The payload of a run on a cluster: a job and the code that it needs, how workers unpack it and run keys of it."""

import contextlib
import gc
import io
import pickle
import socket
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import cloudpickle
from distributed import Reschedule, WorkerPlugin, get_worker

from ntkpipe.base.errors import ClusterError, ConfigError, ModelError
from ntkpipe.base.imports import folder_first, forget_folder
from ntkpipe.base.paths import said
from ntkpipe.executors.pool import is_cancelled, is_leaving, shared_folder, without_frames
from ntkpipe.executors.threads import Job, RunStopped

PLUGIN_PREFIX = "ntkpipe-"


class PayloadMissingError(Exception):
    """A worker lacks the job, since it joined a new scheduler that did not have it yet."""


class Leaving(RunStopped, Reschedule):
    """Raised inside a worker that is about to leave: stop, and let Dask run the key elsewhere."""


def pickle_job(job: object, *, blank: bool = False) -> bytes:
    """Pickle a job, or a ``blank`` one: without the numbers in its tensors."""
    from ntkpipe.executors import pickling  # keeps torch out of the scheduler, which imports this module

    try:
        return pickling.dumps(job, blank=blank)
    except Exception as error:
        raise ModelError(
            f"the model cannot be sent to workers (pickling it raised {error!r}): define its class in a module, in the "
            "workflow's folder, or in __main__, and keep open files, locks and scripted modules out of it"
        ) from error


def pack_code(folder: Path, *, everything: bool = False, most_bytes: int = 64 * 2**20) -> bytes:
    """Zip a folder's Python files, or all its files except stores and hidden files."""
    if not folder.is_dir():
        raise ConfigError(f"code={str(folder)!r} is not a folder; needed the one whose modules are sent to workers")
    buffer = io.BytesIO()
    try:
        sizes = {path: path.stat().st_size for path in _files_of(folder, everything)}
        if sum(sizes.values()) > most_bytes:
            largest = max(sizes, key=lambda path: sizes[path])
            raise ClusterError(
                f"{folder} has {sum(sizes.values()) >> 20} MiB of files to send to workers, at most "
                f"{most_bytes >> 20} MiB are sent; the largest is {largest} ({sizes[largest] >> 20} MiB): keep data "
                "outside of the folder"
            )
        # Reproducibly built files may be dated 1970, before zip's first year.
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
            for path in sizes:
                archive.write(path, path.relative_to(folder))
    except OSError as error:
        raise ClusterError(
            f"cannot send the files of {folder} to workers: {said(error)}; keep other files elsewhere"
        ) from error
    return buffer.getvalue()


def _files_of(folder: Path, everything: bool, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Files below a folder, without stores, virtual environments and links to a parent folder."""
    above |= {folder.resolve()}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir():
            is_foreign = (path / "zarr.json").exists() or (path / "pyvenv.cfg").exists()
            if not is_foreign and path.resolve() not in above:
                yield from _files_of(path, everything, above)
        elif path.is_file() and (everything or path.suffix == ".py"):
            yield path


class JobPlugin(WorkerPlugin):
    """The Dask plugin of a run: brings its job to every worker, also later ones, and removes it at the end."""

    def __init__(self, job: bytes, code: bytes | None, owner: str) -> None:
        self._token = uuid4().hex[:16]
        self.name = f"{PLUGIN_PREFIX}{self._token}@{owner}"  # also the topic of what threads begin
        self._pickled = job  # the first task loads it, so that a failure is one of the task and not of the worker
        self._code = code  # zip archive of its modules

    def carried(self) -> WorkerPlugin:
        """What Dask brings to workers: a shell around this, which those without this package can unpickle, too.

        Dask gives tasks to a worker that fails to load a plugin while it starts, and nothing ever runs them.
        """

        class Shell(WorkerPlugin):  # pickled by value, since no module has it
            def __init__(self, name: str, kind: bytes, contents: dict[str, Any]) -> None:
                self.name, self.kind, self.contents = name, kind, contents
                self.job_plugin: Any = None

            def setup(self, worker: Any) -> None:
                try:
                    found = cloudpickle.loads(self.kind)
                except ImportError:
                    return  # its first task ends it, and others do that
                self.job_plugin = found.__new__(found)
                vars(self.job_plugin).update(self.contents)
                self.job_plugin.setup(worker)

            def teardown(self, worker: Any) -> None:
                if self.job_plugin is not None:
                    self.job_plugin.teardown(worker)

        return Shell(self.name, cloudpickle.dumps(type(self)), vars(self))

    def setup(self, worker: Any) -> None:
        """Dask calls this in each worker, with a copy of its own."""
        self._folder = Path(worker.local_directory) / f"ntkpipe-{self._token}"
        self._shared = shared_folder(worker)
        self._lock = threading.Lock()
        self._job: Job[Any, Any] | None = None
        self._mine = threading.local()
        self._session = contextlib.ExitStack()
        self._num_running = 0

    def teardown(self, worker: Any) -> None:
        """Dask calls this in each worker when the run has ended."""
        if self._job is not None:
            self._job.close()
        self._job, self._mine = None, threading.local()
        gc.collect()  # what threads have opened refers to itself, and a next run would find its memory taken

    def run(self, worker: Any, key: Any, shrinking: int) -> list[Any]:
        """Run one key in a thread of a worker."""
        mine = self._mine
        mine.worker, mine.task = worker, worker.get_current_task()
        with self._in_session() as job:
            opened = vars(mine).setdefault("opened", {})
            if shrinking not in opened:
                opened.clear()  # larger ones are no longer needed
                worker.log_event(self.name, {"worker": worker.address})
                for _ in range(shrinking):
                    job = job.shrunk()
                opened[shrinking] = job.open(self._pause, self._shared)
            with without_frames():
                return list(opened[shrinking](key))

    def _unpickle(self) -> Job[Any, Any]:
        try:
            return _load(self._pickled, self._code, self._folder)  # type: ignore[no-any-return]
        except Exception as error:
            raise ClusterError(
                f"a worker on {socket.gethostname()} cannot load the model: {error!r}. Install the same packages "
                "there, or put the module into the workflow's folder, which is sent along"
            ) from error

    @contextlib.contextmanager
    def _in_session(self) -> Iterator[Job[Any, Any]]:
        """Unpickle the job once, and hold its process-wide settings while any thread runs a key."""
        with self._lock:
            job = self._job = self._job or self._unpickle()
            if self._num_running == 0:
                self._session.enter_context(job.session())
            self._num_running += 1
        try:
            yield job
        finally:
            with self._lock:
                self._num_running -= 1
                if self._num_running == 0:
                    self._session.close()

    def _pause(self) -> None:
        """Stop work that was cancelled, or that this worker cannot finish since it is about to leave."""
        if is_cancelled(self._mine.worker, self._mine.task):
            raise RunStopped
        if is_leaving(self._mine.worker):
            raise Leaving


def unpack_code(code: bytes, folder: Path) -> None:
    """Unpack an archive of :func:`pack_code`; an existing folder is complete."""
    if folder.exists():
        return
    temporary = folder.with_name(f"{folder.name}.{uuid4().hex}.partial")
    with zipfile.ZipFile(io.BytesIO(code)) as archive:
        archive.extractall(temporary)
    temporary.rename(folder)


def _load(pickled: bytes, code: bytes | None, folder: Path) -> Any:
    """Unpickle, with an archive of code unpacked in a folder."""
    if code is None:
        return cloudpickle.loads(pickled)
    unpack_code(code, folder)
    with folder_first(folder):
        found = cloudpickle.loads(pickled)
    forget_folder(folder)  # another run may have modules of the same names
    return found


def load_once(pickled: bytes, code: bytes | None) -> str:
    """Why a worker cannot import what a blank job needs; empty if it can."""
    with TemporaryDirectory(prefix="ntkpipe-") as folder:
        try:
            _load(pickled, code, Path(folder) / "code")
        except (ImportError, AttributeError, SyntaxError) as error:  # others may come of blank tensors
            return repr(error)
    return ""


def run_key(plugin: str, key: bytes, shrinking: int) -> list[Any]:
    """Run one key; the task that Dask sees."""
    worker = get_worker()
    mine = getattr(worker.plugins.get(plugin), "job_plugin", None)
    if not isinstance(mine, JobPlugin):
        raise PayloadMissingError(plugin)
    return mine.run(worker, pickle.loads(key), shrinking)
