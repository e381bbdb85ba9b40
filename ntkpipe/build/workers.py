"""What a run computes with: threads of this process, or the workers of a cluster, which are inspected first."""

import os
import platform
import socket
import sys
import warnings
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING
from uuid import uuid4

import torch

from ntkpipe.base.config import RealDtype, RunSpec
from ntkpipe.base.errors import ClusterError
from ntkpipe.base.paths import said
from ntkpipe.base.resources import local_disk_room
from ntkpipe.build.plan import SHARE_OF_LIMIT, BlockTask, Machine
from ntkpipe.build.prepare import exact_single_thread, measure_rates, this_machine
from ntkpipe.build.records import BuildRecord
from ntkpipe.executors.threads import Executor, ThreadExecutor
from ntkpipe.jacobian.model.device import describe_arithmetic
from ntkpipe.jacobian.model.functional import DTYPES, resolve_device
from ntkpipe.store.media.medium import Medium, writing
from ntkpipe.store.store import Store

if TYPE_CHECKING:
    from distributed import Client


_MODEL_HINT = (
    "Install the same packages there, or have the module sent along: in a workflow, put it into the file's folder; in "
    "Python, give code='FOLDER'"
)


@dataclass(frozen=True)
class Resources:
    """What a run may use."""

    run: RunSpec  # its limits
    client: "Client | None" = None  # of the cluster that computes; none for threads of this process
    cluster: Machine | None = None  # its workers
    code: bytes | None = None  # zip archive of modules that is sent to them

    @property
    def device(self) -> str | None:
        """Where this process probes the model: like the workers if it can, since only they may have a GPU."""
        if self.cluster is None:
            return self.run.device
        return "cpu" if self.cluster.device == "cpu" else None

    def machine(self, device: torch.device, rate: float, free_disk: int | None) -> Machine:
        """What computes, for a plan; ``rate`` is that of a worker here."""
        if self.cluster is None:
            machine = this_machine(device, rate, self.run, free_disk=free_disk)
            return replace(machine, scratch_bytes=local_disk_room(Path(gettempdir())))
        limit = min(self.cluster.memory_limit, self.run.memory_limit or self.cluster.memory_limit)
        return replace(self.cluster, memory_limit=limit, free_disk=free_disk)

    def where_computed(self, device: torch.device) -> tuple[str, str]:
        """Type of the computing device, here or on the workers, and what decides the last bits there."""
        if self.cluster is not None:
            return torch.device(self.cluster.device).type, self.cluster.arithmetic
        return device.type, describe_arithmetic(device)

    def executor(self, store: Store, num_threads: int) -> Executor[BlockTask, BuildRecord]:
        """Threads, or what distributes blocks to the workers."""
        if self.client is None:
            return ThreadExecutor(num_threads)
        from ntkpipe.executors.dask import TOPIC, ClusterExecutor  # keeps distributed out of runs on one machine

        self.client.log_event(TOPIC, {"store": str(store.root), "state": "building"})
        return ClusterExecutor(self.client, name=store.manifest.kind, code=self.code)

    def require_model(self, model: object) -> None:
        """Check that every worker can load the model, of which it is sent everything but the numbers."""
        assert self.client is not None
        from ntkpipe.executors.payload import load_once, pickle_job
        from ntkpipe.executors.pool import WorkerPool

        pool: WorkerPool[None] = WorkerPool(self.client)
        pool.require("cannot load the model", _MODEL_HINT, load_once, pickle_job(model, blank=True), self.code)

    def require_medium(self, medium: Medium) -> None:
        """Check that every worker can write, read and delete where the store is or will be, as this process sees it."""
        if self.client is not None:
            require_shared_medium(self.client, medium)


def find_resources(
    run: RunSpec, dtype: RealDtype, client: "Client | None", code: str | Path | None, progress: bool
) -> Resources:
    """Threads of this process, or the workers of a client's cluster; prints where its dashboard is."""
    if client is None:
        return Resources(run)
    found = inspect_workers(client, DTYPES[dtype], run.device)
    if progress:
        each = f"{found.workers} thread{'s' if found.workers > 1 else ''}"
        where = f"{found.processes} workers of {each} on {found.device} ({found.arithmetic})"
        print(f"cluster: {where}; dashboard {client.dashboard_link}", file=sys.stderr)
    packed = None
    if code is not None:
        from ntkpipe.executors.payload import pack_code

        packed = pack_code(Path(code))
    return Resources(run, client, found, packed)


