"""Prepare a run without writing anything: check and trace the model, measure costs, and plan."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ntkpipe.base.config import ComputeDtype, KernelSpec, RunSpec, spec_of
from ntkpipe.base.errors import ConfigError, DataError, NtkpipeError
from ntkpipe.base.grid import Grid, default_tile, kernel_grids
from ntkpipe.base.kinds import INFINITE, MAX_PLANES, Kind, Plane, get_kind, match_groups, num_planes, planes_of
from ntkpipe.base.paths import said
from ntkpipe.base.resources import available_memory, num_cores, process_memory
from ntkpipe.build.plan import Machine, Plan, Workload
from ntkpipe.jacobian.cost import Cost, make_meter
from ntkpipe.jacobian.engine import DataDependentError, Engine
from ntkpipe.jacobian.fallback import JacobianProducts, batch_size, take
from ntkpipe.jacobian.learnt import key_of
from ntkpipe.jacobian.model.device import exact_math, free_memory, is_out_of_memory, sizes_of, without_tf32
from ntkpipe.jacobian.model.functional import (
    DTYPES,
    Batch,
    Forward,
    FunctionalModel,
    prepare_model,
    resolve_device,
    uncompiled,
)
from ntkpipe.jacobian.model.memory import keep_freed_memory, return_freed_memory
from ntkpipe.jacobian.model.samples import Samples, as_samples, require_same_arrays
from ntkpipe.jacobian.model.state import num_bytes
from ntkpipe.jacobian.probe import Probed, make_engine, probe, probe_samples
from ntkpipe.jacobian.representations.interface import Rates, Setup
from ntkpipe.jacobian.self_check import CheckReport, self_check
from ntkpipe.store.store import Store

T = TypeVar("T")
_SHARE_OF_MEMORY = 0.7  # of the free memory, for a run without a memory limit
_COST_BATCH = 4
_TIMED_SECONDS = 0.2  # long enough for the time of a batch of Jacobians to be reliable
_STRIPS = 4  # Jacobian strips that a worker holds at once
# Memory of a worker outside of tensors (scratch of BLAS and oneDNN, freed memory that the allocator keeps), measured
# up to 24 MiB.
_LIBRARY_BYTES = 32 * 2**20


@contextmanager
def exact_single_thread(compute_dtype: ComputeDtype = "float32") -> Iterator[None]:
    """The arithmetic of every tile, until the context is left: one thread, no fused paths, TF32 only on request."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        with exact_math(tf32=compute_dtype == "tf32"), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Request:
    """A kernel that is asked for."""

    model: nn.Module
    train: Samples
    test: Samples | None
    kernel: KernelSpec
    run: RunSpec
    forward: Forward = None

    @classmethod
    def of(
        cls,
        arguments: Mapping[str, Any],
        samples: tuple[Samples, Samples | None] | None = None,
        stored: Store | None = None,
    ) -> "Request":
        """The request that the arguments of a public function make, by default of the samples among them."""
        if samples is not None:
            train, test = samples
        else:
            train, test = as_samples(arguments["inputs"], arguments["targets"]), None
            if arguments["test_inputs"] is not None:
                test = as_samples(arguments["test_inputs"], arguments["test_targets"], label="test_inputs")
                require_same_arrays(train, test, "test_inputs")
            elif arguments["test_targets"] is not None:
                raise DataError("test_targets were given without test_inputs")
        kernel, run = spec_of(KernelSpec, arguments), spec_of(RunSpec, arguments)
        if stored is not None:  # its tile was cut to the samples of the first run; another one may be asked for
            manifest = stored.manifest
            first = (*manifest.earlier(), manifest)[0].train.num_samples
            if kernel.tile is None or min(kernel.tile, first) == manifest.tile:
                kernel = kernel.model_copy(update={"tile": manifest.tile})
        model = arguments["model"]
        model = uncompiled(model) if isinstance(model, nn.Module) else model  # what is none is refused with its reason
        return cls(model, train, test, kernel, run, arguments["forward"])


