"""Start or join a Dask cluster: this machine's processes, its GPUs, or a scheduler's address."""

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster, Nanny, Scheduler, Security, SpecCluster
from distributed.core import rpc

from ntkpipe.base.config import RunSpec
from ntkpipe.base.errors import ClusterError, ConfigError
from ntkpipe.base.progress import note_if_slow
from ntkpipe.base.resources import available_memory, num_cores
from ntkpipe.executors.preflight import why_silent

LOCAL = "local"

_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+")
_LOOPBACK = "127.0.0.1"
_DASHBOARD_PORT = 8787
_SHARE_OF_MEMORY = 0.7
_CONNECT_SECONDS = 20
# Dask's settings for a local cluster.
_SETTINGS = {
    # Nannies restart workers that die. With a shorter timeout Dask would close a nanny whose worker happens to die
    # again when the timeout of an earlier death ends, and the cluster would lose that worker for good.
    "distributed.deploy.lost-worker-timeout": "100 days",
    # By default, profiling and ticking take a tenth of a busy core; blocks are few and long.
    "distributed.worker.profile.interval": "500 ms",
    "distributed.admin.tick.interval": "500 ms",
}


@contextlib.contextmanager
def connect(scheduler: str, run: RunSpec = RunSpec(), *, num_gpus: int = 0) -> Iterator[Client]:  # noqa: B008 - frozen
    """Connect a client to a cluster until the context is left; a local one has the run's workers and is closed then."""
    if scheduler != LOCAL:
        with _join(_address(scheduler)) as client:
            yield client
        return
    with dask.config.set(_SETTINGS), contextlib.ExitStack() as stack:
        with note_if_slow("processes of this machine are starting"):
            cluster = stack.enter_context(_start(run, num_gpus))
        yield stack.enter_context(Client(cluster, set_as_default=False))


def _address(scheduler: str) -> str:
    """The address that is given, or that is in a file of ``dask scheduler --scheduler-file``."""
    if "://" in scheduler:
        return scheduler.strip().rstrip("/")
    if _HOST_AND_PORT.fullmatch(scheduler):
        return f"tcp://{scheduler}"
    found = ""
    try:
        if os.path.isfile(scheduler):
            return str(json.loads(Path(scheduler).read_bytes())["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f", a file that names no scheduler ({error!r})"
    raise ConfigError(
        f"scheduler={scheduler!r}{found}; needed an address such as 'tcp://host:8786' or 'tls://host:8786', the file "
        "of `dask scheduler --scheduler-file`, or 'local' for processes of this machine"
    )


def _join(scheduler: str) -> Client:
    certificate = Security().get_tls_config_for_role("client")
    if scheduler.startswith("tls://") and not (certificate["ca_file"] and certificate["cert"]):
        # Dask's client would notice, but then hang for a minute when the process ends.
        raise ClusterError(
            f"{scheduler} takes clients with a certificate, and Dask's settings name none: set distributed.comm.tls "
            "or DASK_CONFIG to a folder made by cluster/tls/make_certificates.sh"
        )
    try:
        with (
            note_if_slow(f"{scheduler} does not answer yet; waiting up to {_CONNECT_SECONDS} seconds"),
            ThreadPoolExecutor(1) as apart,  # from an event loop of this thread, as in a notebook
        ):
            kind = apart.submit(asyncio.run, _kind_of(scheduler)).result()
            if kind == "Scheduler":
                return Client(scheduler, timeout=_CONNECT_SECONDS, set_as_default=False)
        reason, cause = f"a {kind} answers there", None
    except Exception as error:  # noqa: BLE001 - no answer, an unknown protocol, another certificate, bytes of a web server
        cause, reason = error, why_silent(error, _CONNECT_SECONDS)
    raise ClusterError(
        f"cannot join the scheduler at {scheduler}: {reason}. Is it running (`dask scheduler`), reachable from here, "
        "are these its protocol (tcp:// or tls://) and its port (8786 by default; 8787 is its dashboard), and, for "
        "tls://, do Dask's settings distributed.comm.tls name this client's certificate?"
    ) from cause


async def _kind_of(address: str) -> str:
    """What answers there; Dask's client would wait for ever for the first word of what is no scheduler."""
    options = {"timeout": 0.9 * _CONNECT_SECONDS, "connection_args": Security().get_connection_args("client")}
    async with asyncio.timeout(_CONNECT_SECONDS), rpc(address, **options) as there:
        return str((await there.identity()).get("type"))


def _start(run: RunSpec, num_gpus: int) -> Any:
    """Start processes of one thread each, so that results do not depend on how many there are."""
    count = min(num_gpus, run.workers or num_gpus) if num_gpus else run.workers or num_cores()
    share = (run.memory_limit or int(_SHARE_OF_MEMORY * available_memory())) // count
    with socket.socket() as probe:
        is_taken = probe.connect_ex((_LOOPBACK, _DASHBOARD_PORT)) == 0
    dashboard = f"{_LOOPBACK}:{0 if is_taken else _DASHBOARD_PORT}"
    place = {"host": _LOOPBACK, "dashboard_address": dashboard}
    options: dict[str, Any] = {**place, "threads_per_worker": 1, "memory_limit": share}
    if not num_gpus:
        return LocalCluster(n_workers=count, processes=True, **options)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")[:count]
    if importlib.util.find_spec("dask_cuda") is not None:
        # It also binds each worker to the cores and the network card next to its GPU.
        from dask_cuda import LocalCUDACluster

        return LocalCUDACluster(CUDA_VISIBLE_DEVICES=devices, **options)
    # Each process sees a single GPU. CUDA reads the environment once, so it must be set before the process starts.
    environment = dask.config.get("distributed.nanny.pre-spawn-environ")
    common = {"nthreads": 1, "host": _LOOPBACK, "memory_limit": share}
    workers_of = {
        device: {"cls": Nanny, "options": {**common, "env": {**environment, "CUDA_VISIBLE_DEVICES": device}}}
        for device in devices
    }
    scheduler = {"cls": Scheduler, "options": {**place, "port": 0, "dashboard": True}}
    return SpecCluster(workers=workers_of, scheduler=scheduler)
