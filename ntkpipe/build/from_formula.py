"""The public functions that compute the kernels of a network of infinite width into a store, and plan that."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkpipe.base.arguments import checked, with_arguments_of
from ntkpipe.base.blas import single_threaded_blas
from ntkpipe.base.config import MemoryLimit, RealDtype
from ntkpipe.base.progress import Phase
from ntkpipe.build.formula_source import FormulaSource
from ntkpipe.build.life import Place, fill
from ntkpipe.build.plan import Plan
from ntkpipe.build.prepare import Request
from ntkpipe.build.workers import find_resources
from ntkpipe.infinite.networks import Network
from ntkpipe.jacobian.model.samples import Samples
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.manifest import DataRecord
from ntkpipe.store.store import Mode

if TYPE_CHECKING:
    from distributed import Client


@checked
def compute_infinite_kernel(
    net: Network,
    inputs: object,
    *,
    store: str | Path,
    targets: object = None,
    test_inputs: object = None,
    test_targets: object = None,
    store_dtype: RealDtype | None = None,
    tile: int | None = None,
    memory_limit: MemoryLimit = None,
    force: bool = False,
    mode: Mode = "a",
    grow: bool = False,
    client: "Client | None" = None,
    code: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> KernelStore:
    """Compute the kernels of a network of infinite width into a store, or resume one.

    The store's kernels are those of the NTK, Θ; the NNGP, the covariance Σ of outputs at initialisation, is its group
    ``"nngp"``: ``store.group("nngp").train``. Both come from one recursion (Jacot, Gabriel, Hongler 2018, arXiv
    1806.07572, Proposition 1 and Theorem 1), in float64 inside. Of O outputs both are K ⊗ I_O; K alone is stored, and
    outputs are zero, their mean. An entry depends on its two samples alone: tiles, workers, kills, resumes and growth
    change no bit. Memory is two tiles of both kernels for each worker, and what the layers need of their samples.

    Parameters
    ----------
    net
        The network: what :mod:`ntkpipe.infinite` makes.
    inputs
        N samples, shape (N, features) or (N, C, H, W): a tensor, array or frame, or a map-style data set of samples or
        (sample, target) pairs. Any real dtype.
    store
        Path or URL of the store.
    targets
        Targets of the N samples, along the first axis; stored for later use with the kernel.
    test_inputs
        M test samples, which add the test x train kernels and both kernels of each test sample with itself.
    test_targets
        Targets of the M test samples.
    store_dtype
        dtype of the stored matrices, by default float64; float32 rounds at the end.
    tile
        Samples along the edge of a tile (one file); default about 2048, fewer where entries cost more.
    force
        Begin even what is expected to take more than a day.
    mode
        ``"a"`` creates or resumes, ``"w"`` starts over, ``"w-"`` only creates; these are the modes of Zarr.
    grow
        Add samples to a smaller store, at the end or as a first test set. Only new tiles are computed.
    client
        A ``distributed.Client`` whose workers compute the blocks and write to the store. The store must be on a disk
        that they share, or at a URL. Default threads of this process.
    code
        Folder whose Python files are sent to the workers; needed only for activations that are defined in one of them.

    Returns
    -------
    The finished store, open for reading.

    Raises
    ------
    ConfigError, DataError, NonFiniteError
        If the network has no name for an activation, its covariances leave the range of float64 (names the layer), or
        samples do not fit it or hold what is no number.
    StoreMismatchError, ResourceError
        If the store was made with something else (lists the options that differ), memory or disk cannot hold it, or it
        takes more than a day.
    ClusterError
        If the workers of the client cannot compute or are lost.
    StoreFullError, Interrupted
        If the disk fills up, or on Ctrl-C. Finished tiles are kept.
    """
    arguments, place = locals(), Place.at(store, mode, grow=grow)
    with single_threaded_blas():
        with Phase("prepare", enabled=progress):
            source = _asked(arguments, place, Samples.inspect)
        return KernelStore(fill(place, source, progress=progress))


@with_arguments_of(compute_infinite_kernel)
def plan_infinite_kernel(arguments: Mapping[str, Any]) -> Plan:
    """Plan what :func:`compute_infinite_kernel` would do with the same arguments; writes nothing.

    Returns
    -------
    The plan, which prints as a table; its time is from a few pairs of samples, timed here. Where memory or disk cannot
    hold the kernel, ``plan.problems`` says so, and nothing is raised; other errors are those of
    :func:`compute_infinite_kernel`.
    """
    place = Place.at(arguments["store"], arguments["mode"], grow=arguments["grow"])
    with single_threaded_blas():
        source = _asked(arguments, place, lambda samples, _: samples.describe())
        return source.plan(place.work(source))


def _asked(arguments: Mapping[str, Any], place: Place, look: Callable[[Samples, str], DataRecord]) -> FormulaSource:
    """The source that arguments ask for."""
    given = {**arguments, "model": arguments["net"], "forward": None, "device": "cpu", "compute_dtype": "float64"}
    request = Request.of(given, stored=place.existing)
    resources = find_resources(request.run, "float64", arguments["client"], arguments["code"], arguments["progress"])
    return FormulaSource.of(request, resources, look, is_forced=arguments["force"])