@dataclass(frozen=True)
class Prepared:
    """A checked model with its samples."""

    spec: KernelSpec
    kind: Kind
    probed: Probed  # the model in the compute dtype, on the device, as a few samples show it
    train: Samples
    test: Samples | None
    tile: int  # samples along a tile's edge
    groups: Mapping[str, tuple[str, ...]]  # parameters of each group by name

    @cached_property
    def engine(self) -> Engine:
        """Traced, not yet self-checked."""
        dtype, where = DTYPES[self.spec.resolved_accumulate_dtype()], self.model.device
        # A GPU has one worker, a CPU one per core.
        free = free_memory(where) if where.type == "cuda" else available_memory() / num_cores()
        setup = Setup(
            covectors=torch.from_numpy(self.kind.covectors(self.num_outputs)),
            pairs=self.kind.pairs,
            accumulate_dtype=dtype,
            rates=measure_rates(where, dtype),
            num_samples=self.tile,
            memory_bytes=_SHARE_OF_MEMORY * free / _STRIPS,
            piece_rows=sizes_of(where).piece_rows,
            groups=tuple(self.groups.values()),
        )
        return make_engine(self.probed, setup)

    @property
    def model(self) -> FunctionalModel:
        """The model of a run."""
        return self.probed.model

    @property
    def num_outputs(self) -> int:
        """O."""
        return self.probed.num_outputs

    @property
    def planes(self) -> tuple[Plane, ...]:
        """Matrices that are filled together."""
        return planes_of(self.spec.kind, self.num_outputs, self.groups)

    @property
    def num_covectors(self) -> int:
        """Rows per sample, S."""
        return self.kind.num_covectors(self.num_outputs)

    @property
    def samples(self) -> dict[str, Samples]:
        """Samples by split."""
        return {"train": self.train} | ({} if self.test is None else {"test": self.test})

    def load(self, samples: Sequence[int]) -> Batch:
        """Load any train samples as a batch on the device."""
        return _load(self.model, self.train, samples)

    @property
    def num_test(self) -> int:
        """Test samples; zero without a test set."""
        return 0 if self.test is None else self.test.num_samples

    def grids(self) -> dict[str, Grid]:
        """The kernels of a store of these samples."""
        return kernel_grids(self.train.num_samples, self.num_test or None, self.num_covectors, self.tile)


def _load(model: FunctionalModel, samples: Samples, numbers: Sequence[int]) -> Batch:
    arrays = [samples.source.read(i, i + 1) for i in numbers]
    try:
        joined = {name: torch.from_numpy(np.concatenate([a[name] for a in arrays])) for name in arrays[0]}
    except (KeyError, ValueError) as error:
        raise DataError(
            f"samples {', '.join(map(str, numbers))} do not have the same arrays ({said(error)}); pad or crop them"
        ) from error
    return model.to_batch(joined, samples.is_mapping)


def prepare(
    request: Request, *, device: str | None, choose_tile: Callable[[int, int, int], int] = default_tile
) -> Prepared:
    """Check the model on a few samples, and decide how its Jacobians are computed."""
    train, spec = request.train, request.kernel
    kind = get_kind(spec.kind)
    if kind == INFINITE:
        raise ConfigError(f"kind={spec.kind!r} is of networks of infinite width, of compute_infinite_kernel alone")
    functional = prepare_model(
        request.model,
        forward=request.forward,
        parameters=spec.parameters,
        dtype=DTYPES[spec.compute_dtype],
        device=resolve_device(device),
        tf32=spec.compute_dtype == "tf32",
    )
    load = partial(_load, functional, train)
    asked = spec.model_dump_json(exclude={"parameters", "tile", "store_dtype"}), functional.names
    key = partial(key_of, request.model, request.forward, *asked, str(functional.device), sizes_of(functional.device))
    is_structured = spec.jacobian == "structured"
    probed = probe(functional, load, train.num_samples, structured=is_structured, key_of=lambda x: key(batch=x))
    num_outputs = probed.num_outputs
    groups = match_groups(spec.groups, functional.names)
    count = num_planes(spec.kind, num_outputs, len(groups))
    if count > MAX_PLANES:
        raise ConfigError(
            f"kind={spec.kind!r} of {num_outputs} outputs and {len(groups)} groups are {count} kernels side by "
            f"side; at most {MAX_PLANES} are possible. Pick outputs by the forward hook"
        )
    chosen = spec.tile or choose_tile(train.num_samples, kind.num_covectors(num_outputs), count)
    chosen = min(chosen, train.num_samples)
    return Prepared(spec, kind, probed, train, request.test, chosen, groups)


