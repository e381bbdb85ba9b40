"""Solvers applied to a store: progress is shown, Ctrl-C leaves a checkpoint, results are kept below ``results/``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.export import find_array
from ntkpipe.kept import find_kernel, keep, result_name, right_hand_sides
from ntkpipe.kernel import KernelStore, open_kernel
from ntkpipe.operators.operator import Operator
from ntkpipe.resources import half_of_room
from ntkpipe.ridges import RidgeScale, absolute_ridge
from ntkpipe.saving import Checkpoint, load_result
from ntkpipe.solvers.determinant import LogDeterminant, logdet
from ntkpipe.solvers.functions import Density, LogDeterminantEstimate, density
from ntkpipe.solvers.lanczos import Eigenpairs, eigsh
from ntkpipe.solvers.result import Monitor, Result
from ntkpipe.solvers.solution import Solution
from ntkpipe.solvers.solve import Method, solve
from ntkpipe.store import reading_results

if TYPE_CHECKING:
    from distributed import Client


def eigsh_of_store(
    store: KernelStore,
    *,
    array: str = "train",
    k: int = 100,
    tol: float = 1e-6,
    block: int | None = None,
    max_passes: int | None = None,
    seed: int = 0,
    memory_limit: int | None = None,
    client: "Client | None" = None,
    progress: bool = True,
) -> Eigenpairs:
    """Leading eigenpairs of a stored kernel; see :func:`ntkpipe.solvers.lanczos.eigsh`.

    Parameters
    ----------
    store
        The store; the result goes to its ``results/eigsh``.
    array
        Which kernel, as ``train``, or ``groups/head/kernel/train``.
    k, tol, block, max_passes, seed
        Of the solver.
    memory_limit, client
        As for :func:`ntkpipe.operators.opening.as_operator`; the solver has half of the memory.
    progress
        Show passes on standard error.

    Raises
    ------
    ConfigError
        If an option is wrong, or there is no such array.
    Interrupted
        On Ctrl-C; the same call goes on from the checkpoint.
    TileError
        If a tile is missing or damaged.
    """
    options: dict[str, Any] = {"k": k, "tol": tol, "block": block, "max_passes": max_passes, "seed": seed}

    share = half_of_room(memory_limit)

    def find(operator: Operator, monitor: Monitor, checkpoint: Checkpoint) -> Eigenpairs:
        return eigsh(operator, monitor=monitor, checkpoint=checkpoint, memory_limit=share, **options)

    return keep(store, "eigsh", array, options, find, share, client, progress)


def solve_store(
    store: KernelStore,
    *,
    array: str = "train",
    ridge: float = 0.0,
    ridge_scale: RidgeScale = None,
    method: Method = "auto",
    tol: float = 1e-6,
    rank: int | None = None,
    preconditioner: Literal["rpcholesky", "nystrom"] = "rpcholesky",
    path: str | None = None,
    max_passes: int | None = None,
    seed: int = 0,
    memory_limit: int | None = None,
    client: "Client | None" = None,
    progress: bool = True,
) -> Solution:
    """Kernel regression of the stored targets; see :func:`ntkpipe.solvers.solve.solve`.

    Right-hand sides are the targets, classes as one-hot columns; of a full NTK each output has rows of its own, and
    there is one column.

    Parameters
    ----------
    store
        The store; the result goes to its ``results/solve``.
    array
        Which kernel, as ``train``, or ``groups/head/kernel/train``.
    ridge, ridge_scale
        λ, absolute; with ``"mean_diagonal"`` times the mean of the diagonal.
    method, tol, rank, preconditioner, path, max_passes, seed
        Of the solver.
    memory_limit, client
        As for :func:`ntkpipe.operators.opening.as_operator`; the solver has half of the memory.
    progress
        Show passes on standard error.

    Raises
    ------
    ConfigError
        If an option is wrong, there is no such array, or the store has no targets that are right-hand sides.
    IndefiniteError
        If ``cholesky`` was asked for and a pivot is not positive.
    Interrupted
        On Ctrl-C; the same call goes on from the checkpoint.
    TileError
        If a tile is missing or damaged.
    """
    rhs = right_hand_sides(store)
    shift = absolute_ridge(ridge, ridge_scale, lambda: find_kernel(store, array).diagonal())
    options: dict[str, Any] = {
        "ridge": shift,
        "method": method,
        "tol": tol,
        "rank": rank,
        "preconditioner": preconditioner,
        "path": path,
        "max_passes": max_passes,
        "seed": seed,
    }

    share = half_of_room(memory_limit)

    def find(operator: Operator, monitor: Monitor, checkpoint: Checkpoint) -> Solution:
        return solve(operator, rhs, monitor=monitor, checkpoint=checkpoint, memory_limit=share, **options)

    return keep(store, "solve", array, options, find, share, client, progress)


def logdet_of_store(
    store: KernelStore,
    *,
    array: str = "train",
    ridge: float = 0.0,
    method: Literal["cholesky", "slq"] = "cholesky",
    jitter: Literal["auto"] | None = None,
    path: str | None = None,
    num_probes: int | None = None,
    tol: float | None = None,
    rank: int | None = None,
    max_passes: int | None = None,
    seed: int | None = None,
    memory_limit: int | None = None,
    client: "Client | None" = None,
    progress: bool = True,
) -> LogDeterminant | LogDeterminantEstimate:
    """Log determinant of a stored kernel; see :func:`ntkpipe.solvers.determinant.logdet`.

    Parameters
    ----------
    store
        The store; the result goes to its ``results/logdet``.
    array
        Which kernel, as ``train``, or ``groups/head/kernel/train``.
    ridge, method, jitter, path
        Of the solver.
    num_probes, tol, rank, max_passes, seed
        Of ``slq``.
    memory_limit, client
        As for :func:`ntkpipe.operators.opening.as_operator`; the solver has half of the memory.
    progress
        Show how far it is on standard error.

    Raises
    ------
    ConfigError
        If an option is wrong, or there is no such array.
    IndefiniteError
        If a pivot is not positive.
    Interrupted
        On Ctrl-C; the same call goes on from the last panel in ``path``, or the last pass of ``slq``.
    ResourceError
        If the factor does not fit in memory and no path is given.
    TileError
        If a tile is missing or damaged.
    """
    given = {"num_probes": num_probes, "tol": tol, "rank": rank, "max_passes": max_passes, "seed": seed}
    sampling = {name: value for name, value in given.items() if value is not None}
    options: dict[str, Any] = {"ridge": ridge, "method": method, "jitter": jitter, "path": path, **sampling}

    share = half_of_room(memory_limit)

    def find(operator: Operator, monitor: Monitor, checkpoint: Checkpoint) -> LogDeterminant | LogDeterminantEstimate:
        return logdet(operator, monitor=monitor, checkpoint=checkpoint, memory_limit=share, **options)

    return keep(store, "logdet", array, options, find, share, client, progress)


def density_of_store(
    store: KernelStore,
    *,
    array: str = "train",
    num_probes: int = 16,
    num_steps: int | None = None,
    tol: float = 0.05,
    max_passes: int = 100,
    seed: int = 0,
    memory_limit: int | None = None,
    client: "Client | None" = None,
    progress: bool = True,
) -> Density:
    """Spectral density of a stored kernel; see :func:`ntkpipe.solvers.density.density`.

    Eigenpairs that :func:`eigsh_of_store` left in the store are counted exactly.

    Parameters
    ----------
    store
        The store; the result goes to its ``results/density``.
    array
        Which kernel, as ``train``, or ``groups/head/kernel/train``.
    num_probes, num_steps, tol, max_passes, seed
        Of the solver.
    memory_limit, client
        As for :func:`ntkpipe.operators.opening.as_operator`; the solver has half of the memory.
    progress
        Show passes on standard error.

    Raises
    ------
    ConfigError
        If an option is wrong, or there is no such array.
    Interrupted
        On Ctrl-C; the same call goes on from the checkpoint.
    TileError
        If a tile is missing or damaged.
    """
    top = stored_pairs(store, array)
    options: dict[str, Any] = {
        "num_probes": num_probes,
        "num_steps": num_steps,
        "tol": tol,
        "max_passes": max_passes,
        "seed": seed,
    }
    named = {**options, "top": 0 if top is None else len(top.eigenvalues)}

    share = half_of_room(memory_limit)

    def find(operator: Operator, monitor: Monitor, checkpoint: Checkpoint) -> Density:
        return density(operator, top=top, monitor=monitor, checkpoint=checkpoint, memory_limit=share, **options)

    return keep(store, "density", array, named, find, share, client, progress)


def read_result(store: KernelStore | str | Path, name: str) -> dict[str, Any] | None:
    """What is below ``results/name`` of a store: numbers, words and arrays by name, or none.

    Parameters
    ----------
    store
        Path, or an open store.
    name
        ``eigsh``, ``solve``, ``logdet``, ``density``; of another kernel than ``train`` its array follows, parts joined
        by ``-``, as ``eigsh-groups-head-kernel-train``.

    Raises
    ------
    StoreError
        If it is damaged.
    """
    opened = store if isinstance(store, KernelStore) else open_kernel(store)
    return load_result(opened.store, name)


class StoredPairs:
    """Eigenpairs that are in a store.

    Attributes
    ----------
    eigenvalues, eigenvectors
        Shapes (k,) and (n, k).
    """

    def __init__(self, eigenvalues: NDArray[np.float64], eigenvectors: NDArray[np.float64]) -> None:
        self.eigenvalues = eigenvalues
        self.eigenvectors = eigenvectors


def stored_pairs(store: KernelStore, array: str = "train") -> StoredPairs | None:
    """Eigenpairs of a kernel that :func:`eigsh_of_store` has found, or none if there are none that converged.

    Raises
    ------
    ConfigError
        If there is no such array.
    StoreError
        If they are damaged.
    """
    found = load_result(store.store, result_name("eigsh", find_array(store.store, array).layout.name))
    if found is None or found.get("status") != "converged":
        return None
    with reading_results(store.path):
        return StoredPairs(found["eigenvalues"], found["eigenvectors"])


# By the names of commands and steps, which are those of results.
SOLVERS: Mapping[str, Callable[..., Result]] = {
    "eigsh": eigsh_of_store,
    "solve": solve_store,
    "logdet": logdet_of_store,
    "density": density_of_store,
}
