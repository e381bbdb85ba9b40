"""``kernel_matrix``: a kernel in memory, with the engine and planner of a store but tiles in a NumPy array."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ntkpipe.base.arguments import checked
from ntkpipe.base.budget import MemoryLimit
from ntkpipe.base.config import ComputeDtype, RealDtype, RunSpec
from ntkpipe.base.grid import Grid, matrix_tile
from ntkpipe.base.resources import num_cores
from ntkpipe.build.from_model import Settled, job_of, plan_and_check
from ntkpipe.build.life import drain
from ntkpipe.build.plan import BlockTask, Plan
from ntkpipe.build.planner import make_plan
from ntkpipe.build.prepare import Prepared, exact_single_thread, prepare, this_machine, workload_of
from ntkpipe.build.records import BuildRecord, Sizes, TileRecord
from ntkpipe.build.request import Request
from ntkpipe.executors.threads import ThreadExecutor
from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.model.functional import Forward, resolve_device
from ntkpipe.jacobian.model.samples import as_samples, require_same_arrays
from ntkpipe.store.kernel import require_memory
from ntkpipe.store.layout import Index


@checked
def kernel_matrix(
    model: nn.Module,
    inputs: object,
    other: object = None,
    *,
    kind: str = "pntk",
    forward: "Forward" = None,
    parameters: str | Sequence[str] | None = None,
    compute_dtype: ComputeDtype = "float32",
    accumulate_dtype: RealDtype | None = None,
    store_dtype: RealDtype | None = None,
    tile: int | None = None,
    memory_limit: MemoryLimit = None,
    device: str | None = None,
    self_check: bool = True,
    workers: int | None = None,
    jacobian: Literal["structured", "fallback"] = "structured",
    progress: bool = False,
) -> NDArray[Any]:
    """Compute a kernel in memory, without a store.

    Parameters
    ----------
    other
        M other samples for the columns; default the inputs themselves.
    tile
        Samples along the edge of what one worker computes at a time; default what gives every worker something to do.

    Returns
    -------
    K(inputs, other), shape (N*S, M*S), or the symmetric K(inputs, inputs), shape (N*S, N*S); row = sample * S +
    covector. For ``kind="diagonal"`` one for each output, shape (O, N, M).

    Raises
    ------
    ResourceError
        If the matrix does not fit in memory.
    """
    given = locals()
    # Columns are the train samples: a symmetric kernel is train x train, another one test x train.
    train, test = as_samples(inputs, with_targets=False), None
    if other is not None:
        train, test = as_samples(other, label="other", with_targets=False), train
        require_same_arrays(train, test, "inputs")
        train.inspect("other")
    (train if test is None else test).inspect("inputs")
    request = Request.of(given, (train, test))
    with exact_single_thread(compute_dtype):
        prepared = prepare_matrix(request)
        return build_matrix(prepared, settle_matrix(prepared, request.run), kind if progress else None)


def prepare_matrix(request: Request) -> Prepared:
    """Prepare a kernel in tiles that are just small enough to occupy every worker."""
    run = request.run  # a GPU has one worker
    num_workers = 1 if resolve_device(run.device).type == "cuda" else run.workers or num_cores()
    return prepare(request, device=run.device, choose_tile=partial(matrix_tile, num_workers=num_workers))


def settle_matrix(prepared: Prepared, run: RunSpec) -> Settled:
    """Do all work before the first tile: measure costs, plan and self-check."""
    name = "kernel/train" if prepared.test is None else "kernel/test_train"
    grid = prepared.grids()[name]
    dtype = np.dtype(prepared.spec.resolved_store_dtype())
    shape = (len(prepared.planes), *grid.shape)
    require_memory(shape, dtype, "the kernel", "Use compute_kernel, which writes a store")

    def planned(engine: Engine) -> Plan:
        workload = workload_of(prepared, engine, {name: grid})
        return make_plan(workload, this_machine(engine, run, result_bytes=prod(shape) * dtype.itemsize)).fitting()

    return plan_and_check(prepared, prepared.engine, planned, is_checked=run.self_check)


def build_matrix(prepared: Prepared, settled: Settled, progress: str | None = None) -> NDArray[Any]:
    """Compute a settled kernel; may be called repeatedly."""
    plan = settled.plan
    ((name, grid),) = plan.workload.grids.items()
    matrices = np.empty((len(prepared.planes), *grid.shape), np.dtype(prepared.spec.resolved_store_dtype()))
    sink = _MatrixSink({plane.array(name): each for plane, each in zip(prepared.planes, matrices, strict=True)}, grid)
    job = job_of(prepared, settled, {split: each.source for split, each in prepared.samples.items()}, sink)
    executor = ThreadExecutor[BlockTask, BuildRecord](plan.machine.workers)
    with closing(executor.run(job, plan.tasks())) as running:
        tiles = (record for record in Sizes(plan).watch(running) if isinstance(record, TileRecord))
        drain(tiles, plan.workload.num_tiles, 0, progress)
    return matrices if prepared.kind.pairs == "same" else matrices[0]


@dataclass(frozen=True)
class _MatrixSink:
    """Puts tiles into matrices in memory, mirrored if symmetric, and drops outputs."""

    matrices: dict[str, NDArray[Any]]  # by array
    grid: Grid

    def exists(self, array: str, index: Index) -> bool:
        """Whether it need not be computed: true for outputs, false for tiles."""
        return array not in self.matrices

    def place(self, array: str, index: Index) -> NDArray[Any]:
        """The tile's part of the matrix."""
        rows, columns = self.grid.rows.rows(index[0]), self.grid.columns.rows(index[1])
        return self.matrices[array][rows.start : rows.stop, columns.start : columns.stop]

    def write(self, array: str, index: Index, values: NDArray[Any]) -> None:
        """Mirror a tile, which was computed in place."""
        if self.grid.symmetric and index[0] != index[1]:
            self.place(array, index[::-1])[:] = values.T
