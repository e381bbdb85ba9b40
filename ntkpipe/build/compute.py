"""The public functions that compute a kernel into a store, and plan that."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn

from ntkpipe.base.arguments import checked, with_arguments_of
from ntkpipe.base.budget import MemoryLimit
from ntkpipe.base.config import ComputeDtype, RealDtype
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.tables import as_table
from ntkpipe.build.matching import (
    require_made_from_model,
    require_same,
    require_same_but_samples,
    require_same_function,
)
from ntkpipe.build.plan import Plan
from ntkpipe.build.prepare import prepare, reuse_choices, time_jacobians
from ntkpipe.build.request import Request
from ntkpipe.build.run import build, exact_single_thread, manifest_of, plan_store, settle
from ntkpipe.build.upkeep.grow import chunks_left, grow_store
from ntkpipe.build.workers import find_resources
from ntkpipe.jacobian.model.functional import Forward
from ntkpipe.jacobian.parameter_report import ParameterReport, report_of, report_rows
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.media.opening import medium_at
from ntkpipe.store.mending.growth import end_growth, is_larger, undo_cut_growth
from ntkpipe.store.store import Mode, Store, prepare_path

if TYPE_CHECKING:
    from distributed import Client


@checked
def compute_kernel(
    model: nn.Module,
    inputs: object,
    *,
    store: str | Path,
    kind: str = "pntk",
    targets: object = None,
    test_inputs: object = None,
    test_targets: object = None,
    forward: "Forward" = None,
    parameters: str | Sequence[str] | None = None,
    groups: Mapping[str, str | Sequence[str]] | None = None,
    compute_dtype: ComputeDtype = "float32",
    accumulate_dtype: RealDtype | None = None,
    store_dtype: RealDtype | None = None,
    tile: int | None = None,
    memory_limit: MemoryLimit = None,
    device: str | None = None,
    self_check: bool = True,
    mode: Mode = "a",
    grow: bool = False,
    client: "Client | None" = None,
    code: str | Path | None = None,
    workers: int | None = None,
    jacobian: Literal["structured", "fallback"] = "structured",
    progress: bool = True,
) -> KernelStore:
    """Compute an empirical neural tangent kernel into a store, or resume one.

    Every finished tile is safe: after a kill, Ctrl-C or a full disk the same call resumes, and ends with the same bits.

    Parameters
    ----------
    store
        Path or URL of the store.
    targets
        Targets of the N samples, along the first axis; stored for later use with the kernel.
    test_inputs
        M test samples, which add the test x train kernel and the diagonal blocks of the test samples.
    test_targets
        Targets of the M test samples.
    groups
        Groups of those parameters (name → patterns, disjoint), each of which gets a kernel from the same pass. It is
        ``store.group(name).train``; if the groups cover all parameters, their kernels sum to the whole.
    tile
        Samples along the edge of a tile (one file); default about 2048 rows.
    mode
        ``"a"`` creates or resumes, ``"w"`` starts over, ``"w-"`` only creates; these are the modes of Zarr.
    grow
        Add samples to a smaller store, at the end or as a first test set. Only new tiles are computed.
    client
        A ``distributed.Client`` whose workers compute the blocks and write to the store. The store must be on a disk
        that they share, or at a URL. Default threads of this process.

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
    request = Request.of(locals())
    if grow and mode != "a":
        raise ConfigError(f"grow=True adds samples to the store that is there, mode={mode!r} needs none; use mode='a'")
    medium = medium_at(request.store)
    existing = prepare_path(medium, mode) if mode != "w" else None
    if existing is not None:
        undo_cut_growth(existing)
    request = _adapted(request, existing)
    resources = find_resources(request, client, code, progress)
    with exact_single_thread(request.kernel.compute_dtype):
        prepared = prepare(request, device=resources.device)
        asked = manifest_of(request.model, prepared, *prepared.inspect())
        if existing is not None and grow and is_larger(existing.manifest, asked):
            require_made_from_model(existing, grows=True)
            kept, settled = grow_store(prepared, asked, existing, resources)
            kept.complete_layout()
        else:
            if existing is not None:
                require_same(existing, asked)
                require_same_function(existing, prepared)
                require_made_from_model(existing)
                existing.complete_layout()
                if not existing.missing():
                    end_growth(existing)
                    return KernelStore(existing)
            kept, settled = settle(prepared, asked, existing, medium, resources, mode=mode)
        build(kept, settled, prepared, resources)
        return KernelStore(kept)


class PlannedKernel(NamedTuple):
    """A plan, and how the Jacobian of each parameter is found; prints as a table."""

    plan: Plan
    parameters: tuple[ParameterReport, ...]

    def __str__(self) -> str:
        return as_table([*self.plan.rows(), *report_rows(self.parameters)])


@with_arguments_of(compute_kernel)
def plan_kernel(arguments: Mapping[str, Any]) -> PlannedKernel:
    """Plan what :func:`compute_kernel` would do with the same arguments; reads five samples and writes nothing.

    With a client it is what its workers would do, but Jacobians are not timed.

    Returns
    -------
    The plan, and how the Jacobian of every selected parameter is found and held and what that costs; for those of the
    fallback why. A parameter and its bias, or all that is computed together, share one report
    (:class:`ntkpipe.jacobian.parameter_report.ParameterReport`). The self-check of a run may move further parameters to
    the fallback. Where memory or disk cannot hold the kernel, ``plan.problems`` says so with both numbers, and nothing
    is raised; other errors are those of :func:`compute_kernel`.
    """
    request, grow = Request.of(arguments), arguments["grow"]
    medium = medium_at(request.store)
    existing = prepare_path(medium, arguments["mode"]) if arguments["mode"] != "w" else None
    request = _adapted(request, existing)
    resources = find_resources(request, *(arguments[name] for name in ("client", "code", "progress")))
    train, test = request.train, request.test
    with exact_single_thread(request.kernel.compute_dtype):
        prepared = prepare(request, device=resources.device)
        asked = manifest_of(request.model, prepared, train.describe(), None if test is None else test.describe())
        engine, left = prepared.engine, None
        if existing is not None:
            require_same_but_samples(existing, asked, grow=grow)
            if is_larger(existing.manifest, asked):
                left = chunks_left(existing, existing.manifest.grown(asked.train, asked.test, {}))
            engine = reuse_choices(engine, existing.manifest.choices, medium.root, resources.cluster)
        planned = plan_store(prepared, engine, asked, existing, medium, resources, left=left)
        if resources.cluster is None:
            planned = time_jacobians(planned, prepared, engine)
        return PlannedKernel(planned, report_of(engine))


def _adapted(request: Request, existing: Store | None) -> Request:
    """The request with the store's tile, which was cut to the samples of a first run, unless it asks for another."""
    if existing is None:
        return request
    tile, manifest = request.kernel.tile, existing.manifest
    first = (manifest.earlier() or (manifest,))[0].train.num_samples
    if tile is not None and min(tile, first) != manifest.tile:
        return request
    return replace(request, kernel=request.kernel.model_copy(update={"tile": manifest.tile}))
