"""Solvers as steps on a store, which save their results below ``results/``, and what reads these results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.ridge import RidgeScale, absolute_ridge
from ntkpipe.solvers.linear.solution import Solution
from ntkpipe.solvers.linear.solve import SolveMethod, solve
from ntkpipe.solvers.on_store import StoreRequest, of_store, result_name, right_hand_sides
from ntkpipe.solvers.result import Result
from ntkpipe.solvers.spectral.density import Density, density
from ntkpipe.solvers.spectral.lanczos import Eigenpairs, eigsh
from ntkpipe.solvers.spectral.logdet import LogDeterminant, logdet
from ntkpipe.solvers.spectral.slq_logdet import LogDeterminantEstimate
from ntkpipe.store.export import find_array
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.results import load_result, reading_results


@of_store("eigsh")
def eigsh_of_store(
    request: StoreRequest,
    *,
    k: int = 100,
    tol: float = 1e-6,
    block: int | None = None,
    max_passes: int | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """Leading eigenpairs of a stored kernel; options of :func:`ntkpipe.eigsh`."""
    return eigsh(request.operator, k, tol=tol, block=block, max_passes=max_passes, seed=seed, **request.solver_options)


@of_store("solve")
def solve_store(
    request: StoreRequest,
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

    Right-hand sides are the targets, with classes as one-hot columns; for a full NTK, where each output has rows of its
    own, there is one column.
    """
    return solve(
        request.operator,
        right_hand_sides(request.store),
        ridge=absolute_ridge(ridge, ridge_scale, request.kernel.diagonal),
        method=method,
        tol=tol,
        rank=rank,
        preconditioner=preconditioner,
        path=path,
        max_passes=max_passes,
        seed=seed,
        **request.solver_options,
    )


@of_store("logdet")
def logdet_of_store(
    request: StoreRequest,
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
        request.operator, ridge=ridge, method=method, jitter=jitter, path=path, **request.solver_options, **sampling
    )


def _num_stored_pairs(store: KernelStore, array: str) -> dict[str, int]:
    top = stored_pairs(store, array)
    return {"top": 0 if top is None else len(top.eigenvalues)}


@of_store("density", _num_stored_pairs)
def density_of_store(
    request: StoreRequest,
    *,
    num_probes: int = 16,
    num_steps: int | None = None,
    tol: float = 0.05,
    max_passes: int = 100,
    seed: int = 0,
) -> Density:
    """Spectral density of a stored kernel; options of :func:`ntkpipe.density`.

    Eigenpairs that :func:`eigsh_of_store` saved in the store are counted exactly.
    """
    return density(
        request.operator,
        top=stored_pairs(request.store, request.kernel.name),
        num_probes=num_probes,
        num_steps=num_steps,
        tol=tol,
        max_passes=max_passes,
        seed=seed,
        **request.solver_options,
    )


def read_result(store: KernelStore | str | Path, name: str) -> dict[str, Any] | None:
    """Read the result below ``results/name`` of a store: numbers, words and arrays by name; none if there is none.

    Parameters
    ----------
    store
        Path, or an open store.
    name
        ``eigsh``, ``solve``, ``logdet``, ``density``; for another kernel than ``train`` its array follows, parts joined
        by ``-``, such as ``eigsh-groups-head-train``.

    Raises
    ------
    StoreError
        If the result is damaged.
    """
    opened = store if isinstance(store, KernelStore) else open_kernel(store)
    return load_result(opened.store, name)


@dataclass(frozen=True, eq=False)
class StoredPairs:
    """Eigenpairs that were read from a store."""

    eigenvalues: FloatArray
    eigenvectors: FloatArray


def stored_pairs(store: KernelStore, array: str = "train") -> StoredPairs | None:
    """Read the eigenpairs that :func:`eigsh_of_store` saved for a kernel; none if there are none that converged."""
    found = load_result(store.store, result_name("eigsh", find_array(store.store, array).layout.name))
    if found is None or found.get("status") != "converged":
        return None
    with reading_results(store.path):
        return StoredPairs(found["eigenvalues"], found["eigenvectors"])


SOLVERS: Mapping[str, Callable[..., Result]] = {  # by name of the command, the step and the result
    "eigsh": eigsh_of_store,
    "solve": solve_store,
    "logdet": logdet_of_store,
    "density": density_of_store,
}
