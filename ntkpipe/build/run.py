"""One run of a kernel into its store: settle plan and store, then build every missing tile."""

import contextlib
import platform
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ntkpipe.base.config import ComputeDtype, RunSpec
from ntkpipe.base.errors import Interrupted, ModelError, NtkpipeError, SelfCheckError, StoreFullError, TileError
from ntkpipe.base.progress import show_progress
from ntkpipe.build.matching import require_same
from ntkpipe.build.plan import Machine, Plan
from ntkpipe.build.prepare import Prepared, plan_run, reuse_choices, where_computed
from ntkpipe.build.records import RunLog
from ntkpipe.build.tiles import BuildJob, StripCache
from ntkpipe.build.workers import Resources
from ntkpipe.executors.threads import ThreadExecutor
from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.model.arithmetic import exact_math
from ntkpipe.jacobian.model.device import is_out_of_memory
from ntkpipe.jacobian.model.functional import fingerprint
from ntkpipe.jacobian.model.samples import Samples, StoredSource
from ntkpipe.jacobian.self_check import CheckReport, self_check
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.layout import Index, layouts, planes
from ntkpipe.store.manifest import FORMAT, Choices, DataRecord, Manifest
from ntkpipe.store.media.medium import Medium
from ntkpipe.store.mending.growth import NO_OLD_ENTRIES, ChunkKey, OldEntries, aside, finish
from ntkpipe.store.store import Mode, Store, prepare_path

_RESUME = "every finished tile is stored; the same call or command resumes"


@contextlib.contextmanager
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
        choices=Choices(
            strip=1, subtile=1, batch=1, representations={}, device=prepared.model.device.type, arithmetic=""
        ),
        environment={
            **{name: version(name) for name in ("ntkpipe", "torch", "numpy", "zarr")},
            "python": platform.python_version(),
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


def self_checked(prepared: Prepared, engine: Engine, plan: Plan) -> tuple[Engine, CheckReport]:
    """Run the self-check within the memory of a plan; its samples are new to the model, which may raise there."""
    try:
        memory = plan.machine.memory_limit - plan.machine.base_memory
        samples = prepared.train.num_samples
        return self_check(engine, prepared.load, samples, batch=plan.batch, memory_bytes=memory)
    except NtkpipeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"the model raised {type(error).__name__} in the self-check: {error}") from error


def plan_store(
    prepared: Prepared,
    engine: Engine,
    asked: Manifest,
    existing: Store | None,
    medium: Medium,
    run: RunSpec,
    *,
    cluster: Machine | None = None,
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
    choices = None if existing is None else existing.manifest.choices
    sizes = {"tiles_done": done, "bytes_to_write": to_write}
    return plan_run(prepared, engine, run, prepared.grids(), medium=medium, choices=choices, cluster=cluster, **sizes)


@dataclass(frozen=True)
class Settled:
    """A run that is ready to build."""

    store: Store  # exists, perhaps without data
    engine: Engine
    plan: Plan
    check: CheckReport | None  # result of the self-check, if it ran
    check_seconds: float


def settle(
    prepared: Prepared,
    asked: Manifest,
    existing: Store | None,
    medium: Medium,
    resources: Resources,
    *,
    mode: Mode = "a",
    left: Mapping[str, int] | None = None,
) -> Settled:
    """Plan, self-check, and create the store where there is none."""
    run, cluster, engine = resources.run, resources.cluster, prepared.engine

    def planned() -> Plan:
        plan = plan_store(prepared, engine, asked, existing, medium, run, cluster=cluster, left=left)
        plan.require_fit()
        return plan

    if existing is not None:
        engine = reuse_choices(engine, existing.manifest.choices, existing.root, cluster)
    plan = planned()
    started, check = perf_counter(), None
    if run.self_check:
        engine, check = self_checked(prepared, engine, plan)
        if existing is not None and engine.representations != existing.manifest.choices.representations:
            raise SelfCheckError(
                f"{existing.root} was begun with Jacobians found as {existing.manifest.choices.representations}, which "
                f"the self-check refuses now ({check.moved}); what is stored cannot be trusted: use mode='w' to start "
                "over"
            )
    check_seconds = perf_counter() - started
    if engine.representations != prepared.engine.representations:
        plan = planned()
    if existing is None:
        if mode == "w":
            prepare_path(medium, mode)
        choices = plan.choices(engine.representations, *where_computed(engine, cluster))
        existing = Store.create(medium, asked.model_copy(update={"choices": choices}))
        require_same(existing, asked)
        if existing.manifest.choices != choices:
            # Another run created the store in the meantime; its choices count.
            plan = planned()
    engine = reuse_choices(engine, existing.manifest.choices, existing.root, cluster)
    return Settled(existing, engine, plan, check, check_seconds)


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


def build(
    settled: Settled,
    prepared: Prepared,
    resources: Resources,
    *,
    wanted: frozenset[ChunkKey] | None = None,
    stage: Manifest | None = None,
) -> None:
    """Write samples, then every missing tile, and log the run; ``stage`` builds tiles of an earlier size, aside."""
    store, plan, executor = settled.store, settled.plan, resources.executor(settled.store)
    manifest = stage or store.manifest
    samples = {"train": prepared.train} | ({} if prepared.test is None else {"test": prepared.test})
    job = BuildJob(
        engine=settled.engine,
        plan=plan,
        sources={split: StoredSource(store, split, each.num_samples) for split, each in samples.items()},
        is_mapping=prepared.train.is_mapping,
        sink=StoreSink(
            store.arrays if stage is None else aside(store, stage), wanted, OldEntries.of(store, manifest.earlier())
        ),
        cache=StripCache(plan.cache_bytes),
        store_dtype=np.dtype(store.manifest.store_dtype),
        pairs=settled.engine.setup.pairs,
        prefixes=tuple(plane.prefix for plane in planes(store.manifest)),
        in_use=store.in_use,
    )
    try:
        # Mark the store as in use before writing: another run that ends meanwhile removes unused partial files.
        with store.in_use(), contextlib.ExitStack() as at_the_end:
            if settled.check is not None:
                store.write_result("self_check", asdict(settled.check))
            if stage is None:
                for split, each in samples.items():
                    write_samples(store, split, each, wanted)
            log = RunLog(store, plan, settled.check_seconds)
            at_the_end.callback(log.close)
            # An interrupt may strike in the progress bar: closing stops the workers before anything else happens.
            running = (executor or ThreadExecutor(plan.machine.workers)).run(job, plan.tasks())
            tiles = log.tiles(at_the_end.enter_context(contextlib.closing(running)))
            if resources.progress:
                total, done = plan.workload.num_tiles, plan.tiles_done
                tiles = show_progress(tiles, total=total, done=done, what=store.manifest.kind, unit="tile")
            for _ in tiles:
                pass
            if stage is None:
                finish(store)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted: {_state(store)}; {_RESUME}") from error
    except StoreFullError as error:
        raise StoreFullError(f"{error}. {_state(store)}; {_RESUME} once there is room") from error


def _state(store: Store) -> str:
    progress = KernelStore(store).progress
    return f"{progress.tiles_done} of {progress.tiles_total} tiles are in {store.root}"
