"""The public functions that compute: they join the making of a kernel with its store."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from torch import nn

from ntkpipe.base.config import KernelSpec, RunSpec, check_number, parse
from ntkpipe.base.errors import ConfigError, DataError
from ntkpipe.base.grid import default_tile
from ntkpipe.base.resources import available_memory
from ntkpipe.build.in_memory import compute_matrix, prepare_matrix
from ntkpipe.build.jacobian_operator import JacobianOperator
from ntkpipe.build.plan import BlockTask, Plan
from ntkpipe.build.prepare import plan_run, prepare, reuse_choices, time_jacobians
from ntkpipe.build.records import BuildRecord
from ntkpipe.build.run import (
    build,
    exact_single_thread,
    manifest_of,
    progress_of,
    require_made_from_model,
    require_same,
    require_same_function,
    settle,
)
from ntkpipe.build.upkeep.grow import chunks_left, grow_store
from ntkpipe.build.workers import cluster_executor, device_here, inspect_crew
from ntkpipe.executors.threads import Executor
from ntkpipe.jacobian.model.functional import Forward, fingerprint
from ntkpipe.jacobian.model.samples import Samples, as_samples, require_same_arrays
from ntkpipe.jacobian.report import ParameterReport, report_of
from ntkpipe.jacobian.self_check import self_check
from ntkpipe.store.chunks import Mode, Store, medium_at, prepare_path
from ntkpipe.store.kernel import KernelStore
from ntkpipe.store.manifest import DataRecord, Manifest
from ntkpipe.store.mending.growth import end_growth, is_larger, undo_cut_growth

if TYPE_CHECKING:
    from distributed import Client

# Of what is free, for the self-check of a model without a plan.
_SHARE_OF_MEMORY = 0.5

Patterns = str | tuple[str, ...] | list[str] | None


def compute_kernel(
    model: nn.Module,
    inputs: object,
    *,
    store: str | Path,
    kind: str = "pntk",
    targets: object = None,
    test_inputs: object = None,
    test_targets: object = None,
    forward: Forward = None,
    parameters: Patterns = None,
    groups: Mapping[str, Patterns] | None = None,
    compute_dtype: str = "float32",
    accumulate_dtype: str | None = None,
    store_dtype: str | None = None,
    tile: int | None = None,
    memory_limit: int | str | None = None,
    device: str | None = None,
    self_check: bool = True,
    mode: Mode = "a",
    grow: bool = False,
    client: "Client | None" = None,
    code: str | Path | None = None,
    workers: int | None = None,
    jacobian: str = "structured",
    progress: bool = True,
) -> KernelStore:
    """Compute an empirical neural tangent kernel into a store, or resume one.

    Every finished tile is safe: after a kill, Ctrl-C or a full disk the same call goes on where it stopped and ends
    with the same bits.

    Parameters
    ----------
    model
        A module in eval mode. It is copied, not changed. Parameters with ``requires_grad=False`` are left out.
    inputs
        N samples: a tensor or array (first axis the sample), a dict of them (keyword arguments of the model), or a
        map-style data set of samples or (sample, target) pairs.
    store
        Path or URL of the store.
    kind
        ``"pntk"``, ``"trace"``, ``"output:k"`` (N x N), ``"diagonal"`` (N x N for each output) or ``"ntk"``
        (N*O x N*O); conventions in :mod:`ntkpipe.base.kinds`.
    targets
        First axis N; kept in the store for what is done with the kernel later.
    test_inputs, test_targets
        M more samples: adds the test x train kernel and the diagonal blocks of the test samples.
    forward
        Picks the (batch, O) tensor: ``".logits"``, a function of the model's output, or one of (model, inputs).
    parameters
        Shell-style patterns of parameter names, as ``"head.*"``; default all that require a gradient.
    groups
        Name → patterns among those parameters: adds a kernel of each group, from the same pass, as
        ``store.group(name).train``. Groups have no parameter in common; where they cover all, they sum to the whole.
    compute_dtype
        Of the forward pass and the Jacobians: ``"float32"``, ``"float64"``, ``"bfloat16"`` or ``"tf32"``, which is
        float32 whose products on a GPU may be TF32.
    accumulate_dtype
        Of the sum over parameters and the products in it, never TF32; default ``compute_dtype``, at least float32.
    store_dtype
        Of the stored matrix; default ``accumulate_dtype``.
    tile
        Samples along the edge of a tile (one file); default about 2048 rows.
    memory_limit
        Bytes, or text as ``"8GiB"``, that this process may use; default 70 % of what is free.
    device
        ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; default the first GPU where there is one.
    self_check
        Compare the engine with plain ``torch.func`` on three samples before the first tile.
    mode
        As in Zarr: ``"a"`` creates or resumes, ``"w"`` starts over, ``"w-"`` only creates.
    grow
        Whether a store with fewer samples gets those that are new: more after the stored ones, a test set where there
        was none. Only new tiles are computed, and what is stored keeps its bits.
    client
        A ``distributed.Client``: blocks are computed by the workers of its cluster, which write to the store
        themselves; it must be on a disk that they share, or at a URL. Default threads of this process.
    code
        A folder whose Python files are sent to the workers of the client, for models that are defined there. Those
        of ``__main__`` and of installed packages need none.
    workers
        Threads, each with single-threaded arithmetic; default one a core. Results do not depend on it.
    jacobian
        ``"structured"``, or ``"fallback"`` for plain ``torch.func`` throughout.
    progress
        Show a progress bar on standard error.

    Returns
    -------
    The finished store, open for reading.

    Raises
    ------
    ConfigError
        If an argument is wrong.
    ModelError, DataError, NonFiniteError
        If model or samples cannot be used as they are.
    StoreMismatchError
        If the store was made with something else; lists the fields that differ.
    ResourceError
        If memory or disk cannot hold it, before anything is computed.
    SelfCheckError
        If the engine and the reference disagree.
    StoreFullError
        If the disk fills up during the run. What is finished is kept.
    ClusterError
        If the workers of the client cannot do it, or are lost.
    Interrupted
        On Ctrl-C. What is finished is kept.
    """
    if mode not in {"a", "w", "w-"}:
        raise ConfigError(f"mode={mode!r}; needed 'a' (create or resume), 'w' (start over) or 'w-' (only create)")
    if grow and mode != "a":
        raise ConfigError(f"grow=True adds samples to the store that is there, mode={mode!r} needs none; use mode='a'")
    spec = _kernel_spec(kind, parameters, groups, compute_dtype, accumulate_dtype, store_dtype, tile, jacobian)
    run = _run_spec(memory_limit, device, workers, self_check)
    medium = medium_at(store)
    existing = prepare_path(medium, mode) if mode != "w" else None
    if existing is not None:
        undo_cut_growth(existing)
        spec = _with_tile_of(existing, spec)
    train, test = _as_both(inputs, targets, test_inputs, test_targets)
    crew = None if client is None else inspect_crew(client, spec, run.device, progress)

    def executor(store: Store) -> Executor[BlockTask, BuildRecord] | None:
        return None if client is None else cluster_executor(client, store, code)

    with exact_single_thread(spec.compute_dtype):
        device = device_here(run.device, crew)
        prepared = prepare(model, train, test, spec, forward=forward, device=device, choose_tile=_tile_of(existing))
        asked = manifest_of(
            model, prepared, train.inspect("inputs"), None if test is None else test.inspect("test_inputs")
        )
        if existing is not None and grow and is_larger(existing.manifest, asked):
            require_made_from_model(existing, grows=True)
            settled = grow_store(prepared, asked, existing, run, crew=crew, executor=executor, progress=progress)
            settled.store.complete_layout()
        else:
            if existing is not None:
                require_same(existing, asked)
                require_same_function(existing, prepared)
                require_made_from_model(existing)
                existing.complete_layout()
                if not existing.missing():
                    end_growth(existing)
                    return KernelStore(existing)
            settled = settle(prepared, asked, existing, medium, run, mode, crew)
        build(settled, train, test, executor=executor(settled.store), progress=progress)
    return KernelStore(settled.store)


def plan_kernel(
    model: nn.Module,
    inputs: object,
    *,
    store: str | Path,
    kind: str = "pntk",
    targets: object = None,
    test_inputs: object = None,
    test_targets: object = None,
    forward: Forward = None,
    parameters: Patterns = None,
    groups: Mapping[str, Patterns] | None = None,
    compute_dtype: str = "float32",
    accumulate_dtype: str | None = None,
    store_dtype: str | None = None,
    tile: int | None = None,
    memory_limit: int | str | None = None,
    device: str | None = None,
    workers: int | None = None,
    jacobian: str = "structured",
    grow: bool = False,
) -> tuple[Plan, tuple[ParameterReport, ...]]:
    """Plan what :func:`compute_kernel` would do with the same arguments; reads five samples and writes nothing.

    Returns
    -------
    The plan, and how the Jacobian of every selected parameter is found and held and what that costs; for those of the
    fallback why. A parameter and its bias, or all that is computed together, share one report
    (:class:`ntkpipe.jacobian.report.ParameterReport`). The self-check of a run may move further parameters to the
    fallback. Where memory or disk cannot hold the kernel, ``plan.problems`` says so with both numbers.

    Raises
    ------
    ConfigError, ModelError, DataError, NonFiniteError, StoreMismatchError
        As :func:`compute_kernel`.
    """
    spec = _kernel_spec(kind, parameters, groups, compute_dtype, accumulate_dtype, store_dtype, tile, jacobian)
    run = _run_spec(memory_limit, device, workers, self_check=False)
    medium = medium_at(store)
    existing = prepare_path(medium, "a")
    if existing is not None:
        spec = _with_tile_of(existing, spec)
    train, test = _as_both(inputs, targets, test_inputs, test_targets)
    with exact_single_thread(spec.compute_dtype):
        prepared = prepare(model, train, test, spec, forward=forward, device=run.device, choose_tile=_tile_of(existing))
        asked = manifest_of(model, prepared, train.describe(), None if test is None else test.describe())
        left = None
        if existing is not None:
            _require_same_but_samples(existing, asked, grow=grow)
            if is_larger(existing.manifest, asked):
                left = chunks_left(existing, existing.manifest.grown(asked.train, asked.test, {}))
        choices = None if existing is None else existing.manifest.choices
        engine = prepared.engine if choices is None else reuse_choices(prepared.engine, choices, medium.root)
        planned = plan_run(
            prepared,
            engine,
            run,
            prepared.grids(),
            medium=medium,
            choices=choices,
            crew=None,
            **progress_of(asked, existing, left),
        )
        return time_jacobians(planned, prepared, engine), report_of(engine)


def _with_tile_of(existing: Store, spec: KernelSpec) -> KernelSpec:
    """Take the tile that is asked for to the store's, where it was cut to the samples that there were at first."""
    manifest = existing.manifest
    first = (manifest.earlier() or (manifest,))[0].train.num_samples
    is_same = spec.tile is not None and min(spec.tile, first) == manifest.tile
    return spec.model_copy(update={"tile": manifest.tile}) if is_same else spec


