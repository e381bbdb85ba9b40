"""Kernels without a store: a matrix in memory, with the engine and planner of a store, or products without a matrix."""

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ntkpipe.base.arguments import checked
from ntkpipe.base.config import ComputeDtype, MemoryLimit, RealDtype, check_number
from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.base.grid import Grid, matrix_tile
from ntkpipe.base.operator import Operator, Statistics, Work
from ntkpipe.base.resources import available_memory, num_cores
from ntkpipe.build.from_model import job_of
from ntkpipe.build.life import drain
from ntkpipe.build.plan import BlockTask, Plan, make_plan
from ntkpipe.build.prepare import (
    Prepared,
    Request,
    Settled,
    exact_single_thread,
    plan_and_check,
    prepare,
    products_of,
    require_finite,
    this_machine,
    traced_or_whole,
    workload_of,
)
from ntkpipe.build.records import BuildRecord, Sizes, TileRecord
from ntkpipe.executors.threads import ThreadExecutor
from ntkpipe.jacobian.engine import DataDependentError, Engine, JacobianBlock
from ntkpipe.jacobian.model.functional import Forward, resolve_device
from ntkpipe.jacobian.model.samples import as_samples, require_same_arrays
from ntkpipe.jacobian.model.state import fingerprint
from ntkpipe.jacobian.representations.pieces import contract_diagonal_planes
from ntkpipe.jacobian.self_check import self_check
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
        settled = settle_matrix(request)
        with suppress(DataDependentError):
            return build_matrix(settled, kind if progress else None)
        kernel = request.kernel.model_copy(update={"jacobian": "fallback"})
        return build_matrix(settle_matrix(replace(request, kernel=kernel)), kind if progress else None)


def settle_matrix(request: Request) -> Settled:
    """Do all work before the first tile, of tiles that are just small enough to occupy every worker."""
    run = request.run  # a GPU has one worker
    num_workers = 1 if resolve_device(run.device).type == "cuda" else run.workers or num_cores()
    prepared = prepare(request, device=run.device, choose_tile=partial(matrix_tile, num_workers=num_workers))
    name = "kernel/train" if prepared.test is None else "kernel/test_train"
    grid = prepared.grids()[name]
    dtype = np.dtype(prepared.spec.resolved_store_dtype())
    shape = (len(prepared.planes), *grid.shape)
    require_memory(shape, dtype, "the kernel", "Use compute_kernel, which writes a store")

    def planned(engine: Engine) -> Plan:
        workload = workload_of(prepared, engine, {name: grid})
        where = engine.model.device, engine.setup.rates.product
        return make_plan(workload, this_machine(*where, run, result_bytes=prod(shape) * dtype.itemsize))

    return plan_and_check(prepared, prepared.engine, planned, is_checked=run.self_check)


def build_matrix(settled: Settled, progress: str | None = None) -> NDArray[Any]:
    """Compute a settled kernel; may be called repeatedly."""
    prepared, plan = settled.prepared, settled.plan
    ((name, grid),) = plan.workload.grids.items()
    matrices = np.empty((len(prepared.planes), *grid.shape), np.dtype(prepared.spec.resolved_store_dtype()))
    sink = _MatrixSink({plane.array(name): each for plane, each in zip(prepared.planes, matrices, strict=True)}, grid)
    job = job_of(settled, {split: each.source for split, each in prepared.samples.items()}, sink)
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


_SHARE_OF_MEMORY = 0.5  # of the free memory, for the self-check, which has no plan
_COMPARED = 5  # samples by which the way of finding products is chosen
_NUM_PROBES = 32  # random sign vectors for the Frobenius norm


