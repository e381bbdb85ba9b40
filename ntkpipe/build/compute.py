"""The public functions that compute a kernel into a store, and plan that."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn

from ntkpipe.base.arguments import checked, with_arguments_of
from ntkpipe.base.budget import MemoryLimit
from ntkpipe.base.config import ComputeDtype, RealDtype
from ntkpipe.base.tables import as_table
from ntkpipe.build.from_model import ModelSource
from ntkpipe.build.life import Place, fill
from ntkpipe.build.plan import Plan
from ntkpipe.build.prepare import exact_single_thread, time_jacobians
from ntkpipe.build.request import Request
from ntkpipe.build.workers import find_resources
from ntkpipe.jacobian.model.functional import Forward
from ntkpipe.jacobian.model.samples import Samples
from ntkpipe.jacobian.parameter_report import ParameterReport, report_of, report_rows
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.store import Mode

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
    arguments, place = locals(), Place.at(store, mode, grow=grow)
    request = Request.of(arguments, stored=place.manifest)
    with exact_single_thread(request.kernel.compute_dtype):
        source = ModelSource.of(request, find_resources(request, client, code, progress), Samples.inspect)
        return KernelStore(fill(place, source, progress=progress))


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
    place = Place.at(arguments["store"], arguments["mode"], grow=arguments["grow"])
    request = Request.of(arguments, stored=place.manifest)
    with exact_single_thread(request.kernel.compute_dtype):
        resources = find_resources(request, *(arguments[name] for name in ("client", "code", "progress")))
        source = ModelSource.of(request, resources, lambda samples, _: samples.describe())
        work = place.work(source)
        engine = source.engine(work)
        planned = source.plan(work, engine)
        if resources.cluster is None:
            planned = time_jacobians(planned, source.prepared, engine)
        return PlannedKernel(planned, report_of(engine))
