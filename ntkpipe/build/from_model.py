"""One run of a kernel into its store: settle plan and store, then build every missing tile."""

import platform
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ntkpipe.base.config import ComputeDtype
from ntkpipe.base.errors import Interrupted, ModelError, NtkpipeError, SelfCheckError, StoreFullError, TileError
from ntkpipe.base.progress import show_progress
from ntkpipe.build.matching import require_same
from ntkpipe.build.plan import BlockTask, Plan
from ntkpipe.build.planner import make_plan
from ntkpipe.build.prepare import Prepared, reuse_choices, where_computed, workload_of
from ntkpipe.build.records import BuildRecord, RunLog, TileRecord
from ntkpipe.build.tiles import BuildJob, Sink, StripCache
from ntkpipe.build.workers import Resources, versions
from ntkpipe.executors.threads import Executor, ThreadExecutor
from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.model.arithmetic import exact_math
from ntkpipe.jacobian.model.device import is_out_of_memory
from ntkpipe.jacobian.model.functional import fingerprint
from ntkpipe.jacobian.model.samples import Samples, Source, StoredSource
from ntkpipe.jacobian.self_check import CheckReport, self_check
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.layout import Index, layouts
from ntkpipe.store.manifest import FORMAT, Choices, DataRecord, Manifest
from ntkpipe.store.media.medium import Medium
from ntkpipe.store.mending.growth import NO_OLD_ENTRIES, ChunkKey, OldEntries, aside, finish
from ntkpipe.store.store import Mode, Store, prepare_path

_RESUME = "every finished tile is stored; the same call or command resumes"


