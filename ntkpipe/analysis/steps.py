"""Analyses applied to a store, each a step of a workflow file by its name."""

from collections.abc import Callable, Mapping, Sequence

from ntkpipe.analysis.alignment import Alignment, alignment
from ntkpipe.analysis.comparing.compare import compare_kernels
from ntkpipe.analysis.comparing.result import Comparison
from ntkpipe.analysis.generalisation import Generalisation, generalisation
from ntkpipe.analysis.learning_curve import LearningCurve, learning_curve
from ntkpipe.analysis.spectrum import KernelSpectrum, spectrum
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.ridge import RidgeScale
from ntkpipe.learning.regression.eigensystem import AnalysisMethod, eigenpairs_of_store
from ntkpipe.learning.regression.sources import targets_of, test_kernel_of
from ntkpipe.learning.steps import gaussian_process_of_store, influence_of_store, regression_of_store
from ntkpipe.solvers.on_store import StoreRequest, of_store
from ntkpipe.solvers.result import Result
from ntkpipe.store.kernel_store import open_kernel


@of_store("spectrum")
def spectrum_of_store(
    request: StoreRequest,
    *,
    ridges: Sequence[float] | None = None,
    ridge_scale: RidgeScale = None,
    tail_ranks: Sequence[int] | None = None,
    method: AnalysisMethod = "auto",
    k: int = 100,
    num_probes: int = 16,
    max_passes: int = 100,
    seed: int = 0,
) -> KernelSpectrum:
    """The spectrum of a stored kernel in numbers; options of :func:`ntkpipe.spectrum`."""
    if tail_ranks is not None and len(tail_ranks) != 2:
        raise ConfigError(f"tail_ranks={tail_ranks!r}; needed two numbers, the first and the last rank")
    return spectrum(
        request.operator,
        eigenpairs=eigenpairs_of_store(request, method, compute=False),
        ridges=ridges,
        ridge_scale=ridge_scale,
        tail_ranks=None if tail_ranks is None else (tail_ranks[0], tail_ranks[1]),
        method=method,
        k=k,
        num_probes=num_probes,
        max_passes=max_passes,
        seed=seed,
        memory_limit=request.memory_limit,
        monitor=request.monitor,
    )


@of_store("alignment")
def alignment_of_store(
    request: StoreRequest, *, method: AnalysisMethod = "auto", k: int = 100, tol: float = 1e-8, seed: int = 0
) -> Alignment:
    """Alignment of a stored kernel with the stored targets; options of :func:`ntkpipe.alignment`."""
    return alignment(
        request.operator,
        targets_of(request.store, "train"),
        eigenpairs=eigenpairs_of_store(request, method),
        method=method,
        k=k,
        tol=tol,
        seed=seed,
        memory_limit=request.memory_limit,
        monitor=request.monitor,
    )


@of_store("generalisation")
def generalisation_of_store(
    request: StoreRequest,
    *,
    ridges: Sequence[float] | None = None,
    ridge_scale: RidgeScale = None,
    method: AnalysisMethod = "auto",
    tolerance: float = 0.1,
    num_probes: int = 32,
    tol: float = 1e-8,
    seed: int = 0,
) -> Generalisation:
    """Theory of the test loss across ridges, against what is measured on the stored test set where there is one.

    Options are those of :func:`ntkpipe.generalisation`.
    """
    store = request.store
    test_kernel, test_targets = test_kernel_of(request), store.test_targets
    is_measured = test_kernel is not None and test_targets is not None
    return generalisation(
        request.operator,
        targets_of(store, "train"),
        ridges=ridges,
        ridge_scale=ridge_scale,
        test_kernel=test_kernel if is_measured else None,
        test_targets=test_targets if is_measured else None,
        eigenpairs=eigenpairs_of_store(request, method),
        method=method,
        tolerance=tolerance,
        num_probes=num_probes,
        tol=tol,
        seed=seed,
        memory_limit=request.memory_limit,
        monitor=request.monitor,
    )


@of_store("learning_curve")
def learning_curve_of_store(
    request: StoreRequest,
    *,
    sizes: Sequence[int] | None = None,
    ridges: Sequence[float] | None = None,
    ridge_scale: RidgeScale = None,
    num_subsets: int = 4,
    seed: int = 0,
) -> LearningCurve:
    """Predicted and measured losses of train sets drawn from the train samples of a store.

    Options are those of :func:`ntkpipe.learning_curve`.
    """
    return learning_curve(
        request.operator,
        targets_of(request.store, "train"),
        eigenpairs=eigenpairs_of_store(request, "exact"),
        sizes=sizes,
        ridges=ridges,
        ridge_scale=ridge_scale,
        num_subsets=num_subsets,
        seed=seed,
        memory_limit=request.memory_limit,
        monitor=request.monitor,
    )


@of_store("compare")
def compare_of_store(
    request: StoreRequest,
    *,
    other: str | None = None,
    k: int = 10,
    ridge: float = 0.0,
    ridge_scale: RidgeScale = None,
    smallest_eigenvalue: bool = True,
    seed: int = 0,
) -> Comparison:
    """Compare a stored kernel with that of the same name in another store, the reference."""
    if other is None:
        raise ConfigError("compare needs other: the path of the store to compare with, which is the reference")
    return compare_kernels(
        request.store,
        open_kernel(other),
        array=request.kernel.name,
        k=k,
        ridge=ridge,
        ridge_scale=ridge_scale,
        smallest_eigenvalue=smallest_eigenvalue,
        seed=seed,
        memory_limit=request.memory_limit,
        client=request.client,
        monitor=request.monitor,
    )


# By the names of steps, which are those of results.
ANALYSES: Mapping[str, Callable[..., Result]] = {
    "spectrum": spectrum_of_store,
    "alignment": alignment_of_store,
    "generalisation": generalisation_of_store,
    "regression": regression_of_store,
    "gaussian_process": gaussian_process_of_store,
    "influence": influence_of_store,
    "compare": compare_of_store,
    "learning_curve": learning_curve_of_store,
}
