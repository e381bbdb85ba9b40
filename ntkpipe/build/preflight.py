"""Before a run on a cluster: what every worker is, in what they differ, and whether all of them reach the store."""

import os
import platform
import socket
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar
from uuid import uuid4

import torch
from distributed import Client, Worker
from distributed.comm.core import CommClosedError

from ntkpipe.base.errors import ClusterError
from ntkpipe.base.resources import available_memory, process_memory
from ntkpipe.build.plan import SHARE_OF_LIMIT, ClusterWorkers
from ntkpipe.build.prepare import measure_rates
from ntkpipe.executors.connect import address_of, require_package, require_workers
from ntkpipe.jacobian.model.device import describe_arithmetic
from ntkpipe.jacobian.model.functional import resolve_device
from ntkpipe.store.chunks import Store

Answer = TypeVar("Answer")

VERSIONS = ("ntkpipe", "torch", "numpy", "zarr")


@dataclass(frozen=True)
class WorkerReport:
    """What one worker is."""

    host: str  # its name
    # device, arithmetic: type of device, and what decides the last bits: see
    # :func:`ntkpipe.jacobian.model.device.describe_arithmetic`
    device: str
    arithmetic: str
    versions: dict[str, str]  # of Python and of the packages that matter
    num_threads: int  # keys that it does at a time
    memory_limit: int  # bytes that it may use before it is ended
    base_memory: int  # bytes that it holds now
    flops_per_second: float  # rate of one thread's matrix products


def _ask(client: Client, question: Callable[..., Answer], *arguments: Any) -> dict[str, Answer]:
    """Call a function in every worker; one that dies meanwhile is left out."""
    answers: Mapping[str, Any] = client.run(question, *arguments, on_error="return")
    failed = {address: answer for address, answer in answers.items() if isinstance(answer, BaseException)}
    if any(map(_is_lost, failed.values())):
        there = client.nthreads()
        failed = {address: error for address, error in failed.items() if address in there or not _is_lost(error)}
    if failed:
        address, error = next(iter(failed.items()))
        missing = isinstance(error, ModuleNotFoundError)
        raise ClusterError(
            f"{len(failed)} of {len(answers)} workers fail, the first at {address}: {error!r}."
            + (" Install ntkpipe[compute,cluster] there, in the version that is used here" if missing else "")
        ) from error
    return {address: answer for address, answer in answers.items() if not isinstance(answer, BaseException)}


def _is_lost(error: BaseException) -> bool:
    """Whether it is what Dask says of a worker that does not answer any more."""
    return isinstance(error, CommClosedError | OSError)


def inspect_workers(client: Client, dtype: torch.dtype, device: str | None = None) -> ClusterWorkers:
    """Ask every worker what it is; sum them up for the plan."""
    require_package(client)
    reports = _ask(client, report_worker, dtype, device)
    if not reports:  # all that there were have died, as after a run that took too much memory
        require_workers(client)
        reports = _ask(client, report_worker, dtype, device)
    if not reports:
        raise ClusterError(f"{address_of(client)} has no workers")
    here = _versions()
    for name in ("python", *VERSIONS):
        by_host = {(r.host, address): r.versions[name] for address, r in reports.items()}
        found = _differing({**by_host, (f"{socket.gethostname()} (this process)", ""): here[name]})
        if found and name == "ntkpipe":
            raise ClusterError(f"versions of ntkpipe differ: {found}; install the same one everywhere")
        if found:
            warnings.warn(f"versions of {name} differ: {found}; results may agree to rounding only", stacklevel=3)
    devices = _differing({(r.host, address): r.device for address, r in reports.items()})
    if devices:
        raise ClusterError(f"workers have different devices: {devices}; use workers of one type")
    arithmetic = _differing({(r.host, address): r.arithmetic for address, r in reports.items()})
    if arithmetic:
        warnings.warn(
            f"workers compute differently: {arithmetic}; tiles agree to rounding, not to the last bit", stacklevel=3
        )
    every = list(reports.values())
    if every[0].device != "cpu" and any(r.num_threads > 1 for r in every):
        raise ClusterError(
            "workers with a GPU have several threads; a GPU has one worker: start them with --nthreads 1"
        )
    return ClusterWorkers(
        processes=len(every),
        threads=max(r.num_threads for r in every),
        memory_limit=int(SHARE_OF_LIMIT * min(r.memory_limit for r in every)),
        base_memory=max(r.base_memory for r in every),
        flops_per_second=sum(r.flops_per_second for r in every) / len(every),
        device=every[0].device,
        arithmetic=every[0].arithmetic,
    )


def report_worker(dtype: torch.dtype, device: str | None, dask_worker: Worker | None = None) -> WorkerReport:
    """What this worker is; called in it, by Dask, which knows the name of the last argument."""
    assert dask_worker is not None
    found = resolve_device(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rate = measure_rates(found, dtype).product
    finally:
        torch.set_num_threads(threads)
    return WorkerReport(
        host=socket.gethostname(),
        device=str(found),
        arithmetic=describe_arithmetic(found),
        versions=_versions(),
        num_threads=dask_worker.state.nthreads,
        memory_limit=dask_worker.memory_manager.memory_limit or available_memory(),
        base_memory=process_memory(),
        flops_per_second=rate,
    )


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}


def _differing(values: Mapping[tuple[str, str], str]) -> str:
    """``2.13 on a, b; 2.12 on c`` if there are several values; else nothing."""
    hosts: defaultdict[str, set[str]] = defaultdict(set)
    for (host, _), value in values.items():
        hosts[value].add(host)
    if len(hosts) == 1:
        return ""
    return "; ".join(f"{value} on {', '.join(sorted(names))}" for value, names in sorted(hosts.items()))


def require_shared_store(client: Client, store: Store) -> None:
    """Check that every worker can write, read and delete in the store that this process sees."""
    ours = f"{uuid4().hex}.partial"  # a name that listings pass over, and that the end of a run removes
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
    """What keeps this worker from the store; nothing if it can use it."""
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