@contextmanager
def exact_single_thread(compute_dtype: ComputeDtype = "float32") -> Iterator[None]:
    """The arithmetic of every tile, until the context is left: one thread, no fused paths, TF32 only on request."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with exact_math(tf32=compute_dtype == "tf32"), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def manifest_of(model: nn.Module, prepared: Prepared, train: DataRecord, test: DataRecord | None) -> Manifest:
    """Manifest of what is asked for; its choices are placeholders and never compared."""
    spec = prepared.spec
    return Manifest(
        format=FORMAT,
        kind=spec.kind,
        convention=prepared.kind.convention,
        num_outputs=prepared.num_outputs,
        num_covectors=prepared.num_covectors,
        tile=prepared.tile,
        compute_dtype=spec.compute_dtype,
        accumulate_dtype=spec.resolved_accumulate_dtype(),
        store_dtype=spec.resolved_store_dtype(),
        model=fingerprint(model, prepared.model.names),
        train=train,
        test=test,
        choices=Choices(strip=1, subtile=1, batch=1, representations={}, device="cpu", arithmetic=""),
        environment={
            **versions(),
            "host": socket.gethostname(),
            "processor": platform.processor() or platform.machine(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
        groups=dict(prepared.groups),
    )


def first_of(prepared: Prepared, stored: Manifest) -> Prepared:
    """The same work on the first samples, as many as ``stored`` has."""
    train = prepared.train.first(stored.train.num_samples)
    test = None if prepared.test is None or stored.test is None else prepared.test.first(stored.test.num_samples)
    return replace(prepared, train=train, test=test)


@dataclass(frozen=True)
class Settled:
    """How a run computes."""

    engine: Engine  # self-checked, if the run asks for that
    plan: Plan  # fits the machine
    check: CheckReport | None  # result of the self-check
    check_seconds: float


def plan_and_check(
    prepared: Prepared, engine: Engine, planned: Callable[[Engine], Plan], *, is_checked: bool
) -> Settled:
    """Plan, self-check, and plan anew where that changes how Jacobians are found."""
    plan = planned(engine)
    if not is_checked:
        return Settled(engine, plan, None, 0.0)
    started, memory = perf_counter(), plan.machine.memory_limit - plan.machine.base_memory
    samples = prepared.train.num_samples
    try:
        checked, report = self_check(engine, prepared.load, samples, batch=plan.batch, memory_bytes=memory)
    except NtkpipeError:
        raise
    except Exception as error:  # its samples are new to the model
        if is_out_of_memory(error):
            raise
        raise ModelError(f"the model raised {type(error).__name__} in the self-check: {error}") from error
    seconds = perf_counter() - started
    if checked.representations != engine.representations:
        plan = planned(checked)
    return Settled(checked, plan, report, seconds)


def plan_store(
    prepared: Prepared,
    engine: Engine,
    asked: Manifest,
    existing: Store | None,
    medium: Medium,
    resources: Resources,
    *,
    left: Mapping[str, int] | None = None,
) -> Plan:
    """Plan what a store lacks; ``left`` counts the chunks to write, by default all missing ones."""
    if left is None and existing is not None:
        left = {name: len(indices) for name, indices in existing.missing().items()}
    done = to_write = 0
    for name, layout in layouts(asked).items():
        chunks = layout.num_chunks if left is None else left.get(name, 0)
        to_write += chunks * layout.chunk_bytes
        done += layout.num_chunks - chunks if layout.grid is not None else 0
    num_test = 0 if prepared.test is None else prepared.test.num_samples
    workload = workload_of(prepared, engine, prepared.grids(), num_test)
    machine = resources.machine(engine, medium.free_bytes())
    choices = None if existing is None else existing.manifest.choices
    return make_plan(workload, machine, choices=choices, tiles_done=done, bytes_to_write=to_write)


def settle(
    prepared: Prepared,
    asked: Manifest,
    existing: Store | None,
    medium: Medium,
    resources: Resources,
    *,
    mode: Mode = "a",
    left: Mapping[str, int] | None = None,
) -> tuple[Store, Settled]:
    """Plan, self-check, and create the store where there is none."""
    cluster, engine = resources.cluster, prepared.engine

    def planned(engine: Engine) -> Plan:
        return plan_store(prepared, engine, asked, existing, medium, resources, left=left).fitting()

    if existing is not None:
        engine = reuse_choices(engine, existing.manifest.choices, existing.root, cluster)
    settled = plan_and_check(prepared, engine, planned, is_checked=resources.run.self_check)
    engine, plan, check = settled.engine, settled.plan, settled.check
    if existing is None:
        if mode == "w":
            prepare_path(medium, mode)
        choices = plan.choices(engine.representations, *where_computed(engine, cluster))
        existing = Store.create(medium, asked.model_copy(update={"choices": choices}))
        require_same(existing, asked)
        if existing.manifest.choices != choices:
            # Another run created the store in the meantime; its choices count.
            plan = planned(engine)
    elif check is not None and engine.representations != existing.manifest.choices.representations:
        raise SelfCheckError(
            f"{existing.root} was begun with Jacobians found as {existing.manifest.choices.representations}, which the "
            f"self-check refuses now ({check.moved}); what is stored cannot be trusted: use mode='w' to start over"
        )
    engine = reuse_choices(engine, existing.manifest.choices, existing.root, cluster)
    return existing, replace(settled, engine=engine, plan=plan)


@dataclass(frozen=True)
class StoreSink:
    """Chunks go to a store."""

    arrays: Mapping[str, StoredArray]
    wanted: frozenset[ChunkKey] | None = None  # chunks to compute even if they exist; None: all that are missing
    kept: OldEntries = NO_OLD_ENTRIES  # old entries that a growth must not change

    def exists(self, array: str, index: Index) -> bool:
        """Whether the chunk need not be computed: it has its full size, or is not wanted."""
        return self.arrays[array].has(index) if self.wanted is None else (array, index) not in self.wanted

    def place(self, array: str, index: Index) -> None:
        """None: tiles are computed in buffers, and written when they are complete."""

    def write(self, array: str, index: Index, values: NDArray[Any]) -> None:
        """Write the chunk atomically; entries from before a growth first replace those in ``values``."""
        stored = self.arrays[array]
        try:
            self.kept.paste(array, index, values)
        except TileError:
            if self.wanted is None and stored.has(index):  # another run has written it and cleared up
                return
            raise
        stored.write(index, values)


def write_samples(store: Store, split: str, samples: Samples, wanted: frozenset[ChunkKey] | None = None) -> None:
    """Write the samples and targets that are missing in the store, or just the wanted chunks."""

    def todo(array: StoredArray) -> list[Index]:
        if wanted is None:
            return array.missing()
        return sorted(index for name, index in wanted if name == array.layout.name)

    arrays = {name: array for name, array in store.arrays.items() if name.startswith(f"samples/{split}/")}
    for name, array in arrays.items():
        for index in todo(array):
            part = array.layout.region(index)[0]
            array.write(index, samples.source.read(part.start, part.stop)[name.rpartition("/")[2]])
    if samples.targets is not None:
        array = store.arrays[f"targets/{split}"]
        for index in todo(array):
            array.write(index, samples.targets[array.layout.region(index)[0]])


def job_of(
    prepared: Prepared,
    settled: Settled,
    sources: Mapping[str, Source],
    sink: Sink,
    in_use: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> BuildJob:
    """The job of a run whose tiles go to a sink."""
    engine, plan, is_mapping = settled.engine, settled.plan, prepared.train.is_mapping
    cache, dtype = StripCache(plan.cache_bytes), np.dtype(prepared.spec.resolved_store_dtype())
    prefixes = tuple(plane.prefix for plane in prepared.planes)
    return BuildJob(engine, plan, sources, is_mapping, sink, cache, dtype, engine.setup.pairs, prefixes, in_use)


def run_job(
    job: BuildJob,
    executor: Executor[BlockTask, BuildRecord],
    tiles_of: Callable[[Iterator[BuildRecord]], Iterator[TileRecord]],
    progress: str | None,
) -> None:
    """Run a job until all tiles are done; show how many are, if ``progress`` says of what."""
    # An interrupt may strike in the progress bar: closing stops the workers before anything else happens.
    with closing(executor.run(job, job.plan.tasks())) as running:
        tiles, total = tiles_of(running), job.plan.workload.num_tiles
        if progress is not None:
            tiles = show_progress(tiles, total=total, done=job.plan.tiles_done, what=progress, unit="tile")
        for _ in tiles:
            pass


def build(
    store: Store,
    settled: Settled,
    prepared: Prepared,
    resources: Resources,
    *,
    wanted: frozenset[ChunkKey] | None = None,
    stage: Manifest | None = None,
) -> None:
    """Write samples, then every missing tile, and log the run; ``stage`` builds tiles of an earlier size, aside."""
    plan, executor = settled.plan, resources.executor(store) or ThreadExecutor(settled.plan.machine.workers)
    samples = prepared.samples
    sources = {split: StoredSource(store, split, each.num_samples) for split, each in samples.items()}
    kept = OldEntries.of(store, (stage or store.manifest).earlier())
    sink = StoreSink(store.arrays if stage is None else aside(store, stage), wanted, kept)
    job = job_of(prepared, settled, sources, sink, store.in_use)
    try:
        # Mark the store as in use before writing: another run that ends meanwhile removes unused partial files.
        with store.in_use():
            if settled.check is not None:
                store.write_result("self_check", asdict(settled.check))
            if stage is None:
                for split, each in samples.items():
                    write_samples(store, split, each, wanted)
            with closing(RunLog(store, plan, settled.check_seconds)) as log:
                run_job(job, executor, log.tiles, store.manifest.kind if resources.progress else None)
                if stage is None:
                    finish(store)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted: {_state(store)}; {_RESUME}") from error
    except StoreFullError as error:
        raise StoreFullError(f"{error}. {_state(store)}; {_RESUME} once there is room") from error


def build_chunks(
    store: Store,
    wanted: frozenset[ChunkKey],
    prepared: Prepared,
    resources: Resources,
    *,
    stage: Manifest | None = None,
) -> None:
    """Settle and build just the wanted chunks; see :func:`build`."""
    manifest, left = stage or store.manifest, Counter(name for name, _ in wanted)
    _, settled = settle(prepared, manifest, Store(store.medium, manifest), store.medium, resources, left=left)
    build(store, settled, prepared, resources, wanted=wanted, stage=stage)


def _state(store: Store) -> str:
    progress = KernelStore(store).progress
    return f"{progress.tiles_done} of {progress.tiles_total} tiles are in {store.root}"