class JacobianOperator(Operator):
    """The kernel of a model and samples, never formed: ``K v = J (J' v)``."""

    # A product is, for each column, one vector-Jacobian and one Jacobian-vector product a batch, each with its forward
    # pass, in the compute dtype; sums over batches are float64. The diagonal is exact, by one pass of per-sample
    # Jacobians. The Frobenius norm, which :meth:`storage_floor` needs, is estimated from 32 products with random signs.

    work = Work()  # a pass is a product with any number of columns

    def __init__(
        self, prepared: Prepared, engine: Engine, *, batch: int, identity: str, step: Callable[[], None]
    ) -> None:
        kind, model = prepared.kind, prepared.model
        if kind.pairs == "same":
            raise ConfigError(
                f"kind={kind.name!r} is a matrix for each output; give 'output:k', or 'trace' for their mean"
            )
        dtype = np.dtype(np.float64 if model.dtype == torch.float64 else np.float32)
        super().__init__(prepared.train.num_samples * prepared.num_covectors, dtype)
        size = prepared.train.num_samples
        few = prepared.train.first(min(size, _COMPARED)).source
        self._products = [each.agreeing(few) for each in products_of(prepared, size, size, size, batch)]
        # The identity holds digests of parameters and samples, and what is computed from them.
        self._prepared, self._engine, self._identity, self._step = prepared, engine, identity, step

    def identity(self) -> str:
        """See :meth:`Operator.identity`."""
        return self._identity

    def _multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        start, source = perf_counter(), self._prepared.train.source
        found = np.zeros_like(block)
        with exact_single_thread(self._prepared.spec.compute_dtype):
            for column in range(block.shape[1]):
                vector = np.ascontiguousarray(block[:, column])
                for products in self._products:
                    direction = products.transposed(source, vector, self._step)
                    found[:, column] += products.product(source, direction, self._step)
        self.work += Work(1.0, 0, perf_counter() - start)
        if not np.isfinite(found).all():
            self._diagonal()  # names the samples
            raise NonFiniteError("products with the Jacobian overflow although it is finite; scale the model")
        return found

    def _measure(self) -> Statistics:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(self.num_rows, _NUM_PROBES))
        squared = float(np.square(self.matmat(signs)).sum()) / _NUM_PROBES
        return Statistics(self._diagonal(), squared**0.5)

    def _diagonal(self) -> NDArray[np.float64]:
        start, parts = perf_counter(), []
        with exact_single_thread(self._prepared.spec.compute_dtype):
            for span, batch in self._products[0].batches(self._prepared.train.source):
                piece, outputs = self._engine.piece(batch)
                numbers = 2 * [*range(span.start, span.stop)]  # a single sample is in its batch twice
                JacobianBlock((piece,), outputs).require_finite("train", numbers)
                (values,) = contract_diagonal_planes(piece, self._prepared.kind.pairs, 1)
                parts.append(values[: len(span)].diagonal(dim1=1, dim2=2).reshape(-1).double().cpu())
                self._step()
        self.work += Work(1.0, 0, perf_counter() - start)
        return torch.cat(parts).numpy()


@checked
def jacobian_operator(
    model: nn.Module,
    inputs: object,
    *,
    kind: str = "pntk",
    forward: "Forward" = None,
    parameters: str | Sequence[str] | None = None,
    compute_dtype: ComputeDtype = "float64",
    batch: int = 64,
    device: str | None = None,
    step: Callable[[], None] = lambda: None,
) -> JacobianOperator:
    """The kernel as an operator for solvers, without a matrix anywhere.

    This pays where few products are needed, or where no disk holds the matrix. Memory is one batch and two vectors of
    all parameters in float64. The Frobenius norm is an estimate with a standard error of at most an eighth.

    Parameters
    ----------
    kind
        Kind of kernel: ``"pntk"``, ``"trace"``, ``"output:k"`` or ``"ntk"``.
    compute_dtype
        dtype of products with the Jacobian. In float32 they are no more exact than a kernel of float32.
    batch
        Samples of one forward pass, at least 2.
    step
        Called after each batch of each product.

    Raises
    ------
    ConfigError, DataError, ModelError
        If an option is wrong, the kind has a matrix for each output, or samples or model cannot be used as they are.
    SelfCheckError
        If its Jacobians are not what plain autograd says, or depend on the rest of the batch.
    """
    given = locals()
    check_number("batch", batch, low=2)
    samples = as_samples(inputs, with_targets=False)
    digest = samples.inspect("inputs").inputs_digest
    with exact_single_thread(compute_dtype):
        request = Request.of(given, (samples, None))
        prepared = prepare(request, device=device)
        memory = int(_SHARE_OF_MEMORY * available_memory())

        def settled(engine: Engine) -> Engine:
            require_finite(prepared, engine, subtile=batch, batch=batch)
            return self_check(engine, prepared.load, samples.num_samples, batch=batch, memory_bytes=memory)[0]

        engine = traced_or_whole(prepared, prepared.engine, settled)
    made_from = fingerprint(request.model, prepared.model.names)
    identity = f"J J' {kind} {compute_dtype} {made_from.state_digest} {made_from.structure_digest} {digest}"
    return JacobianOperator(prepared, engine, batch=batch, identity=identity, step=step)
