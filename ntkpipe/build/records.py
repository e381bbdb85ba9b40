"""What a run says of itself: a record for each tile and each block, and what they add up to."""

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from ntkpipe.base.errors import StoreFullError
from ntkpipe.build.plan import Plan
from ntkpipe.store.chunks import Store
from ntkpipe.store.layout import Index


@dataclass(frozen=True)
class TileRecord:
    """One chunk that is safely stored."""

    array: str  # array, index: which one
    index: Index
    seconds: float  # time since the one before, of the same worker
    batch: int  # batch, subtile: what the worker has come down to, in samples: those of the plan unless memory ran out
    subtile: int


@dataclass(frozen=True)
class BlockRecord:
    """One block that is done: a line of ``results/runs/<run>/blocks.jsonl``."""

    array: str  # the kernel
    rows: tuple[int, int]  # rows, columns: first and last-but-one tile along each side
    columns: tuple[int, int]
    tiles: int  # tiles that were computed; those that existed are not among them
    started: float  # unix time
    seconds: float  # from the first sample to the last tile in the store
    flops: float  # operations that were done, Jacobians that had to be computed again included
    num_bytes: int  # written to the store
    peak_memory_bytes: int  # the largest resident memory of the process so far, or of the GPU's tensors in this block
    batch: int  # batch, subtile: as in :class:`TileRecord`
    subtile: int
    host: str  # host, process, device: where it was computed
    process: int
    device: str
    arithmetic: str  # what decides the last bits there: see :func:`ntkpipe.jacobian.model.device.describe_arithmetic`

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


BuildRecord = TileRecord | BlockRecord


class RunLog:
    """What one run of a store says of itself: a line for each block as it is done, and a summary at the end.

    ``results/runs/<run>/blocks.jsonl`` has the lines, the attributes of ``results/runs/<run>`` the summary.
    """

    def __init__(self, store: Store, plan: Plan, check_seconds: float) -> None:
        self._store = store
        self._plan = plan
        self._check_seconds = check_seconds
        self._halvings = Halvings(plan)
        self._name = f"runs/{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{os.getpid()}"
        self._started = perf_counter()
        self._tiles = 0
        self._flops = 0.0
        self._num_bytes = 0
        self._peak_memory_bytes = 0
        self._hosts: set[str] = set()
        self._strangers: set[str] = set()  # hosts that joined with another type of processor

    def tiles(self, records: Iterator[BuildRecord]) -> Iterator[TileRecord]:
        """The tiles among the records; blocks are logged."""
        for record in self._halvings.watch(records):
            if isinstance(record, BlockRecord):
                self._add(record)
            elif not record.array.endswith("test_diagonal"):
                self._tiles += 1
                yield record

    def _add(self, block: BlockRecord) -> None:
        expected = self._store.manifest.choices.arithmetic
        if block.arithmetic != expected and block.host not in self._strangers:
            self._strangers.add(block.host)
            warnings.warn(
                f"{block.host} computes with {block.arithmetic}, the store was begun with {expected}: its tiles "
                "agree to rounding, not to the last bit",
                stacklevel=2,
            )
        self._flops += block.flops
        self._num_bytes += block.num_bytes
        self._peak_memory_bytes = max(self._peak_memory_bytes, block.peak_memory_bytes)
        self._hosts.add(block.host)
        self._store.append_result(f"{self._name}/blocks.jsonl", block.to_json())

    def close(self) -> None:
        """Write the summary; a disk too full for it is no reason to hide what happened."""
        if not self._tiles:
            return
        plan, seconds = self._plan, perf_counter() - self._started
        machine = plan.machine
        run = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "hosts": sorted(self._hosts),
            "workers": machine.num_workers,
            "processes": machine.processes,
            "tiles": self._tiles,
            "seconds": seconds,
            # Where memory ran out, "used" is less, and results agree to rounding with those of an undisturbed run.
            "batch": plan.batch,
            "batch_used": self._halvings.used["batch"],
            "subtile": plan.subtile,
            "subtile_used": self._halvings.used["subtile"],
            "self_check_seconds": self._check_seconds,
            "flops": self._flops,
            "num_bytes": self._num_bytes,
            # Of the products that one worker was measured at before the run.
            "flops_per_second": machine.flops_per_second,
            "share_of_rate": self._flops / (seconds * machine.num_workers * machine.flops_per_second),
            "recompute_factor": plan.recompute_factor,
            "memory_bytes": plan.memory_bytes,
            "peak_memory_bytes": self._peak_memory_bytes,
        }
        with contextlib.suppress(StoreFullError):
            self._store.write_result(self._name, run)


class Halvings:
    """What memory that ran out made of the plan's sizes, over all workers."""

    def __init__(self, plan: Plan) -> None:
        self._planned = {"batch": plan.batch, "subtile": plan.subtile}
        self.used = dict(self._planned)

    def watch(self, records: Iterator[BuildRecord]) -> Iterator[BuildRecord]:
        """Pass records on, and look at their sizes."""
        for record in records:
            was_as_planned = self.used == self._planned
            self.used["batch"] = min(self.used["batch"], record.batch)
            self.used["subtile"] = min(self.used["subtile"], record.subtile)
            if was_as_planned and self.used != self._planned:
                changes = [f"{name} {size} → {self.used[name]}" for name, size in self._planned.items()]
                warnings.warn(
                    f"memory ran out, so work was halved (samples: {', '.join(changes)}): what comes from here on "
                    "agrees with an undisturbed run to rounding, not to the last bit. A lower memory_limit, or fewer "
                    "workers, plans for less memory",
                    stacklevel=2,
                )
            yield record
