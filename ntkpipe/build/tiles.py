"""The job of a worker: compute a block at a time, from samples through Jacobian strips to stored tiles."""

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import gettempdir
from time import perf_counter, time
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntkpipe.base.errors import NonFiniteError, NtkpipeError
from ntkpipe.base.grid import Grid, Span
from ntkpipe.base.kinds import array_of
from ntkpipe.build.plan import BlockTask, Plan
from ntkpipe.build.records import BlockRecord, BuildRecord, TileRecord
from ntkpipe.build.scratch import Scratch, StripKey
from ntkpipe.build.strips import Contraction, Strip, StripCache, StripEngine
from ntkpipe.build.transfer import NUM_BUFFERS, Arrival, tile_buffers, to_host_tensor
from ntkpipe.executors.threads import RunStopped
from ntkpipe.jacobian.engine import Engine, JacobianBlock
from ntkpipe.jacobian.model.device import (
    describe_arithmetic,
    exact_process,
    is_out_of_memory,
    peak_memory,
    release_memory,
)
from ntkpipe.jacobian.model.functional import Batch
from ntkpipe.jacobian.model.samples import Source, show_samples
from ntkpipe.jacobian.representations.pieces import contract_planes
from ntkpipe.jacobian.representations.sums import Pairs, Workspace
from ntkpipe.store.growth import ChunkKey
from ntkpipe.store.layout import Index

_Worker = Callable[[BlockTask], Iterator[BuildRecord]]
# Row samples, and what was computed of them: outputs first, then entries for the arrays that lack them.
_Computed = tuple[Span, dict[ChunkKey, Arrival]]

_SPLITS = {"kernel/train": ("train", "train"), "kernel/test_train": ("test", "train")}


class Sink(Protocol):
    """Where finished chunks go."""

    def exists(self, array: str, index: Index) -> bool:
        """Whether the chunk is there already."""

    def write(self, array: str, index: Index, values: NDArray[Any]) -> None:
        """Store one chunk; the values may change after the call."""

    def place(self, array: str, index: Index) -> NDArray[Any] | None:
        """Memory where a tile may be computed in place, so that writing it copies nothing; none if there is none."""


