"""Analyses applied to a store, each a step of a workflow file by its name."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ntkpipe.analysis.alignment import Alignment, alignment
from ntkpipe.analysis.comparing.step import compare_of_store
from ntkpipe.analysis.generalisation import generalisation
from ntkpipe.analysis.generalisation_result import Generalisation
from ntkpipe.analysis.learning_curve import LearningCurve, learning_curve
from ntkpipe.analysis.spectrum import spectrum
from ntkpipe.analysis.spectrum_result import KernelSpectrum
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.ridge import RidgeScale
from ntkpipe.learning.regression.eigensystem import Method
from ntkpipe.learning.regression.stored_eigenpairs import pairs_of
from ntkpipe.learning.steps import gaussian_process_of_store, influence_of_store, regression_of_store
from ntkpipe.solvers.on_store import Question, of_store
from ntkpipe.solvers.result import Result
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelStore


@of_store("spectrum")
def spectrum_of_store(
    question: Question,
    *,
    ridges: Sequence[float] | None = None,
    ridge_scale: RidgeScale = None,
    tail_ranks: Sequence[int] | None = None,
    method: Method = "auto",
    k: int = 100,
    num_probes: int = 16,
    max_passes: int = 100,
    seed: int = 0,
) -> KernelSpectrum:
    """The spectrum of a stored kernel in numbers; options of :func:`ntkpipe.spectrum`."""
    if tail_ranks is not None and len(tail_ranks) != 2:
        raise ConfigError(f"tail_ranks={tail_ranks!r}; needed two numbers, the first and the last rank")
    return spectrum(
        question.operator,
        eigenpairs=pairs_of(question, method, compute=False),
        ridges=ridges,
        ridge_scale=ridge_scale,
        tail_ranks=None if tail_ranks is None else (tail_ranks[0], tail_ranks[1]),
        method=method,
        k=k,
        num_probes=num_probes,
        max_passes=max_passes,
        seed=seed,
        memory_limit=question.memory_limit,
        monitor=question.monitor,
    )


@of_store("alignment")
def alignment_of_store(
    question: Question, *, method: Method = "auto", k: int = 100, tol: float = 1e-8, seed: int = 0
) -> Alignment:
    """Alignment of a stored kernel with the stored targets; options of :func:`ntkpipe.alignment`."""
    return alignment(
        question.operator,
        _targets(question.store),
        eigenpairs=pairs_of(question, method),
        method=method,
        k=k,
        tol=tol,
        seed=seed,
        memory_limit=question.memory_limit,
        monitor=question.monitor,
    )


@of_store("generalisation")
def generalisation_of_store(
    question: Question,
    *,
    ridges: Sequence[float] | None = None,
    ridge_scale: RidgeScale = None,
    method: Method = "auto",
    tolerance: float = 0.1,
    num_probes: int = 32,
    tol: float = 1e-8,
    seed: int = 0,
) -> Generalisation:
    """Theory of the test loss across ridges, against what is measured on the stored test set where there is one.

    Options are those of :func:`ntkpipe.generalisation`.
    """
    store = question.store
    test_kernel, test_targets = _test_kernel(question), store.test_targets
    is_measured = test_kernel is not None and test_targets is not None
    return generalisation(
        question.operator,
        _targets(store),
        ridges=ridges,
        ridge_scale=ridge_scale,
        test_kernel=test_kernel if is_measured else None,
        test_targets=test_targets if is_measured else None,
        eigenpairs=pairs_of(question, method),
        method=method,
        tolerance=tolerance,
        num_probes=num_probes,
        tol=tol,
        seed=seed,
        memory_limit=question.memory_limit,
        monitor=question.monitor,
    )


@of_store("learning_curve")
def learning_curve_of_store(
    question: Question,
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
        question.operator,
        _targets(question.store),
        eigenpairs=pairs_of(question, "exact"),
        sizes=sizes,
        ridges=ridges,
        ridge_scale=ridge_scale,
        num_subsets=num_subsets,
        seed=seed,
        memory_limit=question.memory_limit,
        monitor=question.monitor,
    )


def _targets(store: KernelStore) -> NDArray[np.generic]:
    """The train targets."""
    if store.targets is None:
        raise ConfigError(f"{store.path} has no targets; give them to compute_kernel, or call the function with yours")
    return store.targets


def _test_kernel(question: Question) -> Kernel | None:
    """Test × train of the same parameters and outputs as the train kernel, if there is one."""
    store = question.store
    if store.manifest.test is None:
        return None
    name = f"{question.kernel.name.removesuffix('train')}test_train"
    return Kernel(store.store.arrays[name], store.manifest.digest())


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
