"""The public functions that compute a kernel into a store, and plan that."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ntkpipe.base.config import KernelSpec
from ntkpipe.base.errors import ConfigError, DataError
from ntkpipe.base.grid import default_tile
from ntkpipe.build.matching import (
    require_made_from_model,
    require_same,
    require_same_but_samples,
    require_same_function,
)
from ntkpipe.build.plan import Plan
from ntkpipe.build.prepare import kernel_spec, prepare, reuse_choices, run_spec, time_jacobians
from ntkpipe.build.run import build, exact_single_thread, manifest_of, plan_store, settle
from ntkpipe.build.upkeep.grow import chunks_left, grow_store
from ntkpipe.build.workers import find_resources
from ntkpipe.jacobian.model.functional import Forward
from ntkpipe.jacobian.model.samples import Samples, as_samples, require_same_arrays
from ntkpipe.jacobian.parameter_report import ParameterReport, report_of
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.media.opening import medium_at
from ntkpipe.store.mending.growth import end_growth, is_larger, undo_cut_growth
from ntkpipe.store.store import Mode, Store, prepare_path

if TYPE_CHECKING:
    from distributed import Client


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
    parameters: Sequence[str] | None = None,
    groups: Mapping[str, Sequence[str] | None] | None = None,
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

    Every finished tile is safe: after a kill, Ctrl-C or a full disk the same call resumes, and ends with the same bits.

    Parameters
    ----------
    model
        A module in eval mode; it is copied. Parameters with ``requires_grad=False`` are left out.
    inputs
        N samples: a tensor or array (samples along the first axis), a dict of them (keyword arguments of the model), or
        a map-style data set of samples or (sample, target) pairs.
    store
        Path or URL of the store.
    kind
        ``"pntk"``, ``"trace"``, ``"output:k"`` (N x N), ``"diagonal"`` (N x N for each output) or ``"ntk"``
        (N*O x N*O); conventions in :mod:`ntkpipe.base.kinds`.
    targets
        N targets along the first axis; stored for later use with the kernel.
    test_inputs, test_targets
        M more samples: adds the test x train kernel and the diagonal blocks of the test samples.
    forward
        Picks the (batch, O) tensor: ``".logits"``, a function of the model's output, or one of (model, inputs).
    parameters
        Shell-style patterns of parameter names, as ``"head.*"``; default all that require a gradient.
    groups
        Name → patterns among those parameters, disjoint: adds a kernel of each group from the same pass, as
        ``store.group(name).train``. If the groups cover all parameters, their kernels sum to the whole.
    compute_dtype, accumulate_dtype, store_dtype
        dtype of forward pass and Jacobians: ``"float32"``, ``"float64"``, ``"bfloat16"`` or ``"tf32"`` (float32 whose
        products on a GPU may be TF32); of products and sums over parameters, never TF32, default ``compute_dtype`` but
        at least float32; of the stored matrix, default ``accumulate_dtype``.
    tile
        Samples along the edge of a tile (one file); default about 2048 rows.
    memory_limit
        Bytes, or text as ``"8GiB"``, that this process may use; default 70 % of what is free.
    device
        ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; default the first GPU if there is one.
    self_check
        Compare the engine with plain ``torch.func`` on three samples before the first tile.
    mode
        As in Zarr: ``"a"`` creates or resumes, ``"w"`` starts over, ``"w-"`` only creates.
    grow
        Add samples to a smaller store, at the end or as a first test set: computes only new tiles, keeps stored bits.
    client
        A ``distributed.Client`` whose workers compute the blocks and write to the store, which must be on a disk that
        they share or at a URL. Default threads of this process.
    code
        Folder whose Python files are sent to the workers; needed only for a model defined in one of them.
    workers
        Threads, each with single-threaded arithmetic; default one per core. Results do not depend on it.
    jacobian
        ``"structured"``, or ``"fallback"`` for plain ``torch.func`` throughout.
    progress
        Show a progress bar on standard error.

    Returns
    -------
    The finished store, open for reading.

    Raises
    ------
    ConfigError, ModelError, DataError, NonFiniteError
        If an argument is wrong, or model or samples cannot be used as they are.
    StoreMismatchError, ResourceError
        If the store was made with something else (lists the fields that differ), or memory or disk cannot hold it.
    SelfCheckError, ClusterError
        If the engine and the reference disagree, or the workers of the client cannot compute or are lost.
    StoreFullError, Interrupted
        If the disk fills up, or on Ctrl-C. Finished tiles are kept.
    """
    if mode not in {"a", "w", "w-"}:
        raise ConfigError(f"mode={mode!r}; needed 'a' (create or resume), 'w' (start over) or 'w-' (only create)")
    if grow and mode != "a":
        raise ConfigError(f"grow=True adds samples to the store that is there, mode={mode!r} needs none; use mode='a'")
    types = {"compute_dtype": compute_dtype, "accumulate_dtype": accumulate_dtype, "store_dtype": store_dtype}
    spec = kernel_spec(kind=kind, parameters=parameters, groups=groups or {}, tile=tile, jacobian=jacobian, **types)
    run = run_spec(memory_limit=memory_limit, device=device, workers=workers, self_check=self_check)
    medium = medium_at(store)
    existing = prepare_path(medium, mode) if mode != "w" else None
    if existing is not None:
        undo_cut_growth(existing)
        spec = _with_tile_of(existing, spec)
    both = _as_both(inputs, targets, test_inputs, test_targets)
    resources = find_resources(run, spec, client, code, progress)
    with exact_single_thread(spec.compute_dtype):
        prepared = prepare(model, *both, spec, forward=forward, device=resources.device, choose_tile=_tile_of(existing))
        asked = manifest_of(model, prepared, *prepared.inspect())
        if existing is not None and grow and is_larger(existing.manifest, asked):
            require_made_from_model(existing, grows=True)
            settled = grow_store(prepared, asked, existing, resources)
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
            settled = settle(prepared, asked, existing, medium, resources, mode=mode)
        build(settled, prepared, resources)
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
    parameters: Sequence[str] | None = None,
    groups: Mapping[str, Sequence[str] | None] | None = None,
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
    (:class:`ntkpipe.jacobian.parameter_report.ParameterReport`). The self-check of a run may move further parameters to
    the fallback. Where memory or disk cannot hold the kernel, ``plan.problems`` says so with both numbers, and nothing
    is raised; other errors are those of :func:`compute_kernel`.
    """
    types = {"compute_dtype": compute_dtype, "accumulate_dtype": accumulate_dtype, "store_dtype": store_dtype}
    spec = kernel_spec(kind=kind, parameters=parameters, groups=groups or {}, tile=tile, jacobian=jacobian, **types)
    run = run_spec(memory_limit=memory_limit, device=device, workers=workers, self_check=False)
    medium = medium_at(store)
    existing = prepare_path(medium, "a")
    if existing is not None:
        spec = _with_tile_of(existing, spec)
    train, test = _as_both(inputs, targets, test_inputs, test_targets)
    with exact_single_thread(spec.compute_dtype):
        prepared = prepare(model, train, test, spec, forward=forward, device=run.device, choose_tile=_tile_of(existing))
        asked = manifest_of(model, prepared, train.describe(), None if test is None else test.describe())
        engine, left = prepared.engine, None
        if existing is not None:
            require_same_but_samples(existing, asked, grow=grow)
            if is_larger(existing.manifest, asked):
                left = chunks_left(existing, existing.manifest.grown(asked.train, asked.test, {}))
            engine = reuse_choices(engine, existing.manifest.choices, medium.root)
        plan = plan_store(prepared, engine, asked, existing, medium, run, left=left)
        return time_jacobians(plan, prepared, engine), report_of(engine)


def _with_tile_of(existing: Store, spec: KernelSpec) -> KernelSpec:
    """Ask for the store's tile where that was cut to the samples of a first, smaller run."""
    manifest = existing.manifest
    first = (manifest.earlier() or (manifest,))[0].train.num_samples
    is_same = spec.tile is not None and min(spec.tile, first) == manifest.tile
    return spec.model_copy(update={"tile": manifest.tile}) if is_same else spec


def _tile_of(existing: Store | None) -> Callable[[int, int, int], int]:
    return default_tile if existing is None else lambda *_: existing.manifest.tile


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
