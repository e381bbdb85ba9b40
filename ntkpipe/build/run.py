"""One run of a kernel into its store: what was asked meets what is there, is settled, and is built."""

import contextlib
import platform
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ntkpipe.base.config import ComputeDtype, RunSpec
from ntkpipe.base.errors import (
    Interrupted,
    ModelError,
    NtkpipeError,
    SelfCheckError,
    StoreFullError,
    StoreMismatchError,
    TileError,
)
from ntkpipe.base.progress import show_progress
from ntkpipe.build.plan import BlockTask, ClusterWorkers, Plan
from ntkpipe.build.prepare import Prepared, plan_run, reuse_choices, where_computed
from ntkpipe.build.records import BuildRecord, RunLog
from ntkpipe.build.tiles import BuildJob, StripCache
from ntkpipe.executors.threads import Executor, ThreadExecutor
from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.model.arithmetic import exact_math
from ntkpipe.jacobian.model.device import is_out_of_memory
from ntkpipe.jacobian.model.functional import fingerprint
from ntkpipe.jacobian.model.samples import Samples, Source, StoredSource
from ntkpipe.jacobian.probe import probe_samples
from ntkpipe.jacobian.representations.contract import contract
from ntkpipe.jacobian.representations.workspace import Workspace
from ntkpipe.jacobian.self_check import CheckReport, self_check
from ntkpipe.store.chunks import Mode, Store, StoredArray, prepare_path
from ntkpipe.store.kernel import KernelStore
from ntkpipe.store.layout import Index, layouts, planes
from ntkpipe.store.manifest import FORMAT, Choices, DataRecord, Manifest, differences
from ntkpipe.store.media.folder import Medium
from ntkpipe.store.mending.growth import NOTHING, Chunk, Kept, aside, finish, is_larger

_RESUME = "every finished tile is stored; the same call or command resumes"
# Outputs of the same model on another machine agree to rounding; those of another function do not.
_OUTPUT_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 0.1}
# An activation that rounds across a kink changes an entry by more than rounding does.
_ENTRY_TOLERANCE = {"float64": 1e-6, "float32": 1e-2, "tf32": 5e-2, "bfloat16": 0.2}


