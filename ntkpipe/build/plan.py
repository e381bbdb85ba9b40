"""The plan of a run: its work, the machine, the sizes chosen for them, and how all of this prints."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ntkpipe.base.errors import ResourceError
from ntkpipe.base.grid import Block, Grid
from ntkpipe.base.resources import format_bytes
from ntkpipe.base.tables import TableRows, as_table
from ntkpipe.jacobian.cost import Cost
from ntkpipe.jacobian.model.device import Sizes, sizes_of
from ntkpipe.store.manifest import Choices

SHARE_OF_LIMIT = 0.85  # of a Dask worker's memory limit, for a plan: its nanny kills it at 95 %


@dataclass(frozen=True)
class BlockTask:
    """One key of a build: a block of a kernel's tiles, or the diagonal blocks of one tile of test samples."""

    array: str
    block: Block

    def __str__(self) -> str:
        block = self.block
        rows, columns = f"{block.row_start}:{block.row_stop}", f"{block.column_start}:{block.column_stop}"
        return f"{self.array.removeprefix('kernel/')} tiles {rows} × {columns}"


@dataclass(frozen=True)
class Workload:
    """What is to be computed, in numbers only."""

    grids: Mapping[str, Grid]  # the kernels by array name
    num_test: int  # test samples whose diagonal blocks are computed; zero without a test set
    tile: int  # samples along a tile's edge
    num_covectors: int  # rows per sample
    store_itemsize: int  # bytes of a stored entry
    cost: Cost  # of the Jacobians
    num_matrices: int = 1  # matrices of each kernel: one, or one for each output
    num_groups: int = 0  # parameter groups with kernels of their own

    @property
    def num_planes(self) -> int:
        """Matrices that are filled together, each with its own tiles."""
        return self.num_matrices * (1 + self.num_groups)

    @property
    def tile_bytes(self) -> int:
        """Bytes of one stored tile."""
        return (self.tile * self.num_covectors) ** 2 * self.store_itemsize

    @property
    def num_tiles(self) -> int:
        """Tiles of all kernels and planes."""
        return self.num_planes * sum(grid.num_tiles for grid in self.grids.values())

    @property
    def num_samples(self) -> int:
        """Samples whose Jacobians are needed."""
        columns = next(iter(self.grids.values())).columns.num_samples
        return columns + sum(grid.rows.num_samples for grid in self.grids.values() if not grid.symmetric)


@dataclass(frozen=True)
class Machine:
    """The hardware that a run may use."""

    workers: int  # most single-threaded workers of one process
    memory_limit: int  # bytes that one process may use
    base_memory: int  # bytes that one process holds before the first block
    free_disk: int | None  # bytes that can be written; none for a kernel that stays in memory
    flops_per_second: float  # rate of one worker's matrix products
    device: str = "cpu"  # as torch names it
    processes: int = 1  # this one, or the workers of a cluster
    is_remote: bool = False  # whether they are workers of a cluster, whose number of threads is fixed
    arithmetic: str = ""  # of workers of a cluster; see :func:`ntkpipe.jacobian.model.device.describe_arithmetic`

    @property
    def num_workers(self) -> int:
        """Single-threaded workers of all processes."""
        return self.processes * self.workers

    @property
    def sizes(self) -> Sizes:
        """How work is cut on the device."""
        return sizes_of(self.device)