def products_of(prepared: Prepared, tile: int, strip: int, subtile: int, batch: int) -> list[JacobianProducts]:
    """Products with all covectors; of a kind whose unlike outputs do not meet, with one at a time."""
    model, kind = prepared.model, prepared.kind
    covectors = torch.from_numpy(kind.covectors(prepared.num_outputs)).to(model.device, model.dtype)
    apart = [covectors] if kind.pairs == "all" else [one[None] for one in covectors]
    sizes = tile, strip, subtile, batch
    return [JacobianProducts(model, each, *sizes, prepared.train.is_mapping) for each in apart]


def workload_of(prepared: Prepared, engine: Engine, grids: Mapping[str, Grid], num_test: int = 0) -> Workload:
    """What is to be computed; measures the cost of Jacobians."""
    spec, module = prepared.spec, engine.model.module
    cost = _cost(prepared, engine)
    copied = num_bytes((*module.parameters(), *module.buffers()))  # by each worker
    fixed = cost.fixed_workspace_bytes + copied + _LIBRARY_BYTES
    return Workload(
        grids=grids,
        num_test=num_test,
        tile=prepared.tile,
        num_covectors=prepared.num_covectors,
        store_itemsize=np.dtype(spec.resolved_store_dtype()).itemsize,
        cost=replace(cost, fixed_workspace_bytes=fixed),
        num_matrices=prepared.kind.num_matrices(prepared.num_outputs),
        num_groups=len(prepared.groups),
    )


