"""The workers of a cluster, as a run on them needs them; distributed is loaded where there is a client, not before."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ntkpipe.base.config import KernelSpec
from ntkpipe.build.plan import BlockTask, ClusterWorkers
from ntkpipe.build.records import BuildRecord
from ntkpipe.executors.threads import Executor
from ntkpipe.jacobian.model.functional import DTYPES
from ntkpipe.store.chunks import Store

if TYPE_CHECKING:
    from distributed import Client


def inspect_crew(client: "Client", spec: KernelSpec, device: str | None, progress: bool) -> ClusterWorkers:
    """What the workers of a cluster are; says where its dashboard is."""
    from ntkpipe.build import preflight  # keeps distributed out of runs on one machine
    from ntkpipe.executors import connect as cluster

    cluster.require_workers(client)
    crew = preflight.inspect_workers(client, DTYPES[spec.resolved_accumulate_dtype()], device)
    if progress:
        each = f"{crew.threads} thread{'s' if crew.threads > 1 else ''}"
        where = f"{crew.processes} workers of {each} on {crew.device} ({crew.arithmetic})"
        print(f"cluster: {where}; dashboard {client.dashboard_link}", file=sys.stderr)
    return crew


def device_here(device: str | None, crew: ClusterWorkers | None) -> str | None:
    """Where this process looks at the model: as the workers do if it can, for it may have no GPU and they some."""
    if crew is None:
        return device
    return "cpu" if crew.device == "cpu" else None


def cluster_executor(client: "Client", store: Store, code: str | Path | None) -> Executor[BlockTask, BuildRecord]:
    """What hands blocks out to workers that have shown that they reach the store; ``code`` is sent to them."""
    from ntkpipe.build import preflight
    from ntkpipe.executors import dask as remote
    from ntkpipe.executors import payload as payload

    preflight.require_shared_store(client, store)
    client.log_event(remote.TOPIC, {"store": str(store.root), "state": "building"})
    packed = None if code is None else payload.pack_code(Path(code))
    return remote.ClusterExecutor(client, name=store.manifest.kind, code=packed)