def _tile_of(existing: Store | None) -> Callable[[int, int, int], int]:
    """The tile of the store that is resumed, or the default."""
    return default_tile if existing is None else lambda *_: existing.manifest.tile


def _require_same_but_samples(store: Store, asked: Manifest, *, grow: bool) -> None:
    """As :func:`require_same`, without fingerprints of samples, which a plan does not read, or sizes that may grow."""
    stored = store.manifest
    if grow and is_larger(stored, asked):
        sized = {"num_samples": stored.train.num_samples}
        asked = asked.model_copy(update={"train": asked.train.model_copy(update=sized), "test": stored.test})

    def without(record: DataRecord | None) -> DataRecord | None:
        return None if record is None else record.model_copy(update={"inputs_digest": "", "targets_digest": None})

    def bare(manifest: Manifest) -> Manifest:
        return manifest.model_copy(update={"train": without(manifest.train), "test": without(manifest.test)})

    require_same(Store(store.medium, bare(stored)), bare(asked))


def kernel_matrix(
    model: nn.Module,
    inputs: object,
    other: object = None,
    *,
    kind: str = "pntk",
    forward: Forward = None,
    parameters: Patterns = None,
    compute_dtype: str = "float32",
    accumulate_dtype: str | None = None,
    store_dtype: str | None = None,
    tile: int | None = None,
    memory_limit: int | str | None = None,
    device: str | None = None,
    self_check: bool = True,
    workers: int | None = None,
    jacobian: str = "structured",
    progress: bool = False,
) -> NDArray[Any]:
    """Compute a kernel in memory, without a store.

    Parameters
    ----------
    model, inputs, kind, forward, parameters, compute_dtype, accumulate_dtype, store_dtype, tile
        As for :func:`compute_kernel`; ``store_dtype`` is the dtype of the result.
    other
        Other samples for the columns; default the inputs themselves.
    memory_limit, device, self_check, workers, jacobian, progress
        As for :func:`compute_kernel`.

    Returns
    -------
    K(inputs, other), shape (N*S, M*S), or the symmetric K(inputs, inputs), shape (N*S, N*S); row = sample * S +
    covector. For ``kind="diagonal"`` one for each output, shape (O, N, M).

    Raises
    ------
    ResourceError
        If the matrix does not fit in memory.
    """
    spec = _kernel_spec(kind, parameters, None, compute_dtype, accumulate_dtype, store_dtype, tile, jacobian)
    run = _run_spec(memory_limit, device, workers, self_check)
    # The columns play the part of the train samples: a symmetric kernel is train x train, another test x train.
    train, test = as_samples(inputs, with_targets=False), None
    if other is not None:
        train, test = as_samples(other, label="other", with_targets=False), train
        require_same_arrays(train, test, "inputs")
    for samples, label in ((train, "other" if other is not None else "inputs"), (test, "inputs")):
        if samples is not None:
            samples.inspect(label)
    with exact_single_thread(spec.compute_dtype):
        prepared = prepare_matrix(model, train, test, spec, run, forward=forward)
        return compute_matrix(prepared, run, what=kind, progress=progress)


