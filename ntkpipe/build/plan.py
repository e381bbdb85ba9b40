"""The plan of a run: its work, the machine, the sizes chosen for them, and how all of this prints."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ntkpipe.base.errors import ResourceError
from ntkpipe.base.grid import Block, Grid
from ntkpipe.base.resources import exceeded, format_bytes, format_seconds
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
    sizes: Sizes | None = None  # how work is cut; none: as is best on the device

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
    scratch_bytes: int = 0  # free bytes for files that processes share, on the fullest of those disks; zero: none
    num_scratch: int = 1  # of those disks: one on each host
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
    height: int  # tile rows of a block
    width: int  # tile columns of a block
    pair_flops: float  # operations of all contractions
    jacobian_flops: float = 0.0  # operations of all Jacobians, including recomputation
    recompute_factor: float = 0.0  # how often the average Jacobian is computed, at most
    cache_bytes: int = 0  # memory for Jacobian strips that workers share
    scratch_bytes: int = 0  # disk for all strips, which processes of a machine share; zero if it would not pay
    read_bytes: float = 0.0  # of those, with repetition, which are read where they would be computed again
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
        """Estimated time, summed over the workers: contractions at their rate, Jacobians as measured."""
        rate = self.machine.flops_per_second
        jacobians = self.jacobian_flops / rate
        if self.sample_seconds is not None:
            jacobians = self.recompute_factor * self.workload.num_samples * self.sample_seconds
        return (self.pair_flops + self.read_bytes * _READ_FLOPS) / rate + jacobians

    @property
    def seconds(self) -> float:
        """Estimated computing time."""
        return self.worker_seconds / self.machine.num_workers

    @property
    def block_seconds(self) -> float:
        """Computing time of a whole block, or of a kernel that is smaller than one: its share of all pairs."""
        num_pairs = [grid.num_pairs for grid in self.workload.grids.values()]
        share = min(max(num_pairs), self.height * self.width * self.workload.tile**2) / sum(num_pairs)
        return self.worker_seconds * share

    @property
    def num_tasks(self) -> int:
        """Number of :meth:`tasks`."""
        blocks = sum(grid.num_blocks(self.height, self.width) for grid in self.workload.grids.values())
        return blocks + -(-self.workload.num_test // self.workload.tile)

    def tasks(self) -> Iterator[BlockTask]:
        """Every task, lazily; a task itself skips what is already done."""
        for name, grid in self.workload.grids.items():
            for block in grid.blocks(self.height, self.width):
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
            **{name: getattr(self, name) for name in ("scratch_bytes", "seconds", "sample_seconds")},
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
        kept = f"; {format_bytes(self.scratch_bytes)} of files for all" if self.scratch_bytes else ""
        disk = "free space unknown" if machine.free_disk is None else f"{format_bytes(machine.free_disk)} free"
        return [
            ("kernels", kernels),
            ("tile", f"{load.tile} samples, {load.tile * load.num_covectors} rows, {format_bytes(load.tile_bytes)}"),
            ("tiles", f"{load.num_tiles:,}, of which {self.tiles_done:,} exist"),
            ("blocks", f"{self.num_tasks:,}, of up to {self.height} × {self.width} tiles"),
            ("to write", f"{format_bytes(self.bytes_to_write)}; {disk}"),
            ("operations", f"{self.flops / 1e9:,.1f} GFLOP, {self.jacobian_flops / self.flops:.0%} of them Jacobians"),
            ("recompute factor", f"{self.recompute_factor:.2f} (Jacobians computed per sample)"),
            ("Jacobian strips", f"{self.strip} samples, {format_bytes(self.strip * load.cost.block_bytes)} each{kept}"),
            ("forward batch", f"{self.batch} samples; contracted in pieces of {self.subtile}"),
            ("workers", f"{machine.num_workers}, {machine.flops_per_second / 1e9:.0f} GFLOP/s each"),
            ("memory bound", f"{format_bytes(self.memory_bytes)}{each}; limit {format_bytes(machine.memory_limit)}"),
            ("time", f"about {format_seconds(self.seconds)}{timed}"),
            *(("does not fit", problem) for problem in self.problems),
        ]

    def __str__(self) -> str:
        return as_table(self.rows())


_MAX_EDGE = 16
_BLOCKS_PER_WORKER = 4
_MOST_BLOCKS_PER_WORKER = 64  # more do not balance the workers better
_BLOCK_OVERHEAD_SECONDS = 0.02  # rough time of a worker for receiving a block and writing its last tile
_BLOCK_SECONDS = 60.0  # longest time of a block, so that a stop or a kill loses little
_RECOMPUTE_SHARE = 0.03  # recomputing Jacobians is tolerated while it costs less than this share of the contraction
_BUFFERS = 3
_WORTH_FILES = 1.03  # how often Jacobians are computed without files of their strips, for these to pay
_READ_FLOPS = 64  # operations that take at least as long as reading a byte and checking it
_SCRATCH_MARGIN = 1.25  # free disk over what all strips take


def make_plan(
    workload: Workload,
    machine: Machine,
    *,
    choices: Choices | None = None,
    tiles_done: int = 0,
    bytes_to_write: int | None = None,
) -> Plan:
    """Decide strips, batches, blocks and memory."""
    if bytes_to_write is None:
        bytes_to_write = workload.num_tiles * workload.tile_bytes
    plan = _fit(workload, machine, choices)
    while plan.memory_bytes > machine.memory_limit and plan.machine.workers > 1 and not machine.is_remote:
        plan = _fit(workload, replace(machine, workers=plan.machine.workers // 2), choices)
    problems = []
    if plan.memory_bytes > machine.memory_limit:
        who, remedy, threads = "the run needs", "Raise memory_limit", "one worker"
        if machine.is_remote:
            who, threads = "a worker process needs", f"{machine.workers} thread(s)"
            remedy = "Start workers with more memory (ntkpipe uses 85 % of their limit) or fewer threads"
        found = (
            f"{who} {format_bytes(plan.memory_bytes)} of memory with {threads}, of which "
            f"{format_bytes(machine.base_memory)} are in use already; the limit is "
            f"{format_bytes(machine.memory_limit)}. {remedy}, or use a smaller tile (now {workload.tile} samples, "
            f"{format_bytes(workload.tile_bytes)})"
            + ("" if choices is None else "; this store was begun with more memory and keeps its strips")
        )
        is_full = machine.base_memory >= machine.memory_limit and not machine.is_remote
        problems.append(f"{found}; {exceeded(machine.memory_limit, machine.base_memory)}" if is_full else found)
    if machine.free_disk is not None and bytes_to_write > machine.free_disk:
        problems.append(
            f"the store needs {format_bytes(bytes_to_write)} more, {format_bytes(machine.free_disk)} of disk are free; "
            "free some, choose another path, a smaller store_dtype or fewer samples"
        )
    work: dict[str, Any] = {"tiles_done": tiles_done, "bytes_to_write": bytes_to_write}
    return replace(plan, problems=tuple(problems), is_resumed=choices is not None, **work)


def _fit(workload: Workload, machine: Machine, choices: Choices | None) -> Plan:
    """Best plan for a number of workers; its memory exceeds the limit where nothing smaller works."""
    cost, tile = workload.cost, workload.tile
    share = (machine.memory_limit - machine.base_memory) / machine.workers
    sizes = workload.sizes or machine.sizes
    subtile = min(max(1, int(sizes.piece_rows / workload.num_matrices**0.5) // workload.num_covectors), tile)

    def room(subtile: int, batch: int = 0) -> float:
        """Bytes for strips."""
        return max(0.0, share - _fixed_bytes(workload, subtile, sizes) - batch * cost.workspace_bytes)

    most = min(0.3 * room(subtile), sizes.batch_bytes) / cost.workspace_bytes, sizes.tensor_bytes / cost.largest_bytes
    batch = min(1 << (max(2, int(min(most))).bit_length() - 1), subtile)  # a power of two, unless a piece is smaller
    affordable = int(room(subtile, batch) / cost.block_bytes)
    # Two tiles' Jacobians at once if they fit (one held, one streaming) beside the piece that is being put together;
    # else strips of a quarter of what fits: two held, one streaming, one being put together.
    strip = tile if affordable >= 2 * tile + subtile else max(1, affordable // 4)
    if choices is not None:
        strip, subtile, batch = choices.strip, choices.subtile, choices.batch
        affordable = int(room(subtile, batch) / cost.block_bytes)
    subtile, batch = min(subtile, strip), min(batch, strip)
    strips = -(-tile // strip)
    affordable_strips = max(2, (affordable - subtile) // strip)
    num_samples, num_pairs = workload.num_samples, sum(grid.num_pairs for grid in workload.grids.values())
    pair_flops = num_pairs * cost.pair_flops
    everything = num_samples * cost.block_bytes
    has_scratch = machine.device == "cpu" and machine.scratch_bytes > _SCRATCH_MARGIN * everything
    has_scratch &= cost.jacobian_flops > _READ_FLOPS * cost.block_bytes

    def shaped(height: int, width: int) -> Plan:
        hold = height if strips == 1 else max(1, min(affordable_strips - 1, strips))
        plan = Plan(workload, machine, strip, subtile, batch, hold, height, width, pair_flops)
        factor = _strip_visits(plan) / num_samples
        excess = (factor - 1) * num_samples * cost.jacobian_flops
        spare = machine.memory_limit - machine.base_memory - machine.workers * _worker_bytes(plan)
        if excess > _RECOMPUTE_SHARE * plan.pair_flops and spare > 0:
            plan = replace(plan, cache_bytes=int(min(everything, spare)))
            if plan.cache_bytes >= everything:
                factor = min(factor, float(machine.processes))
        if has_scratch and factor > max(_WORTH_FILES, machine.num_scratch):
            read_bytes, factor = (factor - machine.num_scratch) * everything, float(machine.num_scratch)
            plan = replace(plan, scratch_bytes=everything, read_bytes=read_bytes)
        return replace(plan, recompute_factor=factor, jacobian_flops=factor * num_samples * cost.jacobian_flops)

    shapes = _shapes(workload, machine, most_rows=affordable_strips - 1 if strips == 1 else _MAX_EDGE)
    plan = min((shaped(*shape) for shape in shapes), key=_seconds_to_the_end)
    if plan.cache_bytes >= everything and not machine.is_remote:
        # No strip is computed twice whatever the blocks are: the smallest ones balance the workers best.
        plan = replace(plan, height=1, width=1, hold=min(plan.hold, strips))
    memory_bytes = int(machine.base_memory + plan.cache_bytes + machine.workers * _worker_bytes(plan))
    return replace(plan, memory_bytes=memory_bytes)


def _shapes(workload: Workload, machine: Machine, most_rows: int) -> list[tuple[int, int]]:
    """Heights and widths of blocks to choose from, of which each worker has several and none takes too long."""
    tile_seconds = workload.tile**2 * workload.cost.pair_flops / machine.flops_per_second
    heights, widths = range(1, min(_MAX_EDGE, most_rows) + 1), range(1, _MAX_EDGE + 1)
    counts = {
        (height, width): sum(grid.num_blocks(height, width) for grid in workload.grids.values()) / machine.num_workers
        for height, width in product(heights, widths)
        if height * width * tile_seconds <= _BLOCK_SECONDS
    }
    enough = {shape: count for shape, count in counts.items() if count >= _BLOCKS_PER_WORKER}
    fewest = min(enough.values(), default=0)
    return [s for s, count in enough.items() if count <= max(fewest, _MOST_BLOCKS_PER_WORKER)] or [(1, 1)]


def _seconds_to_the_end(plan: Plan) -> float:
    """Time of computing, handing out blocks and waiting for the last one, as ``ClusterEstimate`` explains."""
    workers = plan.machine.num_workers
    overhead = _BLOCK_OVERHEAD_SECONDS * plan.num_tasks / workers
    return plan.seconds + overhead + (1 - 1 / workers) * plan.block_seconds


def _fixed_bytes(workload: Workload, subtile: int, sizes: Sizes) -> float:
    """Memory of a worker apart from its strips: tile buffers, their encoded copies, scratch for contraction."""
    entries = workload.num_matrices * (subtile * workload.num_covectors) ** 2
    # With groups, the float64 sum over all of them is held beside that of one.
    piece = entries * (sizes.piece_entry_bytes + (8 if workload.num_groups else 0)) + sizes.scratch_bytes
    # Tiles of all planes are computed at once, and written one after the other.
    tiles = (2 * _BUFFERS + 2 * (workload.num_planes - 1)) * workload.tile_bytes
    return tiles + piece + workload.cost.fixed_workspace_bytes


def _worker_bytes(plan: Plan) -> float:
    cost = plan.workload.cost
    fixed = _fixed_bytes(plan.workload, plan.subtile, plan.workload.sizes or plan.machine.sizes)
    strips = (plan.hold + 1) * plan.strip * cost.block_bytes
    # The strip that is being computed exists in parts before it is whole.
    assembling = plan.subtile * cost.block_bytes
    return fixed + strips + assembling + plan.batch * cost.workspace_bytes


def _strip_visits(plan: Plan) -> float:
    """Samples whose Jacobians are computed, with repetition, if only the held strips are reused."""
    load = plan.workload
    strips = -(-load.tile // plan.strip)
    parts = -(-strips // plan.hold)
    visits = float(load.num_test)
    for grid in load.grids.values():
        if parts == 1 or plan.rows_held > 1:
            visits += _tile_visits(grid, plan) * load.tile
        else:
            # Parts of one row tile are held in turn: columns pass once for each part, rows again for each column.
            visits += grid.num_tiles * load.tile * (1 + parts)
    return max(visits, float(load.num_samples))


def _tile_visits(grid: Grid, plan: Plan) -> int:
    """Tiles of rows and of columns whose strips are computed, where ``rows_held`` rows are held together."""
    # Blocks are handed out row by row, and a worker keeps the rows of its last block: where those of a whole block are
    # held, each worker computes them once for all blocks beside each other. Columns pass once for each group of rows.
    visits, columns, held = 0, grid.columns.num_tiles, plan.rows_held
    for row in range(0, grid.rows.num_tiles, plan.height):
        stop = min(row + plan.height, grid.rows.num_tiles)
        blocks = -(-(columns - (row if grid.symmetric else 0)) // plan.width)
        if held >= plan.height:
            blocks = min(blocks, plan.machine.num_workers)
        for first in range(row, stop, held):
            last = min(first + held, stop)
            # In a block on the diagonal the first columns are the rows that are held.
            visits += blocks * (last - first) + columns - (last if grid.symmetric else 0)
    return visits
