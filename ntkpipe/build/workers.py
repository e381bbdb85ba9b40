"""What a run computes with: threads of this process, or the workers of a cluster, which are inspected first."""

import os
import platform
import socket
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import torch

from ntkpipe.base.config import RunSpec
from ntkpipe.base.errors import ClusterError
from ntkpipe.base.resources import available_memory, process_memory
from ntkpipe.build.plan import SHARE_OF_LIMIT, BlockTask, Machine
from ntkpipe.build.prepare import measure_rates, this_machine
from ntkpipe.build.records import BuildRecord
from ntkpipe.build.request import Request
from ntkpipe.executors.threads import Executor
from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.model.device import describe_arithmetic
from ntkpipe.jacobian.model.functional import DTYPES, resolve_device
from ntkpipe.store.store import Store

if TYPE_CHECKING:
    from distributed import Client, Worker

Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Resources:
    """What a run may use."""

    run: RunSpec  # its limits
    progress: bool  # whether progress bars are shown
    client: "Client | None" = None  # of the cluster that computes; none for threads of this process
    cluster: Machine | None = None  # its workers
    code: str | Path | None = None  # folder that is sent to them

    @property
    def device(self) -> str | None:
        """Where this process probes the model: like the workers if it can, since only they may have a GPU."""
        if self.cluster is None:
            return self.run.device
        return "cpu" if self.cluster.device == "cpu" else None

    def machine(self, engine: Engine, free_disk: int | None) -> Machine:
        """What computes, for a plan."""
        if self.cluster is None:
            return this_machine(engine, self.run, free_disk=free_disk)
        limit = min(self.cluster.memory_limit, self.run.memory_limit or self.cluster.memory_limit)
        return replace(self.cluster, memory_limit=limit, free_disk=free_disk)

    def without_self_check(self) -> "Resources":
        """The same, for work on a store whose model was checked before."""
        return replace(self, run=self.run.model_copy(update={"self_check": False}))

    def executor(self, store: Store) -> Executor[BlockTask, BuildRecord] | None:
        """Distributes blocks to the workers, once they have shown that they reach the store; none without a cluster."""
        if self.client is None:
            return None
        from ntkpipe.executors.dask import TOPIC, ClusterExecutor  # keeps distributed out of runs on one machine
        from ntkpipe.executors.payload import pack_code

        require_shared_store(self.client, store)
        self.client.log_event(TOPIC, {"store": str(store.root), "state": "building"})
        packed = None if self.code is None else pack_code(Path(self.code))
        return ClusterExecutor(self.client, name=store.manifest.kind, code=packed)


def find_resources(request: Request, client: "Client | None", code: str | Path | None, progress: bool) -> Resources:
    """Threads of this process, or the workers of a client's cluster; prints where its dashboard is."""
    run = request.run
    if client is None:
        return Resources(run, progress)
    from ntkpipe.executors.connect import require_workers

    require_workers(client)
    found = inspect_workers(client, DTYPES[request.kernel.resolved_accumulate_dtype()], run.device)
    if progress:
        each = f"{found.workers} thread{'s' if found.workers > 1 else ''}"
        where = f"{found.processes} workers of {each} on {found.device} ({found.arithmetic})"
        print(f"cluster: {where}; dashboard {client.dashboard_link}", file=sys.stderr)
    return Resources(run, progress, client, found, code)


@dataclass(frozen=True)
class WorkerFacts:
    """What one worker says about itself."""

    host: str
    versions: dict[str, str]  # of Python and of the packages that matter
    machine: Machine  # its threads, what a plan may use of its memory, its device


def _ask(client: "Client", request: Callable[..., Reply], *arguments: Any) -> dict[str, Reply]:
    """Call a function in every worker; workers that die meanwhile are left out."""
    replies: Mapping[str, Any] = client.run(request, *arguments, on_error="return")
    failed = {address: reply for address, reply in replies.items() if isinstance(reply, BaseException)}
    # Dask reports a worker that no longer answers by an OSError (CommClosedError is one).
    if any(isinstance(error, OSError) for error in failed.values()):
        there = client.nthreads()
        failed = {address: e for address, e in failed.items() if address in there or not isinstance(e, OSError)}
    if failed:
        address, error = next(iter(failed.items()))
        missing = isinstance(error, ModuleNotFoundError)
        raise ClusterError(
            f"{len(failed)} of {len(replies)} workers fail, the first at {address}: {error!r}."
            + (" Install ntkpipe[compute,cluster] there, in the version that is used here" if missing else "")
        ) from error
    return {address: reply for address, reply in replies.items() if not isinstance(reply, BaseException)}


