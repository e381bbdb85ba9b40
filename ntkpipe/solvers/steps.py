"""Solvers applied to a store: progress is shown, Ctrl-C leaves a checkpoint, results are kept below ``results/``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.ridge import RidgeScale, absolute_ridge
from ntkpipe.solvers.linear.solution import Solution
from ntkpipe.solvers.linear.solve import SolveMethod, solve
from ntkpipe.solvers.on_store import Question, of_store, result_name, right_hand_sides
from ntkpipe.solvers.result import Result
from ntkpipe.solvers.spectral.density import Density, density
from ntkpipe.solvers.spectral.lanczos import Eigenpairs, eigsh
from ntkpipe.solvers.spectral.logdet import LogDeterminant, logdet
from ntkpipe.solvers.spectral.slq_logdet import LogDeterminantEstimate
from ntkpipe.store.chunks import reading_results
from ntkpipe.store.export import find_array
from ntkpipe.store.kernel import KernelStore, open_kernel
from ntkpipe.store.results import load_result

if TYPE_CHECKING:
    pass


@of_store("eigsh")
def eigsh_of_store(
    question: Question,
    *,
    k: int = 100,
    tol: float = 1e-6,
    block: int | None = None,
    max_passes: int | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """Leading eigenpairs of a stored kernel; options of :func:`ntkpipe.eigsh`."""
    return eigsh(
        question.operator,
        k,
        tol=tol,
        block=block,
        max_passes=max_passes,
        seed=seed,
        memory_limit=question.memory_limit,
        checkpoint=question.checkpoint,
        monitor=question.monitor,
    )


@of_store("solve")
def solve_store(
    question: Question,
    *,
    ridge: float = 0.0,
    ridge_scale: RidgeScale = None,
    method: SolveMethod = "auto",
    tol: float = 1e-6,
    rank: int | None = None,
    preconditioner: Literal["rpcholesky", "nystrom"] = "rpcholesky",
    path: str | None = None,
    max_passes: int | None = None,
    seed: int = 0,
) -> Solution:
    """Kernel regression of the stored targets; options of :func:`ntkpipe.solve`.

    Right-hand sides are the targets, classes as one-hot columns; of a full NTK each output has rows of its own, and
    there is one column.
    """
    return solve(
        question.operator,
        right_hand_sides(question.store),
        ridge=absolute_ridge(ridge, ridge_scale, question.kernel.diagonal),
        method=method,
        tol=tol,
        rank=rank,
        preconditioner=preconditioner,
        path=path,
        max_passes=max_passes,
        seed=seed,
        memory_limit=question.memory_limit,
        checkpoint=question.checkpoint,
        monitor=question.monitor,
    )


@of_store("logdet")
def logdet_of_store(
    question: Question,
    *,
    ridge: float = 0.0,
    method: Literal["cholesky", "slq"] = "cholesky",
    jitter: Literal["auto"] | None = None,
    path: str | None = None,
    num_probes: int | None = None,
    tol: float | None = None,
    rank: int | None = None,
    max_passes: int | None = None,
    seed: int | None = None,
) -> LogDeterminant | LogDeterminantEstimate:
    """Log determinant of a stored kernel; options of :func:`ntkpipe.logdet`."""
    given = {"num_probes": num_probes, "tol": tol, "rank": rank, "max_passes": max_passes, "seed": seed}
    sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return logdet(
        question.operator,
        ridge=ridge,
        method=method,
        jitter=jitter,
        path=path,
        memory_limit=question.memory_limit,
        checkpoint=question.checkpoint,
        monitor=question.monitor,
        **sampling,
    )


def _num_stored_pairs(store: KernelStore, array: str) -> dict[str, int]:
    top = stored_pairs(store, array)
    return {"top": 0 if top is None else len(top.eigenvalues)}


@of_store("density", _num_stored_pairs)
def density_of_store(
    question: Question,
    *,
    num_probes: int = 16,
    num_steps: int | None = None,
    tol: float = 0.05,
    max_passes: int = 100,
    seed: int = 0,
) -> Density:
    """Spectral density of a stored kernel; options of :func:`ntkpipe.density`.

    Eigenpairs that :func:`eigsh_of_store` left in the store are counted exactly.
    """
    return density(
        question.operator,
        top=stored_pairs(question.store, question.kernel.name),
        num_probes=num_probes,
        num_steps=num_steps,
        tol=tol,
        max_passes=max_passes,
        seed=seed,
        memory_limit=question.memory_limit,
        checkpoint=question.checkpoint,
        monitor=question.monitor,
    )


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
    """Eigenpairs that are in a store."""

    def __init__(self, eigenvalues: NDArray[np.float64], eigenvectors: NDArray[np.float64]) -> None:
        self.eigenvalues = eigenvalues
        self.eigenvectors = eigenvectors


def stored_pairs(store: KernelStore, array: str = "train") -> StoredPairs | None:
    """Eigenpairs of a kernel that :func:`eigsh_of_store` has found, or none if there are none that converged."""
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
