"""Estimate time, bytes and cost of a build on a described cluster, from operations, bytes and times measured here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ntkpipe.base.arguments import checked
from ntkpipe.base.config import ClusterSpec, parse
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.resources import format_bytes, format_seconds
from ntkpipe.base.tables import TableRows, as_table
from ntkpipe.build.plan import SHARE_OF_LIMIT, Machine, Plan, make_plan

Bottleneck = Literal["compute", "disk", "memory"]

# From the call to the first block: workers import torch and receive the model, while the driver checks it. Measured by
# benchmarks/speedup.py.
START_SECONDS = 5.0
# Memory is the bottleneck if unlimited memory would cut the computing time to less than this share.
_RELIEF = 0.8
_ANY_MEMORY = 2**60


@dataclass(frozen=True)
class ClusterEstimate:
    """A plan for a described cluster. Prints as the second table of ``ntkpipe plan``."""

    cluster: ClusterSpec  # the description, with missing fields taken from this machine
    plan: Plan  # as it would be made there; its `problems` say where memory is too small
    compute_seconds: float  # sum over workers: contractions at their rate, Jacobians as timed here, scaled with it
    block_seconds: float  # time of the longest block
    write_seconds: float  # time to write what is missing at the rate of the store; zero if that is not given
    # The longer of `compute` and `disk`; `memory` if the plan does not fit, or recomputing Jacobians takes most time
    binds: Bottleneck

    @property
    def even_seconds(self) -> float:
        """Computing time if the work were spread evenly over the workers."""
        return self.compute_seconds / self.cluster.workers

    @property
    def balance_seconds(self) -> float:
        """Longest wait for the last block: ``(1 - 1 / workers) * block_seconds``."""
        # Graham (1966). Bounds for certain multiprocessing anomalies. Bell System Technical Journal 45(9).
        return (1 - 1 / self.cluster.workers) * self.block_seconds

    @property
    def seconds(self) -> float:
        """Time from the call to the last tile; computing and writing overlap, so the longer of the two counts."""
        if self.plan.tiles_done == self.plan.workload.num_tiles:
            return 0.0
        return START_SECONDS + max(self.even_seconds + self.balance_seconds, self.write_seconds)

    @property
    def cost(self) -> float | None:
        """Cost of all workers from start to end, without scheduler, driver and disk."""
        price = self.cluster.price
        return None if price is None else price * self.cluster.workers * self.seconds / 3600

    def to_json(self) -> dict[str, Any]:
        """The numbers, in bytes, seconds and operations."""
        return {
            **self.cluster.model_dump(mode="json"),
            "blocks": self.plan.num_tasks,
            **{name: getattr(self.plan, name) for name in ("bytes_to_write", "recompute_factor", "memory_bytes")},
            **{name: getattr(self, name) for name in ("block_seconds", "compute_seconds", "balance_seconds")},
            "start_seconds": START_SECONDS,
            **{name: getattr(self, name) for name in ("write_seconds", "seconds", "cost", "binds")},
            "problems": list(self.plan.problems),
        }

    def rows(self) -> TableRows:
        """The estimate as (quantity, value) in words."""
        cluster, plan = self.cluster, self.plan
        rate, disk = cluster.write_bytes_per_second, "no rate of the disk is given"
        if rate is not None:
            disk = f"{format_seconds(self.write_seconds)} at {rate:,} B/s"
        gflops = (cluster.flops_per_second or 0) / 1e9
        block = f"up to {plan.height} × {plan.width} tiles, {format_seconds(self.block_seconds)}"
        memory = f"{format_bytes(plan.memory_bytes)}; limit {format_bytes(plan.machine.memory_limit)}"
        parts = f"{format_seconds(START_SECONDS)} of start-up, {format_seconds(self.even_seconds)} of computing"
        wait = f"up to {format_seconds(self.balance_seconds)} of waiting for the last block"
        rows = [
            ("workers", f"{cluster.workers:,} on {cluster.device}, {gflops:,.0f} GFLOP/s each"),
            ("blocks", f"{plan.num_tasks:,}, of {block}; {plan.num_tasks / cluster.workers:,.1f} a worker"),
            ("to write", f"{format_bytes(plan.bytes_to_write)}; {disk}"),
            ("recompute factor", f"{plan.recompute_factor:.2f} (Jacobians computed per sample)"),
            ("memory of a worker", memory),
            ("time", f"about {format_seconds(self.seconds)}: {parts}, {wait}"),
            ("bound by", self.binds),
        ]
        if self.cost is not None:
            rows.append(("cost", f"{self.cost:,.2f} {cluster.currency}".rstrip()))
        return [*rows, *(("does not fit", problem) for problem in plan.problems)]

    def __str__(self) -> str:
        return as_table(self.rows())


@checked
def estimate_cluster(plan: Plan, cluster: ClusterSpec | Mapping[str, Any]) -> ClusterEstimate:
    """Estimate what the work of a plan would take on a described cluster.

    Parameters
    ----------
    plan
        Made by :func:`ntkpipe.plan_kernel`; it need not fit this machine.
    cluster
        The cluster, or its fields.

    Returns
    -------
    The estimate. Operations and written bytes are exact; times are as good as the rates. Jacobians of a plan without
    ``sample_seconds`` count as matrix products of as many operations. For a GPU, timings and representations from a CPU
    are only an indication.

    Raises
    ------
    ConfigError
        If a field is wrong, or missing although this machine computes on another type of device.
    """
    if not isinstance(cluster, ClusterSpec):
        cluster = parse(ClusterSpec, cluster, source="cluster")
    cluster = _completed(cluster, plan)
    machine = Machine(
        workers=1,
        processes=cluster.workers,
        is_remote=True,
        memory_limit=int(SHARE_OF_LIMIT * (cluster.memory_limit or 0)),
        # On a CPU each process starts with the memory of this one.
        base_memory=plan.machine.base_memory if cluster.device == "cpu" else 0,
        free_disk=None,
        flops_per_second=cluster.flops_per_second or 0.0,
        device=cluster.device,
    )
    found, roomy = _planned(plan, machine), _planned(plan, replace(machine, memory_limit=_ANY_MEMORY))
    left = 1 - plan.tiles_done / plan.workload.num_tiles
    compute_seconds = found.worker_seconds * left
    rate = cluster.write_bytes_per_second
    write_seconds = 0.0 if rate is None else plan.bytes_to_write / rate
    if found.problems:
        binds: Bottleneck = "memory"
    elif write_seconds > compute_seconds / cluster.workers:
        binds = "disk"
    else:
        binds = "memory" if roomy.worker_seconds < _RELIEF * found.worker_seconds else "compute"
    return ClusterEstimate(cluster, found, compute_seconds, found.block_seconds if left else 0.0, write_seconds, binds)


def _completed(cluster: ClusterSpec, plan: Plan) -> ClusterSpec:
    machine = plan.machine
    share = machine.base_memory + (machine.memory_limit - machine.base_memory) // machine.workers
    here = {"flops_per_second": machine.flops_per_second, "memory_limit": math.ceil(share / SHARE_OF_LIMIT)}
    missing = [name for name in here if getattr(cluster, name) is None]
    found = machine.device.partition(":")[0]
    if missing and found != cluster.device:
        raise ConfigError(
            f"cluster.device={cluster.device!r}, but this plan was made on {found}, whose numbers do not apply to it; "
            f"give {' and '.join(f'cluster.{name}' for name in missing)} as well"
        )
    return cluster.model_copy(update={name: here[name] for name in missing})


def _planned(plan: Plan, machine: Machine) -> Plan:
    """The work of a plan on another machine, with the time of Jacobians scaled to its rate."""
    kept = plan.choices({}, plan.machine.device, "") if plan.is_resumed else None
    done = {"tiles_done": plan.tiles_done, "bytes_to_write": plan.bytes_to_write}
    found = make_plan(plan.workload, machine, choices=kept, **done)
    if plan.sample_seconds is None:
        return found
    return replace(found, sample_seconds=plan.sample_seconds * plan.machine.flops_per_second / machine.flops_per_second)