@dataclass(frozen=True)
class BuildJob:
    """Everything that a worker needs for any task; idempotent, whatever ran before or runs beside it."""

    engine: StripEngine  # copied for each worker
    plan: Plan
    sources: Mapping[str, Source]  # samples by split, `train` and `test`
    is_mapping: bool  # whether a sample is a dict
    sink: Sink
    cache: StripCache  # shared by the workers of this process
    store_dtype: np.dtype[Any]  # of tiles and outputs
    pairs: Pairs = "all"  # of covectors that are contracted
    prefixes: tuple[str, ...] = ("kernel",)  # folders of the planes, in the order of contraction
    in_use: Callable[[], AbstractContextManager[None]] = nullcontext  # marks the store: a worker may outlive its driver
    scratch: Scratch = field(default_factory=Scratch)  # strips that processes of a machine share
    default_dtype: torch.dtype = field(default_factory=torch.get_default_dtype)  # of the process that makes the job
    contraction: Contraction = field(default_factory=Contraction)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Set up the arithmetic of a worker process, and mark the store as in use."""
        with exact_process(tf32=self.engine.model.tf32, default_dtype=self.default_dtype), self.in_use():
            yield

    def shrunk(self) -> "BuildJob":
        """The same work in half the memory: all sizes halved, one strip held, none shared."""
        halves = {name: max(1, getattr(self.plan, name) // 2) for name in ("strip", "subtile", "batch")}
        plan = replace(self.plan, **halves, hold=1, cache_bytes=0, scratch_bytes=0)
        return replace(self, plan=plan, cache=StripCache(0), scratch=Scratch())

    def open(self, pause: Callable[[], None], folder: Path | None = None) -> _Worker:
        """Prepare one worker: single-threaded arithmetic, its own copy of the module, its own workspace."""
        torch.set_num_threads(1)
        if self.plan.scratch_bytes:
            self.scratch.open(folder or Path(gettempdir()))
        device = torch.device(self.plan.machine.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread: pinned memory would open a context on the first GPU
        return _Builder(self, pause).run

    def close(self) -> None:
        """See :meth:`ntkpipe.executors.threads.Job.close`: shared strips are left to other processes, or removed."""
        self.scratch.close()


@dataclass
class Gram:
    """Fills tiles from the strips of one worker; where memory runs out, it halves the pieces from then on."""

    num_covectors: int
    pairs: Pairs
    pause: Callable[[], None]
    most: int | None = None  # samples of a piece, if there is a limit
    workspace: Workspace = field(default_factory=Workspace)
    contract: Callable[..., None] = contract_planes

    def fill(self, left: Strip, right: Strip, tiles: Sequence[Tensor], row: int, column: int, mirror: bool) -> None:
        """Write the Gram entries of two strips into the tile of every plane, sample-major."""
        while True:
            # The parts of a piece that meets itself must be the same objects on both sides.
            lefts = list(self._placed(left, row))
            rights = lefts if right is left and row == column else list(self._placed(right, column))
            try:
                for rows, one in lefts:
                    for columns, other in rights:
                        if mirror and columns.start < rows.start:
                            continue
                        self.pause()
                        parts = [tile[rows, columns] for tile in tiles]
                        self.contract(one, other, self.workspace, self.pairs, parts)
                        if mirror and columns != rows:
                            for tile in tiles:
                                tile[columns, rows] = tile[rows, columns].T
            except Exception as error:
                if not is_out_of_memory(error) or all(piece.num_samples == 1 for _, piece in (*lefts, *rights)):
                    raise
            else:
                return
            # Not in the handler: the error keeps the frames of the failed attempt alive, and so their tensors.
            largest = max(piece.num_samples for block in (left, right) for piece in block.pieces)
            self.most = max(1, min(largest, self.most or largest) // 2)
            self.workspace.clear()
            release_memory()

    def _placed(self, block: Strip, start: int) -> Iterator[tuple[slice, Any]]:
        """Pieces of a block, or parts of at most ``most`` samples, with their rows in the tile."""
        width = self.num_covectors
        for piece in block.pieces:
            size = piece.num_samples
            step = min(size, self.most or size)
            for first in range(0, size, step):
                part = piece if step == size else piece.part(first, min(first + step, size))
                place = start + first
                yield slice(place * width, (place + part.num_samples) * width), part
            start += size


class _Builder:
    def __init__(self, job: BuildJob, pause: Callable[[], None]) -> None:
        self._job = job
        self._plan = job.plan
        self._device = torch.device(job.plan.machine.device)
        self._engine = job.engine.moved(self._device).copy()
        self._pause = pause
        width = job.plan.workload.num_covectors
        rows, self._gram = job.plan.workload.tile * width, Gram(width, job.pairs, pause, contract=job.contraction.fill)
        self._buffers = [tile_buffers(self._device, rows, job.store_dtype) for _ in job.prefixes]
        self._held: dict[StripKey, Strip] = {}
        self._batch = job.plan.batch
        self._flops, self._num_bytes = 0.0, 0

    def run(self, task: BlockTask) -> Iterator[BuildRecord]:
        """Do one task; the last record sums it up."""
        started, began, tiles = time(), perf_counter(), 0
        self._flops, self._num_bytes = 0.0, 0
        with peak_memory(self._device) as peak:
            for tile in self._chunks(task):
                tiles += 1
                yield tile
        if tiles == 0:  # another run had done it
            return
        block = task.block
        yield BlockRecord(
            array=task.array,
            rows=(block.row_start, block.row_stop),
            columns=(block.column_start, block.column_stop),
            tiles=tiles,
            started=started,
            seconds=perf_counter() - began,
            flops=self._flops,
            num_bytes=self._num_bytes,
            peak_memory_bytes=peak(),
            batch=self._batch,
            subtile=self._subtile(),
            host=socket.gethostname(),
            process=os.getpid(),
            device=str(self._device),
            arithmetic=describe_arithmetic(self._device),
        )

    def _chunks(self, task: BlockTask) -> Iterator[TileRecord]:
        """Do one task; a separate thread writes tiles while the next ones are computed."""
        is_diagonal = task.array == "kernel/test_diagonal"
        with ThreadPoolExecutor(1, thread_name_prefix="ntkpipe-writer") as writer:
            pending: deque[Future[list[TileRecord]]] = deque()
            for tile in self._diagonal(task.block.row_start) if is_diagonal else self._tiles(task):
                pending.append(writer.submit(self._store, *tile))
                # The next tile reuses the buffers of the previous one, which must be free again.
                if len(pending) == NUM_BUFFERS:
                    yield from pending.popleft().result()
            for writing in pending:
                yield from writing.result()

    def _arrays(self, name: str) -> list[str]:
        return [array_of(prefix, name) for prefix in self._job.prefixes]

    def _store(self, span: Span, computed: dict[ChunkKey, Arrival]) -> list[TileRecord]:
        """Write the outputs of a tile's samples, then the tile of each plane, once all have arrived and are finite."""
        arrived = {key: self._as_stored(key[0], arrive(), span) for key, arrive in computed.items()}
        for (array, index), values in arrived.items():
            # Stored entries stay, even if they were recomputed for their outputs.
            if not self._job.sink.exists(array, index):
                self._job.sink.write(array, index, values)
                self._num_bytes += values.nbytes
        sizes = self._batch, self._subtile()
        return [TileRecord(*key, *sizes) for key in arrived if not key[0].startswith("outputs/")]

    def _subtile(self) -> int:
        return min(self._plan.subtile, self._gram.most or self._plan.subtile)

    def _tiles(self, task: BlockTask) -> Iterator[_Computed]:
        """Compute the missing tiles of a block: hold row strips, and stream column strips past them."""
        grid, split = self._plan.workload.grids[task.array], _SPLITS[task.array][0]
        rows = task.block.rows()
        for first in range(rows.start, rows.stop, self._plan.rows_held):
            group = range(first, min(first + self._plan.rows_held, rows.stop))
            strips = [(split, strip) for row in group for strip in grid.rows.samples(row).cut(self._plan.strip)]
            pinned = frozenset(strips) if len(strips) <= self._plan.hold else frozenset()
            for column in task.block.columns():
                for row in group:
                    if self._is_missing(task.array, grid, row, column):
                        yield self._tile(task.array, grid, row, column, pinned)

    def _is_missing(self, array: str, grid: Grid, row: int, column: int) -> bool:
        if not grid.is_stored(row, column):
            return False
        if grid.symmetric and row == column and not self._job.sink.exists("outputs/train", (row, 0)):
            return True
        return not all(self._job.sink.exists(each, (row, column)) for each in self._arrays(array))

    def _tile(self, array: str, grid: Grid, row: int, column: int, pinned: frozenset[StripKey]) -> _Computed:
        plan, width = self._plan, self._plan.workload.num_covectors
        row_split, column_split = _SPLITS[array]
        row_span, column_span = grid.rows.samples(row), grid.columns.samples(column)
        is_mirrored = grid.symmetric and row == column
        shape = len(row_span) * width, len(column_span) * width
        arrays = self._arrays(array)
        places = [self._job.sink.place(each, (row, column)) for each in arrays]
        tiles = [buffers.take(shape, place) for buffers, place in zip(self._buffers, places, strict=True)]
        outputs: dict[Span, torch.Tensor] = {}
        strips = row_span.cut(plan.strip)
        for start in range(0, len(strips), plan.hold):
            part = strips[start : start + plan.hold]
            keep = pinned or frozenset((row_split, strip) for strip in part)
            for strip in column_span.cut(plan.strip):
                if is_mirrored and strip < part[0]:
                    continue
                right = self._strip((column_split, strip), keep)
                for one in part:
                    if is_mirrored and strip < one:
                        continue
                    left = self._strip((row_split, one), keep | {(column_split, strip)})
                    outputs[one] = left.outputs
                    place = one.start - row_span.start, strip.start - column_span.start
                    self._gram.fill(left, right, tiles, *place, mirror=is_mirrored)
        sent = {each: buffers.send() for each, buffers in zip(arrays, self._buffers, strict=True)}
        # If only outputs are missing, the record names the first plane.
        missing = [each for each in arrays if not self._job.sink.exists(each, (row, column))] or arrays[:1]
        rows, columns = len(row_span), len(column_span)
        self._flops += plan.workload.cost.pair_flops * (rows * (rows + 1) / 2 if is_mirrored else rows * columns)
        found: dict[ChunkKey, Arrival] = {}
        if is_mirrored:
            found["outputs/train", (row, 0)] = self._fetch([outputs[strip] for strip in strips])
        return row_span, found | {(each, (row, column)): sent[each] for each in missing}

    def _fetch(self, parts: list[torch.Tensor]) -> Arrival:
        """Send small values to the host, in float64 since numpy has no bfloat16."""
        return self._buffers[0].fetch(torch.cat(parts).double())

    def _diagonal(self, number: int) -> Iterator[_Computed]:
        """Compute outputs and diagonal blocks of one tile of test samples, where they are missing."""
        plan, sink = self._plan, self._job.sink
        index, arrays = (number, 0, 0), self._arrays("kernel/test_diagonal")
        if sink.exists("outputs/test", (number, 0)) and all(sink.exists(array, index) for array in arrays):
            return
        span = plan.workload.grids["kernel/test_train"].rows.samples(number)
        parts: list[list[torch.Tensor]] = [[] for _ in arrays]
        outputs = []
        for strip in span.cut(plan.strip):
            self._pause()
            block = self._strip(("test", strip), frozenset())
            for piece in block.pieces:
                planes = self._job.contraction.diagonal(piece, self._job.pairs, len(arrays))
                for part, values in zip(parts, planes, strict=True):
                    part.append(values)
            outputs.append(block.outputs)
        found: dict[ChunkKey, Arrival] = {("outputs/test", (number, 0)): self._fetch(outputs)}
        yield span, found | {(array, index): self._fetch(part) for array, part in zip(arrays, parts, strict=True)}

    def _as_stored(self, array: str, values: NDArray[Any], span: Span) -> NDArray[Any]:
        """Values in the dtype of the store, checked; their first axis is the samples of ``span``."""
        with np.errstate(over="ignore"):  # reported below, with its samples
            values = values.astype(self._job.store_dtype, copy=False)
        finite = np.isfinite(values).reshape(len(span), -1).all(axis=1)
        if not finite.all():
            raise NonFiniteError(
                f"{array}: entries of {show_samples((span.start + np.flatnonzero(~finite)).tolist())} overflow "
                f"{self._job.store_dtype} although their Jacobians are finite; use accumulate_dtype='float64' and "
                "store_dtype='float64', or scale the model. They were not written"
            )
        return values

    def _strip(self, key: StripKey, keep: frozenset[StripKey]) -> Strip:
        """A strip: held, cached or computed. Afterwards only it and ``keep`` are held."""
        if key not in self._held:
            self._held = {other: block for other, block in self._held.items() if other in keep}
            self._held[key] = self._job.cache.get(key, lambda: self._read(key) or self._compute(key))
        return self._held[key]

    def _read(self, key: StripKey) -> Strip | None:
        """A strip that this or another process has left on disk; none if there is no whole one."""
        if not self._job.scratch.has(key):
            return None
        block = cast(Engine, self._engine).blank(len(key[1]), self._plan.subtile)
        return block if self._job.scratch.get(key, self._memory(block)) else None

    def _memory(self, block: Strip) -> list[Tensor]:
        """What a file holds of a strip; plans have files for Jacobians alone."""
        return cast(JacobianBlock, block).memory(cast(Engine, self._engine).covectors)

    def _compute(self, key: StripKey) -> Strip:
        split, span = key
        source, at = self._job.sources[split], span

        def load(start: int, stop: int) -> Batch:
            nonlocal at
            self._pause()
            at = Span(start, stop)
            arrays = {name: to_host_tensor(v, self._device) for name, v in source.read(start, stop).items()}
            batch: Batch = self._engine.model.to_batch(arrays, self._job.is_mapping)
            return batch

        try:
            sizes = {"subtile": self._plan.subtile, "batch": self._batch}
            block, self._batch = self._engine.block(load, span.start, span.stop, **sizes)
        except (NtkpipeError, RunStopped):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            where = f"on {split} samples {at.start}:{at.stop}, of which nothing was written"
            raise self._engine.model.failure(error, where) from error
        block.require_finite(split, range(span.start, span.stop))
        self._flops += len(span) * self._plan.workload.cost.jacobian_flops
        # What was computed in smaller batches for lack of memory has other last bits.
        if self._plan.scratch_bytes and self._batch == self._plan.batch:
            self._job.scratch.put(key, self._memory(block))
        return block
