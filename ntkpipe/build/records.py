"""Records of a run: one for each tile and each block, and a summary."""

import contextlib
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from time import perf_counter

from ntkpipe.base.errors import StoreFullError
from ntkpipe.build.plan import Plan
from ntkpipe.store.layout import Index
from ntkpipe.store.store import Store


@dataclass(frozen=True)
class TileRecord:
    """One chunk that is safely stored."""

    array: str
    index: Index
    batch: int  # samples; less than planned if memory ran out
    subtile: int  # likewise


@dataclass(frozen=True)
class BlockRecord:
    """One block that is done: a line of ``results/runs/<run>/blocks.jsonl``."""

    array: str  # the kernel
    rows: tuple[int, int]  # start and stop of its tile rows
    columns: tuple[int, int]  # start and stop of its tile columns
    tiles: int  # tiles that were computed, without those that existed
    started: float  # Unix time
    seconds: float  # from the first sample to the last tile in the store
    flops: float  # operations, including recomputed Jacobians
    num_bytes: int  # written to the store
    peak_memory_bytes: int  # largest resident memory of the process so far, or of the GPU's tensors in this block
    batch: int  # as in :class:`TileRecord`
    subtile: int
    host: str  # where it was computed
    process: int
    device: str
    arithmetic: str  # what decides the last bits; see :func:`ntkpipe.jacobian.model.device.describe_arithmetic`


BuildRecord = TileRecord | BlockRecord


class RunLog:
    """Log in ``results/runs/<run>``: ``blocks.jsonl`` has a line for each finished block, the attributes a summary."""

    def __init__(self, store: Store, plan: Plan, check_seconds: float) -> None:
        self._store = store
        self._plan = plan
        self._check_seconds = check_seconds
        self._halvings = Halvings(plan)
        self._name = f"runs/{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{os.getpid()}"
        self._started = perf_counter()
        self._tiles = self._num_bytes = self._peak_memory_bytes = 0
        self._flops = 0.0
        self._hosts: set[str] = set()
        self._strangers: set[str] = set()  # hosts that joined with another type of processor

    def tiles(self, records: Iterator[BuildRecord]) -> Iterator[TileRecord]:
        """Pass tiles on, and log blocks."""
        for tile in self._halvings.tiles(records, self._add):
            if not tile.array.endswith("test_diagonal"):
                self._tiles += 1
                yield tile

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
        self._store.append_result(f"{self._name}/blocks.jsonl", asdict(block))

    def close(self) -> None:
        """Write the summary; a full disk must not hide the error that ended the run."""
        if not self._tiles:
            return
        plan, machine, seconds = self._plan, self._plan.machine, perf_counter() - self._started
        run = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "hosts": sorted(self._hosts),
            "workers": machine.num_workers,
            "processes": machine.processes,
            "tiles": self._tiles,
            "seconds": seconds,
            "batch": plan.batch,
            "subtile": plan.subtile,
            # If memory ran out, sizes were smaller than planned, and results agree with another run to rounding only.
            **{f"{name}_used": size for name, size in self._halvings.used.items()},
            "self_check_seconds": self._check_seconds,
            "flops": self._flops,
            "num_bytes": self._num_bytes,
            # Rate of matrix products of one worker, measured before the run.
            "flops_per_second": machine.flops_per_second,
            "share_of_rate": self._flops / (seconds * machine.num_workers * machine.flops_per_second),
            "recompute_factor": plan.recompute_factor,
            "memory_bytes": plan.memory_bytes,
            "peak_memory_bytes": self._peak_memory_bytes,
        }
        with contextlib.suppress(StoreFullError):
            self._store.write_result(self._name, run)


class Halvings:
    """Smallest sizes that any worker used; less than planned if memory ran out."""

    def __init__(self, plan: Plan) -> None:
        self._planned = {"batch": plan.batch, "subtile": plan.subtile}
        self.used = dict(self._planned)

    def tiles(
        self, records: Iterator[BuildRecord], add: Callable[[BlockRecord], None] = lambda _: None
    ) -> Iterator[TileRecord]:
        """Pass tiles on, and blocks to ``add``; warn once when their sizes fall below the plan."""
        for record in records:
            was_as_planned = self.used == self._planned
            self.used = {name: min(size, getattr(record, name)) for name, size in self.used.items()}
            if was_as_planned and self.used != self._planned:
                changes = [f"{name} {size} → {self.used[name]}" for name, size in self._planned.items()]
                warnings.warn(
                    f"memory ran out, so work was halved (samples: {', '.join(changes)}): what comes from here on "
                    "agrees with an undisturbed run to rounding, not to the last bit. A lower memory_limit, or fewer "
                    "workers, plans for less memory",
                    stacklevel=2,
                )
            if isinstance(record, BlockRecord):
                add(record)
            else:
                yield record
