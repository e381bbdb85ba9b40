"""The planner: choose strips, batches, blocks and shared memory so that the work fits the machine."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ntkpipe.base.grid import Grid
from ntkpipe.base.resources import format_bytes
from ntkpipe.build.plan import Machine, Plan, Workload
from ntkpipe.jacobian.model.device import Sizes
from ntkpipe.store.manifest import Choices

_MAX_EDGE = 16
_BLOCKS_PER_WORKER = 4
_MOST_BLOCKS_PER_WORKER = 64  # more do not balance the workers better
_BLOCK_OVERHEAD_SECONDS = 0.05  # rough time of a worker for receiving a block and writing its last tile
_BLOCK_SECONDS = 60.0  # longest time of a block, so that a stop or a kill loses little
_RECOMPUTE_SHARE = 0.03  # recomputing Jacobians is tolerated while it costs less than this share of the contraction
_BUFFERS = 3


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
    workers = machine.workers
    plan = _fit(workload, machine, choices)
    while plan.memory_bytes > machine.memory_limit and workers > 1 and not machine.is_remote:
        workers //= 2
        plan = _fit(workload, replace(machine, workers=workers), choices)
    problems = []
    if plan.memory_bytes > machine.memory_limit:
        who, remedy, threads = "the run needs", "Raise memory_limit", "one worker"
        if machine.is_remote:
            who, threads = "a worker process needs", f"{machine.workers} thread(s)"
            remedy = "Start workers with more memory (ntkpipe uses 85 % of their limit) or fewer threads"
        problems.append(
            f"{who} {format_bytes(plan.memory_bytes)} of memory with {threads}, of which "
            f"{format_bytes(machine.base_memory)} are in use already; the limit is "
            f"{format_bytes(machine.memory_limit)}. {remedy}, or use a smaller tile (now {workload.tile} samples, "
            f"{format_bytes(workload.tile_bytes)})"
            + ("" if choices is None else "; this store was begun with more memory and keeps its strips")
        )
    if machine.free_disk is not None and bytes_to_write > machine.free_disk:
        problems.append(
            f"the store needs {format_bytes(bytes_to_write)} more, {format_bytes(machine.free_disk)} of disk are free; "
            "free some, choose another path, a smaller store_dtype or fewer samples"
        )
    return replace(
        plan,
        tiles_done=tiles_done,
        bytes_to_write=bytes_to_write,
        problems=tuple(problems),
        is_resumed=choices is not None,
    )


def _fit(workload: Workload, machine: Machine, choices: Choices | None) -> Plan:
    """Best plan for a number of workers; its memory exceeds the limit where nothing smaller works."""
    cost, tile = workload.cost, workload.tile
    share = (machine.memory_limit - machine.base_memory) / machine.workers
    sizes = machine.sizes
    subtile = min(max(1, int(sizes.piece_rows / workload.num_matrices**0.5) // workload.num_covectors), tile)
    room = max(0.0, share - _fixed_bytes(workload, subtile, sizes))
    most = min(0.3 * room, sizes.batch_bytes) / cost.workspace_bytes, sizes.tensor_bytes / cost.largest_bytes
    batch = min(1 << (max(2, int(min(most))).bit_length() - 1), subtile)  # a power of two, unless a piece is smaller
    affordable = int(max(0.0, room - batch * cost.workspace_bytes) / cost.block_bytes)
    # Two tiles' Jacobians at once if they fit (one held, one streaming) beside the piece that is being put together;
    # else strips of a quarter of what fits: two held, one streaming, one being put together.
    strip = tile if affordable >= 2 * tile + subtile else max(1, affordable // 4)
    if choices is not None:
        strip, subtile, batch = choices.strip, choices.subtile, choices.batch
        room = max(0.0, share - _fixed_bytes(workload, subtile, sizes))
        affordable = int(max(0.0, room - batch * cost.workspace_bytes) / cost.block_bytes)
    subtile, batch = min(subtile, strip), min(batch, strip)
    strips = -(-tile // strip)
    affordable_strips = max(2, (affordable - subtile) // strip)
    num_samples = workload.num_samples
    everything = num_samples * cost.block_bytes

    def with_edge(edge: int) -> Plan:
        plan = Plan(
            workload=workload,
            machine=machine,
            strip=strip,
            subtile=subtile,
            batch=batch,
            hold=max(1, min(affordable_strips - 1, edge if strips == 1 else strips)),
            edge=edge,
            pair_flops=sum(grid.num_pairs for grid in workload.grids.values()) * cost.pair_flops,
        )
        factor = _strip_visits(plan) / num_samples
        excess = (factor - 1) * num_samples * cost.jacobian_flops
        spare = machine.memory_limit - machine.base_memory - machine.workers * _worker_bytes(plan)
        if excess > _RECOMPUTE_SHARE * plan.pair_flops and spare > 0:
            plan = replace(plan, cache_bytes=int(min(everything, spare)))
            if plan.cache_bytes >= everything:
                factor = min(factor, float(machine.processes))
        return replace(plan, recompute_factor=factor, jacobian_flops=factor * num_samples * cost.jacobian_flops)

    plan = min(map(with_edge, _edges(workload, machine)), key=_seconds_to_the_end)
    if plan.cache_bytes >= everything and not machine.is_remote:
        # No strip is computed twice whatever the blocks are: the smallest ones balance the workers best.
        plan = replace(plan, edge=1, hold=min(plan.hold, strips))
    memory_bytes = int(machine.base_memory + plan.cache_bytes + machine.workers * _worker_bytes(plan))
    return replace(plan, memory_bytes=memory_bytes)


def _edges(workload: Workload, machine: Machine) -> list[int]:
    """Block edges to choose from: the largest that leaves each worker several blocks, none of them too long."""
    tile_seconds = workload.tile**2 * workload.cost.pair_flops / machine.flops_per_second
    blocks = {edge: sum(grid.num_blocks(edge) for grid in workload.grids.values()) for edge in range(1, _MAX_EDGE + 1)}
    short = [edge for edge in blocks if edge**2 * tile_seconds <= _BLOCK_SECONDS]
    largest = max((edge for edge in short if blocks[edge] >= _BLOCKS_PER_WORKER * machine.num_workers), default=1)
    if not machine.is_remote:
        return [largest]
    # Processes that share no strips may do better with smaller blocks, which keep all of them busy until the end.
    most = _MOST_BLOCKS_PER_WORKER * machine.num_workers
    return [largest, *(edge for edge in range(largest - 1, 0, -1) if blocks[edge] <= most)]


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
    fixed = _fixed_bytes(plan.workload, plan.subtile, plan.machine.sizes)
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
            # Each column tile is streamed once for each group of rows; rows are computed once a block.
            visits += sum(height + width for height, width in _groups(grid, plan.edge, plan.rows_held)) * load.tile
        else:
            # Parts of one row tile are held in turn: columns pass once for each part, rows again for each column.
            visits += grid.num_tiles * load.tile * (1 + parts)
    return max(visits, float(load.num_samples))


def _groups(grid: Grid, edge: int, height: int) -> Iterator[tuple[int, float]]:
    """``(row tiles, column tiles)`` of every group of rows held together in some block."""
    for row in range(0, grid.rows.num_tiles, edge):
        stop = min(row + edge, grid.rows.num_tiles)
        starts = np.arange(row if grid.symmetric else 0, grid.columns.num_tiles, edge)
        widths = np.minimum(starts + edge, grid.columns.num_tiles) - starts
        for first in range(row, stop, height):
            last = min(first + height, stop)
            for start, width in zip(starts, widths, strict=True):
                # In a block on the diagonal the columns are the rows that are held.
                inside = grid.symmetric and start == row
                yield last - first, float(max(0, start + width - last) if inside else width)