def inspect_workers(client: "Client", dtype: torch.dtype, device: str | None = None) -> Machine:
    """Ask every worker what it is, and sum up the reports for the plan."""
    from ntkpipe.executors.connect import address_of, require_package, require_workers

    require_package(client)
    reports = _ask(client, report_worker, dtype, device)
    if not reports:  # all have died, for example in a run that took too much memory
        require_workers(client)
        reports = _ask(client, report_worker, dtype, device)
    if not reports:
        raise ClusterError(f"{address_of(client)} has no workers")
    every = list(reports.values())
    for name, ours in versions().items():
        mine = f"{socket.gethostname()} (this process)", ours
        found = _differing([mine, *((r.host, r.versions[name]) for r in every)])
        if found and name == "ntkpipe":
            raise ClusterError(f"versions of ntkpipe differ: {found}; install the same one everywhere")
        if found:
            warnings.warn(f"versions of {name} differ: {found}; results may agree to rounding only", stacklevel=3)
    machines = [report.machine for report in every]
    if devices := _differing((r.host, r.machine.device) for r in every):
        raise ClusterError(f"workers have different devices: {devices}; use workers of one type")
    if arithmetic := _differing((r.host, r.machine.arithmetic) for r in every):
        warnings.warn(
            f"workers compute differently: {arithmetic}; tiles agree to rounding, not to the last bit", stacklevel=3
        )
    workers = max(machine.workers for machine in machines)
    if machines[0].device != "cpu" and workers > 1:
        raise ClusterError(
            "workers with a GPU have several threads; a GPU has one worker: start them with --nthreads 1"
        )
    return replace(
        machines[0],
        processes=len(machines),
        workers=workers,
        memory_limit=min(machine.memory_limit for machine in machines),
        base_memory=max(machine.base_memory for machine in machines),
        flops_per_second=sum(machine.flops_per_second for machine in machines) / len(machines),
    )


def report_worker(dtype: torch.dtype, device: str | None, dask_worker: "Worker | None" = None) -> WorkerFacts:
    """Report of this worker; Dask calls it there, and fills in the last argument by its name."""
    assert dask_worker is not None
    found = resolve_device(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rate = measure_rates(found, dtype).product
    finally:
        torch.set_num_threads(threads)
    machine = Machine(
        workers=dask_worker.state.nthreads,
        memory_limit=int(SHARE_OF_LIMIT * (dask_worker.memory_manager.memory_limit or available_memory())),
        base_memory=process_memory(),
        free_disk=None,
        flops_per_second=rate,
        device=str(found),
        is_remote=True,
        arithmetic=describe_arithmetic(found),
    )
    return WorkerFacts(socket.gethostname(), versions(), machine)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    packages = ("ntkpipe", "torch", "numpy", "zarr")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _differing(values: Iterable[tuple[str, str]]) -> str:
    """``2.13 on a, b; 2.12 on c`` if the values of (host, value) differ, else an empty text."""
    hosts: defaultdict[str, set[str]] = defaultdict(set)
    for host, value in values:
        hosts[value].add(host)
    if len(hosts) == 1:
        return ""
    return "; ".join(f"{value} on {', '.join(sorted(names))}" for value, names in sorted(hosts.items()))


def require_shared_store(client: "Client", store: Store) -> None:
    """Check that every worker can write, read and delete in the store as this process sees it."""
    ours = f"{uuid4().hex}.partial"  # listings skip this name, and the end of a run removes it
    store.medium.put(ours, ours.encode())
    try:
        problems = {address: problem for address, problem in _ask(client, _try_store, store, ours).items() if problem}
    finally:
        store.medium.delete(ours)
    if problems:
        listed = "; ".join(f"{address}: {problem}" for address, problem in list(problems.items())[:5])
        raise ClusterError(
            f"{len(problems)} workers do not reach the store {store.root}: {listed}. It must be at the same path on "
            "a disk that all of them share, or a URL of an object store with credentials in every worker's environment"
        )


def _try_store(store: Store, token: str) -> str:
    """Why this worker cannot use the store; empty if it can."""
    mine = f"{uuid4().hex}.partial"
    where = f"host {socket.gethostname()}, process {os.getpid()}"
    try:
        step = "write there"
        store.medium.put(mine, mine.encode())
        step = "read what it wrote there"
        if store.medium.get(mine) != mine.encode():
            return f"{where} reads something else than it wrote"
        step = "delete there"
        store.medium.delete(mine)
        step = "see what this run's driver wrote there (another disk?)"
        if store.medium.get(token) != token.encode():
            return f"{where} reads something else than the driver wrote"
    except OSError as error:
        return f"{where} cannot {step}: {error}"
    return ""