def jacobian_operator(
    model: nn.Module,
    inputs: object,
    *,
    kind: str = "pntk",
    forward: Forward = None,
    parameters: Patterns = None,
    compute_dtype: str = "float64",
    batch: int = 64,
    device: str | None = None,
    step: Callable[[], None] = lambda: None,
) -> JacobianOperator:
    """The kernel as an operator for solvers, without a matrix anywhere.

    Parameters
    ----------
    model, inputs, kind, forward, parameters, device
        As for :func:`compute_kernel`.
    compute_dtype
        dtype of products with the Jacobian. In float32 they are no more exact than a kernel of float32.
    batch
        Samples of one forward pass, at least 2.
    step
        Called after each batch of each product.

    Raises
    ------
    ConfigError
        If an option is wrong, or the kind has a matrix for each output.
    DataError
        If the samples cannot be used as they are.
    ModelError
        If the model cannot.
    SelfCheckError
        If its Jacobians are not what plain ``torch.func`` says, or depend on the rest of the batch.
    """
    check_number("batch", batch, low=2)
    spec = _kernel_spec(kind, parameters, None, compute_dtype, None, None, None, "structured")
    samples = as_samples(inputs, with_targets=False)
    digest = samples.inspect("inputs").inputs_digest
    with exact_single_thread(spec.compute_dtype):
        prepared = prepare(model, samples, None, spec, forward=forward, device=device)
        memory = int(_SHARE_OF_MEMORY * available_memory())
        engine, _ = self_check(prepared.engine, prepared.load, samples.num_samples, batch=batch, memory_bytes=memory)
    made_from = fingerprint(model, prepared.model.names)
    identity = f"J J' {kind} {compute_dtype} {made_from.state_digest} {made_from.structure_digest} {digest}"
    return JacobianOperator(replace(prepared, engine=engine), batch=batch, identity=identity, step=step)


