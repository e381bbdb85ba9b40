"""Records of a run: one for each tile and each block, and a summary."""

import os
import socket
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from time import perf_counter

from ntkpipe.base.errors import StoreFullError
from ntkpipe.build.plan import Plan
from ntkpipe.jacobian.self_check import CheckReport
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


class Sizes:
    """Smallest batch and pieces that any worker used; less than planned if memory ran out."""

    def __init__(self, plan: Plan) -> None:
        self._planned = {"batch": plan.batch, "subtile": plan.subtile}
        self.used = dict(self._planned)

    def watch(self, records: Iterator[BuildRecord]) -> Iterator[BuildRecord]:
        """Pass records on; warn once when their sizes fall below the plan."""
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
            yield record


def logged(
    store: Store,
    plan: Plan,
    records: Generator[BuildRecord, None, None],
    check: CheckReport | None = None,
    check_seconds: float = 0.0,
) -> Generator[TileRecord, None, None]:
    """Pass tiles on; in ``results/runs/<run>``, ``blocks.jsonl`` gets a line a block, the attributes a summary."""
    name, started = f"runs/{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{os.getpid()}", perf_counter()
    expected = store.manifest.choices.arithmetic
    sizes, tiles, num_bytes, peak, flops, hosts, strangers = Sizes(plan), 0, 0, 0, 0.0, set[str](), set[str]()
    if check is not None:
        store.write_result("self_check", asdict(check))
    try:
        with closing(records):
            for record in sizes.watch(records):
                if isinstance(record, TileRecord):
                    if not record.array.endswith("test_diagonal"):
                        tiles += 1
                        yield record
                    continue
                if record.arithmetic != expected and record.host not in strangers:
                    strangers.add(record.host)
                    warnings.warn(
                        f"{record.host} computes with {record.arithmetic}, the store was begun with {expected}: its "
                        "tiles agree to rounding, not to the last bit",
                        stacklevel=2,
                    )
                flops, num_bytes = flops + record.flops, num_bytes + record.num_bytes
                peak = max(peak, record.peak_memory_bytes)
                hosts.add(record.host)
                store.append_result(f"{name}/blocks.jsonl", asdict(record))
    finally:
        seconds, machine = perf_counter() - started, plan.machine
        run = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "hosts": sorted(hosts),
            "workers": machine.num_workers,
            "processes": machine.processes,
            "tiles": tiles,
            "seconds": seconds,
            "batch": plan.batch,
            "subtile": plan.subtile,
            # If memory ran out, sizes were smaller than planned, and results agree with another run to rounding only.
            **{f"{size}_used": used for size, used in sizes.used.items()},
            "self_check_seconds": check_seconds,
            "flops": flops,
            "num_bytes": num_bytes,
            # Rate of matrix products of one worker, measured before the run.
            "flops_per_second": machine.flops_per_second,
            "share_of_rate": flops / (seconds * machine.num_workers * machine.flops_per_second),
            "recompute_factor": plan.recompute_factor,
            "memory_bytes": plan.memory_bytes,
            "peak_memory_bytes": peak,
        }
        if tiles:
            with suppress(StoreFullError):  # a full disk must not hide the error that ended the run
                store.write_result(name, run)