@contextlib.contextmanager
def exact_single_thread(compute_dtype: ComputeDtype = "float32") -> Iterator[None]:
    """Arithmetic as every tile is computed: one thread a worker, fused paths off, TF32 only if asked for; restored."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with exact_math(tf32=compute_dtype == "tf32"), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def manifest_of(model: nn.Module, prepared: Prepared, train: DataRecord, test: DataRecord | None) -> Manifest:
    """The manifest of what is asked for; its choices are placeholders, which are never compared."""
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
    """The same work on the first samples, as many as a manifest has of each set."""
    train = prepared.train.first(stored.train.num_samples)
    test = None if prepared.test is None or stored.test is None else prepared.test.first(stored.test.num_samples)
    return replace(prepared, train=train, test=test)


def require_same(store: Store, asked: Manifest) -> None:
    """Check that a store was made with what is asked for."""
    found = differences(store.manifest, asked)
    if found:
        hint = "Use another path, mode='w' to start over, or ask for what is stored"
        if is_larger(store.manifest, asked) and all(field.startswith(("train", "test")) for field, _, _ in found):
            hint = "With grow=True (run --grow) samples are added to those that are stored. " + hint
        listed = "; ".join(f"{field}: stored {_short(left)} → asked {_short(right)}" for field, left, right in found)
        raise StoreMismatchError(
            f"{store.root} holds another kernel; {len(found)} fields differ: {listed}. {hint}",
            found,
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def require_made_from_model(store: Store, *, grows: bool = False) -> None:
    """Refuse to compute the rest of a store that is derived from another one, or more samples of it."""
    derived = store.manifest.derived
    if derived is not None and (grows or store.missing()):
        what = "does not grow by itself: grow its source, and derive to another path" if grows else "is not complete"
        raise StoreMismatchError(
            f"{store.root} is derived from a store of kind {derived.kind!r} and {what}; go on with ntkpipe derive, or "
            "use mode='w' to compute it from the model",
            (("derived", derived.model_dump(), None),),
        )


def require_same_function(store: Store, prepared: Prepared, doubted: frozenset[Chunk] = frozenset()) -> None:
    """Check that the model still maps stored samples to the outputs that were stored with the first tiles.

    Fingerprints see parameters, buffers and the module tree, not a constant in ``forward`` or another forward hook. So
    outputs of a few samples are compared with the stored ones, and their kernel entries with those of the first tile.
    """
    array = store.arrays["outputs/train"]
    # A truncated chunk is not there, either: it is written again.
    good = sorted(index for index in array.present() if (array.layout.name, index) not in doubted)
    if not good:
        return
    first = good[0]
    stored = array.read(first)
    picked = probe_samples(len(stored))
    samples = [first[0] * store.manifest.tile + sample for sample in picked]
    with torch.no_grad():
        outputs = prepared.model(prepared.load(samples)).double().cpu().numpy()
    gap = float(np.abs(outputs - stored[picked]).max())
    scale = float(np.abs(stored[picked]).max()) or 1.0
    if gap > _OUTPUT_TOLERANCE[store.manifest.compute_dtype] * scale:
        raise StoreMismatchError(
            f"{store.root}: parameters and samples are those of the store, but outputs differ by {gap:.2g} (of "
            f"{scale:.2g}): the model's forward pass or the forward hook is another one",
            (("outputs", stored[picked].tolist(), outputs.tolist()),),
        )
    tile, index = store.arrays[prepared.planes[0].array("kernel/train")], (first[0], first[0])
    if tile.has(index) and (tile.layout.name, index) not in doubted:
        _require_same_entries(store, tile.read(index), picked, _entries(prepared, samples))


def _require_same_entries(store: Store, tile: NDArray[Any], picked: list[int], found: NDArray[np.float64]) -> None:
    """Compare entries of a few samples of a diagonal tile."""
    width = store.manifest.num_covectors
    rows = np.add.outer(np.array(picked) * width, np.arange(width)).reshape(-1)
    stored = tile[np.ix_(rows, rows)].astype(np.float64)
    scale = float(np.sqrt(np.outer(stored.diagonal(), stored.diagonal())).max()) or 1.0
    error = float(np.abs(found - stored).max()) / scale
    if error > _ENTRY_TOLERANCE[store.manifest.compute_dtype]:
        raise StoreMismatchError(
            f"{store.root}: parameters, samples and outputs are those of the store, but kernel entries differ by "
            f"{error:.1e} of their scale: the model is differentiated in another way (detached, or hooked)",
            (("kernel entries", stored.tolist(), found.tolist()),),
        )


def _entries(prepared: Prepared, samples: list[int]) -> NDArray[np.float64]:
    """The kernel of a few samples, sample-major; of the first output, where each has its own."""
    piece, _ = prepared.engine.piece(prepared.load(samples))
    found = contract(piece, piece, Workspace(), prepared.kind.pairs).double().cpu().numpy()
    return np.asarray(found if prepared.kind.pairs != "same" else found[0])


def checked(prepared: Prepared, engine: Engine, plan: Plan) -> tuple[Engine, CheckReport]:
    """Run the self-check within the memory of a plan.

    It meets samples that no probe has met; what the model raises there is the model's error.
    """
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


@dataclass(frozen=True)
class Settled:
    """A run that is ready to build."""

    store: Store  # exists, its data perhaps not yet
    engine: Engine  # engine, plan: how it is computed
    plan: Plan
    check: CheckReport | None  # what the self-check found, if it ran
    check_seconds: float  # how long that took


def settle(
    prepared: Prepared,
    asked: Manifest,
    existing: Store | None,
    medium: Medium,
    run: RunSpec,
    mode: Mode,
    crew: ClusterWorkers | None = None,
    left: Mapping[str, int] | None = None,
) -> Settled:
    """Plan, self-check, and create the store where there is none."""
    engine = prepared.engine
    choices = None if existing is None else existing.manifest.choices
    if existing is not None and choices is not None:
        engine = reuse_choices(engine, choices, existing.root, crew)
    planned = _plan(prepared, engine, asked, existing, medium, run, crew, left)
    planned.require_fit()
    started = perf_counter()
    check = None
    if run.self_check:
        engine, check = checked(prepared, engine, planned)
        if existing is not None and choices is not None and engine.representations != choices.representations:
            raise SelfCheckError(
                f"{existing.root} was begun with Jacobians found as {choices.representations}, which the self-check "
                f"refuses now ({check.moved}); what is stored cannot be trusted: use mode='w' to start over"
            )
    check_seconds = perf_counter() - started
    if engine.representations != prepared.engine.representations:
        planned = _plan(prepared, engine, asked, existing, medium, run, crew, left)
        planned.require_fit()
    if existing is None:
        if mode == "w":
            prepare_path(medium, mode)
        settled = planned.choices(engine.representations, *where_computed(engine, crew))
        existing = Store.create(medium, asked.model_copy(update={"choices": settled}))
        require_same(existing, asked)
        if existing.manifest.choices != settled:
            # Another run created the store in the meantime; its choices count.
            planned = _plan(prepared, engine, asked, existing, medium, run, crew, left)
            planned.require_fit()
    engine = reuse_choices(engine, existing.manifest.choices, existing.root, crew)
    return Settled(existing, engine, planned, check, check_seconds)


def _plan(
    prepared: Prepared,
    engine: Engine,
    asked: Manifest,
    existing: Store | None,
    medium: Medium,
    run: RunSpec,
    crew: ClusterWorkers | None,
    left: Mapping[str, int] | None,
) -> Plan:
    return plan_run(
        prepared,
        engine,
        run,
        prepared.grids(),
        medium=medium,
        choices=None if existing is None else existing.manifest.choices,
        crew=crew,
        **progress_of(asked, existing, left),
    )


def progress_of(asked: Manifest, existing: Store | None, left: Mapping[str, int] | None = None) -> dict[str, int]:
    """Tiles that exist, and bytes still to be written; ``left`` counts the chunks, if not all that are missing."""
    if left is None and existing is not None:
        left = {name: len(indices) for name, indices in existing.missing().items()}
    done = to_write = 0
    for name, layout in layouts(asked).items():
        chunks = layout.num_chunks if left is None else left.get(name, 0)
        to_write += chunks * layout.chunk_bytes
        done += layout.num_chunks - chunks if layout.grid is not None else 0
    return {"tiles_done": done, "bytes_to_write": to_write}


@dataclass(frozen=True)
class StoreSink:
    """Chunks go to a store."""

    arrays: Mapping[str, StoredArray]  # where they go
    # The chunks that are computed, whether they are there or not: those that a repair replaces. None: those that are
    # not there.
    wanted: frozenset[Chunk] | None = None
    kept: Kept = NOTHING  # old entries that a growth must not change

    def exists(self, array: str, index: Index) -> bool:
        """Whether the chunk is there with its whole size, or not wanted."""
        return self.arrays[array].has(index) if self.wanted is None else (array, index) not in self.wanted

    def place(self, array: str, index: Index) -> None:
        """Tiles are computed in buffers, and written when they are whole."""

    def write(self, array: str, index: Index, values: NDArray[Any]) -> None:
        """Write the chunk atomically; old entries of a growth are put into ``values`` before."""
        stored = self.arrays[array]
        try:
            self.kept.paste(array, index, values)
        except TileError:
            if self.wanted is None and stored.has(index):  # another run has written it and cleared up
                return
            raise
        stored.write(index, values)


def write_samples(store: Store, split: str, samples: Samples, wanted: frozenset[Chunk] | None = None) -> None:
    """Write the samples and targets that the store does not have yet, or those of the chunks that are wanted."""

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
    train: Samples,
    test: Samples | None,
    *,
    executor: Executor[BlockTask, BuildRecord] | None = None,
    wanted: frozenset[Chunk] | None = None,
    stage: Manifest | None = None,
    progress: bool,
) -> None:
    """Write samples, then every missing tile; keep a record of the run."""
    store, plan = settled.store, settled.plan
    manifest = stage or store.manifest
    arrays = store.arrays if stage is None else aside(store, stage)
    stored: dict[str, Source] = {"train": StoredSource(store, "train", train.num_samples)}
    if test is not None:
        stored["test"] = StoredSource(store, "test", test.num_samples)
    job = BuildJob(
        engine=settled.engine,
        plan=plan,
        sources=stored,
        is_mapping=train.is_mapping,
        sink=StoreSink(arrays, wanted, Kept.of(store, manifest.earlier())),
        cache=StripCache(plan.cache_bytes),
        store_dtype=np.dtype(store.manifest.store_dtype),
        pairs=settled.engine.setup.pairs,
        prefixes=tuple(plane.prefix for plane in planes(store.manifest)),
        in_use=store.in_use,
    )
    if executor is None:
        executor = ThreadExecutor(plan.machine.workers)
    try:
        # Whatever is written is written in use: another run that ends meanwhile removes partial files that nobody uses.
        with store.in_use(), contextlib.ExitStack() as at_the_end:
            if settled.check is not None:
                store.write_result("self_check", settled.check.to_json())
            if stage is None:
                write_samples(store, "train", train, wanted)
                if test is not None:
                    write_samples(store, "test", test, wanted)
            log = RunLog(store, plan, settled.check_seconds)
            at_the_end.callback(log.close)
            # An interrupt may strike in the progress bar: closing stops the workers before anything else happens.
            records = at_the_end.enter_context(contextlib.closing(executor.run(job, plan.tasks())))
            tiles = log.tiles(records)
            if progress:
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