def _as_both(
    inputs: object, targets: object, test_inputs: object, test_targets: object
) -> tuple[Samples, Samples | None]:
    train = as_samples(inputs, targets)
    if test_inputs is None:
        if test_targets is not None:
            raise DataError("test_targets were given without test_inputs")
        return train, None
    test = as_samples(test_inputs, test_targets, label="test_inputs")
    require_same_arrays(train, test, "test_inputs")
    return train, test


def _kernel_spec(
    kind: str,
    parameters: Patterns,
    groups: Mapping[str, Patterns] | None,
    compute_dtype: str,
    accumulate_dtype: str | None,
    store_dtype: str | None,
    tile: int | None,
    jacobian: str,
) -> KernelSpec:
    values = {
        "kind": kind,
        "parameters": parameters,
        "groups": groups or {},
        "compute_dtype": compute_dtype,
        "accumulate_dtype": accumulate_dtype,
        "store_dtype": store_dtype,
        "tile": tile,
        "jacobian": jacobian,
    }
    return parse(KernelSpec, values, source="kernel arguments")


def _run_spec(memory_limit: int | str | None, device: str | None, workers: int | None, self_check: bool) -> RunSpec:
    values = {"memory_limit": memory_limit, "device": device, "workers": workers, "self_check": self_check}
    return parse(RunSpec, values, source="run arguments")