@dataclass(frozen=True)
class WorkerFacts:
    """What computing needs to know about a worker, beside its resources."""

    versions: dict[str, str]  # of Python and of the packages that matter
    device: str
    arithmetic: str
    flops_per_second: float


def inspect_workers(client: "Client", dtype: torch.dtype, device: str | None = None) -> Machine:
    """Ask every worker what it is, and sum up the reports for the plan."""
    from ntkpipe.executors.pool import WorkerPool, differing
    from ntkpipe.executors.preflight import ask_all

    pool: WorkerPool[None] = WorkerPool(client)
    every = list(ask_all(client, lambda: pool.ask(describe_worker, dtype, device)).values())
    for name, ours in versions().items():
        mine = f"{socket.gethostname()} (this process)", ours
        if found := differing([mine, *((each.host, each.found.versions[name]) for each in every)]):
            warnings.warn(f"versions of {name} differ: {found}; results may agree to rounding only", stacklevel=3)
    if devices := differing((each.host, each.found.device) for each in every):
        raise ClusterError(f"workers have different devices: {devices}; use workers of one type")
    if arithmetic := differing((each.host, each.found.arithmetic) for each in every):
        warnings.warn(
            f"workers compute differently: {arithmetic}; tiles agree to rounding, not to the last bit", stacklevel=3
        )
    machine = Machine(
        workers=max(each.threads for each in every),
        memory_limit=min(int(SHARE_OF_LIMIT * (each.memory_limit or each.available_memory)) for each in every),
        base_memory=max(each.base_memory for each in every),
        free_disk=None,
        flops_per_second=sum(each.found.flops_per_second for each in every) / len(every),
        device=every[0].found.device,
        processes=len(every),
        is_remote=True,
        arithmetic=every[0].found.arithmetic,
        scratch_bytes=min(each.scratch_bytes for each in every),
        num_scratch=len({(each.host, each.folder) for each in every}),
    )
    if machine.device != "cpu" and machine.workers > 1:
        raise ClusterError(
            "workers with a GPU have several threads; a GPU has one worker: start them with --nthreads 1"
        )
    return machine


def describe_worker(dtype: torch.dtype, device: str | None) -> WorkerFacts:
    """Say what this worker computes with, and how fast."""
    found = resolve_device(device)
    with exact_single_thread():
        rate = measure_rates(found, dtype).product
    return WorkerFacts(versions(), str(found), describe_arithmetic(found), rate)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    packages = ("ntkpipe", "torch", "numpy", "zarr")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def environment() -> dict[str, str]:
    """What a manifest says of where and when it was made."""
    return {
        **versions(),
        "host": socket.gethostname(),
        "processor": platform.processor() or platform.machine(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def require_shared_medium(client: "Client", medium: Medium) -> None:
    """Check that every worker can write, read and delete where a store is or will be, and leave nothing there."""
    from ntkpipe.executors.pool import WorkerPool

    pool: WorkerPool[None] = WorkerPool(client)
    place, ours = medium.nearest(), f"{uuid4().hex}.partial"  # listings skip this name, and the end of a run removes it
    with writing(place):
        place.put(ours, ours.encode())
    try:
        pool.require_shared(f"the store {medium.root}", _try_medium, place, ours)
    finally:
        place.delete(ours)


def _try_medium(medium: Medium, theirs: str) -> str:
    """Why this worker cannot use the medium; empty if it can."""
    mine, step = f"{uuid4().hex}.partial", "see what this run's driver wrote there (another disk?)"
    try:
        is_same = medium.get(theirs) == theirs.encode()
        step = "write there"
        medium.put(mine, mine.encode())
        step = "read what it wrote there"
        is_same &= medium.get(mine) == mine.encode()
        step = "delete there"
        medium.delete(mine)
    except OSError as error:
        return f"process {os.getpid()} cannot {step}: {said(error)}"
    return "" if is_same else f"process {os.getpid()} reads something else than was written"