@dataclass(frozen=True)
class Plan:
    """How a kernel is computed. Prints as the table of ``ntkpipe plan``."""

    workload: Workload  # workload, machine: what the plan is for; `machine.workers` may be lowered to fit the memory
    machine: Machine
    strip: int  # strip, subtile, batch: as in :class:`ntkpipe.store.manifest.Choices`
    subtile: int
    batch: int
    hold: int  # row strips that a worker holds while it streams column strips past: of several tiles, or of one
    edge: int  # tiles along a block's edge
    pair_flops: float  # operations of all contractions
    jacobian_flops: float = 0.0  # operations of all Jacobians, including recomputation
    recompute_factor: float = 0.0  # how often the average Jacobian is computed, at most
    cache_bytes: int = 0  # memory for Jacobian strips that workers share
    memory_bytes: int = 0  # upper bound of the resident memory of a process
    tiles_done: int = 0  # tiles that exist already
    bytes_to_write: int = 0  # bytes of the missing tiles and outputs, and of the samples
    problems: tuple[str, ...] = ()  # why it cannot run on this machine, each with both numbers; empty where it can
    # Measured time of one worker for a sample's Jacobians; if None, their operations count as matrix products
    sample_seconds: float | None = None
    is_resumed: bool = False  # whether strip, subtile and batch come from an existing store

    def fitting(self) -> "Plan":
        """The plan, unless it does not fit the machine, which raises."""
        if self.problems:
            raise ResourceError("; ".join(self.problems))
        return self

    @property
    def rows_held(self) -> int:
        """Tile rows whose strips are held together."""
        return self.hold if self.strip >= self.workload.tile else 1

    @property
    def flops(self) -> float:
        """All operations."""
        return self.pair_flops + self.jacobian_flops

    @property
    def worker_seconds(self) -> float:
        """Estimated computing time, summed over the workers: contractions at their rate, Jacobians as measured."""
        rate = self.machine.flops_per_second
        jacobians = self.jacobian_flops / rate
        if self.sample_seconds is not None:
            jacobians = self.recompute_factor * self.workload.num_samples * self.sample_seconds
        return self.pair_flops / rate + jacobians

    @property
    def seconds(self) -> float:
        """Estimated computing time."""
        return self.worker_seconds / self.machine.num_workers

    @property
    def block_seconds(self) -> float:
        """Computing time of a whole block, or of a kernel that is smaller than one: its share of all pairs."""
        num_pairs = [grid.num_pairs for grid in self.workload.grids.values()]
        share = min(max(num_pairs), (self.edge * self.workload.tile) ** 2) / sum(num_pairs)
        return self.worker_seconds * share

    @property
    def num_tasks(self) -> int:
        """Number of :meth:`tasks`."""
        blocks = sum(grid.num_blocks(self.edge) for grid in self.workload.grids.values())
        return blocks + -(-self.workload.num_test // self.workload.tile)

    def tasks(self) -> Iterator[BlockTask]:
        """Every task, lazily; a task itself skips what is already done."""
        for name, grid in self.workload.grids.items():
            for block in grid.blocks(self.edge):
                yield BlockTask(name, block)
        for tile in range(-(-self.workload.num_test // self.workload.tile)):
            yield BlockTask("kernel/test_diagonal", Block(tile, tile + 1, 0, 1))

    def choices(self, representations: Mapping[str, str], device: str, arithmetic: str) -> Choices:
        """Choices that the manifest records."""
        sizes = {"strip": self.strip, "subtile": self.subtile, "batch": self.batch}
        return Choices(**sizes, representations=dict(representations), device=device, arithmetic=arithmetic)

    def to_json(self) -> dict[str, Any]:
        """The numbers, in bytes, seconds and operations."""
        return {
            "tile": self.workload.tile,
            "tiles": self.workload.num_tiles,
            "planes": self.workload.num_planes,
            "blocks": self.num_tasks,
            "workers": self.machine.num_workers,
            "processes": self.machine.processes,
            "memory_limit": self.machine.memory_limit,
            "free_disk_bytes": self.machine.free_disk,
            **{name: getattr(self, name) for name in ("strip", "subtile", "batch", "tiles_done", "bytes_to_write")},
            **{name: getattr(self, name) for name in ("flops", "jacobian_flops", "recompute_factor", "memory_bytes")},
            **{name: getattr(self, name) for name in ("seconds", "sample_seconds")},
            "problems": list(self.problems),
        }

    def rows(self) -> TableRows:
        """The plan as (quantity, value) in words."""
        load, machine = self.workload, self.machine
        kernels = ", ".join(f"{name} {g.shape[0]:,} × {g.shape[1]:,}" for name, g in load.grids.items())
        if load.num_planes > 1:
            planes = [f"of each of {load.num_matrices} outputs"] if load.num_matrices > 1 else []
            planes += [f"of all parameters and {load.num_groups} groups of them"] if load.num_groups else []
            kernels += f"; {load.num_planes} of each, {', '.join(planes)}"
        timed = " at the matrix-product rate" if self.sample_seconds is None else ""
        each = "" if machine.processes == 1 else f" in each of {machine.processes} processes"
        disk = "free space unknown" if machine.free_disk is None else f"{format_bytes(machine.free_disk)} free"
        return [
            ("kernels", kernels),
            ("tile", f"{load.tile} samples, {load.tile * load.num_covectors} rows, {format_bytes(load.tile_bytes)}"),
            ("tiles", f"{load.num_tiles:,}, of which {self.tiles_done:,} exist"),
            ("blocks", f"{self.num_tasks:,}, of up to {self.edge} × {self.edge} tiles"),
            ("to write", f"{format_bytes(self.bytes_to_write)}; {disk}"),
            ("operations", f"{self.flops / 1e9:,.1f} GFLOP, {self.jacobian_flops / self.flops:.0%} of them Jacobians"),
            ("recompute factor", f"{self.recompute_factor:.2f} (Jacobians computed per sample)"),
            ("Jacobian strips", f"{self.strip} samples, {format_bytes(self.strip * load.cost.block_bytes)} each"),
            ("forward batch", f"{self.batch} samples; contracted in pieces of {self.subtile}"),
            ("workers", f"{machine.num_workers}, {machine.flops_per_second / 1e9:.0f} GFLOP/s each"),
            ("memory bound", f"{format_bytes(self.memory_bytes)}{each}; limit {format_bytes(machine.memory_limit)}"),
            ("time", f"about {format_seconds(self.seconds)}{timed}"),
            *(("does not fit", problem) for problem in self.problems),
        ]

    def __str__(self) -> str:
        return as_table(self.rows())


def format_seconds(seconds: float) -> str:
    """Text of a duration in a readable unit."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
