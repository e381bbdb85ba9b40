"""Analyses applied to a store, each a step of a workflow file by its name."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.analysis.alignment import Alignment, alignment
from ntkpipe.analysis.eigensystem import Method
from ntkpipe.analysis.generalisation import Generalisation, generalisation
from ntkpipe.analysis.spectrum import KernelSpectrum, spectrum
from ntkpipe.comparing import compare_of_store
from ntkpipe.errors import ConfigError
from ntkpipe.export import find_array
from ntkpipe.kept import keep
from ntkpipe.kernel import Kernel, KernelStore
from ntkpipe.operators.operator import Operator
from ntkpipe.resources import half_of_room
from ntkpipe.ridges import RidgeScale
from ntkpipe.saving import Checkpoint
from ntkpipe.solvers.result import Monitor, Result

if TYPE_CHECKING:
    from distributed import Client


def spectrum_of_store(
    store: KernelStore,
    *,
    array: str = "train",
    ridges: Sequence[float] | None = None,
    ridge_scale: RidgeScale = None,
    tail_ranks: Sequence[int] | None = None,
    method: Method = "auto",
    k: int = 100,
    num_probes: int = 16,
    max_passes: int = 100,
    seed: int = 0,
    memory_limit: int | None = None,
    client: "Client | None" = None,
    progress: bool = True,
) -> KernelSpectrum:
    """The spectrum of a stored kernel in numbers; see :func:`ntkpipe.analysis.spectrum.spectrum`.

    Parameters
    ----------
    store
        The store; the result goes to its ``results/spectrum``.
    array
        Which kernel, as ``train``, or ``groups/head/train``.
    ridges, ridge_scale, tail_ranks, method, k, num_probes, max_passes, seed
        Of the analysis.
    memory_limit, client
        As for :func:`ntkpipe.operators.opening.as_operator`; the analysis has half of the memory.
    progress
        Show passes on standard error.

    Raises
    ------
    ConfigError
        If an option is wrong, or there is no such array.
    Interrupted
        On Ctrl-C.
    TileError
        If a tile is missing or damaged.
    """
    if tail_ranks is not None and len(tail_ranks) != 2:
        raise ConfigError(f"tail_ranks={tail_ranks!r}; needed two numbers, the first and the last rank")
    options: dict[str, Any] = {
        "ridges": ridges,
        "ridge_scale": ridge_scale,
        "tail_ranks": None if tail_ranks is None else tuple(tail_ranks),
        "method": method,
        "k": k,
        "num_probes": num_probes,
        "max_passes": max_passes,
        "seed": seed,
    }
    share = half_of_room(memory_limit)

    def find(operator: Operator, monitor: Monitor, checkpoint: Checkpoint) -> KernelSpectrum:
        del checkpoint
        return spectrum(operator, monitor=monitor, memory_limit=share, **options)

    return keep(store, "spectrum", array, options, find, share, client, progress)


def alignment_of_store(
    store: KernelStore,
    *,
    array: str = "train",
    method: Method = "auto",
    k: int = 100,
    tol: float = 1e-8,
    seed: int = 0,
    memory_limit: int | None = None,
    client: "Client | None" = None,
    progress: bool = True,
) -> Alignment:
    """Alignment of a stored kernel with the stored targets; see :func:`ntkpipe.analysis.alignment.alignment`.

    Parameters
    ----------
    store
        The store; the result goes to its ``results/alignment``.
    array
        Which kernel, as ``train``, or ``groups/head/train``.
    method, k, tol, seed
        Of the analysis.
    memory_limit, client
        As for :func:`ntkpipe.operators.opening.as_operator`; the analysis has half of the memory.
    progress
        Show passes on standard error.

    Raises
    ------
    ConfigError
        If an option is wrong, there is no such array, or the store has no targets that fit it.
    Interrupted
        On Ctrl-C.
    TileError
        If a tile is missing or damaged.
    """
    targets = _targets(store)
    options: dict[str, Any] = {"method": method, "k": k, "tol": tol, "seed": seed}
    share = half_of_room(memory_limit)

    def find(operator: Operator, monitor: Monitor, checkpoint: Checkpoint) -> Alignment:
        del checkpoint
        return alignment(operator, targets, monitor=monitor, memory_limit=share, **options)

    return keep(store, "alignment", array, options, find, share, client, progress)


def generalisation_of_store(
    store: KernelStore,
    *,
    array: str = "train",
    ridges: Sequence[float] | None = None,
    ridge_scale: RidgeScale = None,
    method: Method = "auto",
    tolerance: float = 0.1,
    num_probes: int = 32,
    tol: float = 1e-8,
    seed: int = 0,
    memory_limit: int | None = None,
    client: "Client | None" = None,
    progress: bool = True,
) -> Generalisation:
    """Theory of the test loss across ridges, against what is measured on the stored test set where there is one.

    See :func:`ntkpipe.analysis.generalisation.generalisation`.

    Parameters
    ----------
    store
        The store; the result goes to its ``results/generalisation``.
    array
        Which kernel, as ``train``, or ``groups/head/train``.
    ridges, ridge_scale, method, tolerance, num_probes, tol, seed
        Of the analysis.
    memory_limit, client
        As for :func:`ntkpipe.operators.opening.as_operator`; the analysis has half of the memory.
    progress
        Show passes on standard error.

    Raises
    ------
    ConfigError
        If an option is wrong, there is no such array, or the store has no targets that fit it.
    Interrupted
        On Ctrl-C.
    TileError
        If a tile is missing or damaged.
    """
    targets, test_kernel, test_targets = _targets(store), _test_kernel(store, array), store.test_targets
    if test_kernel is None or test_targets is None:
        test_kernel = test_targets = None
    options: dict[str, Any] = {
        "ridges": ridges,
        "ridge_scale": ridge_scale,
        "method": method,
        "tolerance": tolerance,
        "num_probes": num_probes,
        "tol": tol,
        "seed": seed,
    }
    share = half_of_room(memory_limit)

    def find(operator: Operator, monitor: Monitor, checkpoint: Checkpoint) -> Generalisation:
        del checkpoint
        return generalisation(
            operator,
            targets,
            test_kernel=test_kernel,
            test_targets=test_targets,
            monitor=monitor,
            memory_limit=share,
            **options,
        )

    return keep(store, "generalisation", array, options, find, share, client, progress)


def _targets(store: KernelStore) -> NDArray[np.generic]:
    """The train targets.

    Raises
    ------
    ConfigError
        If there are none.
    """
    if store.targets is None:
        raise ConfigError(f"{store.path} has no targets; give them to compute_kernel, or call the function with yours")
    return store.targets


def _test_kernel(store: KernelStore, array: str) -> Kernel | None:
    """Test × train of the same parameters and outputs as a train kernel, if there is one."""
    if store.manifest.test is None:
        return None
    name = find_array(store.store, array).layout.name
    return Kernel(store.store.arrays[f"{name.removesuffix('train')}test_train"], store.manifest.digest())


# By the names of steps, which are those of results.
ANALYSES: Mapping[str, Callable[..., Result]] = {
    "spectrum": spectrum_of_store,
    "alignment": alignment_of_store,
    "generalisation": generalisation_of_store,
    "compare": compare_of_store,
}