def _cost(prepared: Prepared, engine: Engine) -> Cost:
    """What a sample costs, measured once for each way in which the Jacobians of a model are found and held."""
    chosen, known = probe_samples(prepared.train.num_samples)[:_COST_BATCH], prepared.probed.learnt.costs
    batch = prepared.load(chosen)
    with engine.model.turn, make_meter() as meter:  # values are looked at each time: operations may depend on them
        engine.forward(batch)
    counts = meter.num_flops, meter.num_bytes, meter.largest_bytes
    key = (*engine.representations.items(), engine.setup.piece_rows, *counts)
    if key not in known:
        known[key] = engine.cost(batch, chosen)
    else:
        with engine.model.turn:
            engine.forward(take(batch, range(_COST_BATCH // 2)))
    return known[key]


def this_machine(
    device: torch.device, rate: float, run: RunSpec, *, result_bytes: int = 0, free_disk: int | None = None
) -> Machine:
    """What this process may use, of which ``result_bytes`` are taken; one worker does ``rate`` operations a second."""
    if run.memory_limit is not None:
        return_freed_memory()
    base = process_memory() + result_bytes
    limit = run.memory_limit or base + int(_SHARE_OF_MEMORY * max(0, available_memory() - result_bytes))
    if device.type == "cuda":
        # Strips live on the device: plan for the smaller memory, so that they need not be halved during the run.
        limit = min(limit, base + int(_SHARE_OF_MEMORY * free_memory(device)))
    return Machine(
        workers=(run.workers or num_cores()) if device.type == "cpu" else 1,
        memory_limit=int(limit),
        base_memory=base,
        free_disk=free_disk,
        flops_per_second=rate,
        device=str(device),
    )


@dataclass(frozen=True)
class Settled:
    """How a run computes."""

    prepared: Prepared
    engine: Engine  # self-checked, if the run asks for that
    plan: Plan  # fits the machine
    check: CheckReport | None  # result of the self-check
    check_seconds: float


def plan_and_check(
    prepared: Prepared, engine: Engine, planned: Callable[[Engine], Plan], *, is_checked: bool
) -> Settled:
    """Plan what must fit, self-check, and plan anew where that changes how Jacobians are found."""
    settle = partial(_settle, prepared, planned=planned, is_checked=is_checked)
    return traced_or_whole(prepared, engine, settle)


def traced_or_whole(prepared: Prepared, engine: Engine, use: Callable[[Engine], T]) -> T:
    """Use an engine before a run; if that shows that operations depend on the data, the same without structure."""
    try:
        return use(engine)
    except DataDependentError:
        pass
    return use(engine.without_structure(prepared.probed.batch))


def _settle(prepared: Prepared, engine: Engine, *, planned: Callable[[Engine], Plan], is_checked: bool) -> Settled:
    plan = planned(engine).fitting()
    started, memory = perf_counter(), plan.machine.memory_limit - plan.machine.base_memory
    samples = prepared.train.num_samples
    try:
        require_finite(prepared, engine, subtile=plan.subtile, batch=plan.batch)
        if not is_checked:
            return Settled(prepared, engine, plan, None, 0.0)
        sizes = {"batch": plan.batch, "memory_bytes": memory, "threads": plan.machine.workers}
        checked, report = self_check(engine, prepared.load, samples, **sizes)
    except NtkpipeError:
        raise
    except Exception as error:  # its samples are new to the model
        if is_out_of_memory(error):
            raise
        raise prepared.model.failure(error, "in the self-check") from error
    seconds = perf_counter() - started
    if checked.representations != engine.representations:
        plan = planned(checked).fitting()
    return Settled(prepared, checked, plan, report, seconds)


def require_finite(prepared: Prepared, engine: Engine, *, subtile: int, batch: int) -> None:
    """Check the Jacobians of samples with infinite entries, one for each arrangement of them."""
    for split, samples in prepared.samples.items():
        for start in range(0, len(samples.infinite), subtile):
            chosen = samples.infinite[start : start + subtile]

            def load(first: int, last: int, samples: Samples = samples, chosen: list[int] = chosen) -> Batch:
                return _load(engine.model, samples, chosen[first:last])

            block, _ = engine.block(load, 0, len(chosen), subtile=subtile, batch=batch)
            block.require_finite(split, chosen)


def time_jacobians(plan: Plan, prepared: Prepared, engine: Engine) -> Plan:
    """Add the measured time of a sample's Jacobians, unless the plan does not fit."""
    # They are slower than matrix products of as many operations. Run a batch, or a smaller one that takes long enough.
    if plan.memory_bytes > plan.machine.memory_limit:
        return plan
    batch, size = prepared.load(probe_samples(prepared.train.num_samples)), min(4, plan.batch)
    while True:
        repeated = take(batch, [i % batch_size(batch) for i in range(size)])
        seconds = _best_seconds(partial(engine.piece, repeated), engine.model.device, tries=1)
        if size >= plan.batch or seconds >= _TIMED_SECONDS:
            return replace(plan, sample_seconds=seconds / size)
        size = min(4 * size, plan.batch)


@cache
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of one thread of the device, once a process; that of products is measured, as the best of a few tries."""
    # The other is a fixed ratio of it: it decides representations, and so bits, whatever else runs on the machine.
    sizes = sizes_of(device)
    left: Tensor = torch.ones((sizes.rate_size, sizes.rate_size), dtype=dtype, device=device)
    result = torch.empty_like(left)
    with without_tf32(device):
        product = 2.0 * sizes.rate_size**3 / _best_seconds(lambda: torch.mm(left, left, out=result), device)
    return Rates(product, product / sizes.entry_flops)


def _best_seconds(run: Callable[[], object], device: torch.device, tries: int = 3) -> float:
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter()

    seconds = []
    for _ in range(tries):
        start = clock()
        run()
        seconds.append(clock() - start)
    return min(seconds)
