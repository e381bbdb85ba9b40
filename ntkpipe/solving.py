"""Solvers applied to a store: progress is shown, Ctrl-C leaves a checkpoint, results are kept below ``results/``."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ntkpipe.config import check_number
from ntkpipe.errors import ConfigError, Interrupted
from ntkpipe.export import find_array
from ntkpipe.kernel import Kernel, KernelStore, open_kernel
from ntkpipe.operators.opening import as_operator
from ntkpipe.operators.operator import Operator
from ntkpipe.progress import Passes
from ntkpipe.saving import Checkpoint, load_result, save_result
from ntkpipe.solvers.determinant import LogDeterminant, logdet
from ntkpipe.solvers.functions import Density, LogDeterminantEstimate, density
from ntkpipe.solvers.lanczos import Eigenpairs, eigsh
from ntkpipe.solvers.result import Monitor, Result, Step
from ntkpipe.solvers.solution import Solution
from ntkpipe.solvers.solve import Method, solve
from ntkpipe.store import reading_results
from ntkpipe.targets import num_classes_of, target_matrix, target_rows

if TYPE_CHECKING:
    from distributed import Client

Found = TypeVar("Found", bound=Result)

_TRAIN = "kernel/train"


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
        As for :func:`ntkpipe.operators.opening.as_operator`.
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

    def find(operator: Operator, monitor: Monitor, checkpoint: Checkpoint) -> Eigenpairs:
        return eigsh(operator, monitor=monitor, checkpoint=checkpoint, **options)

    return _kept(store, "eigsh", array, options, find, memory_limit, client, progress)


def solve_store(
    store: KernelStore,
    *,
    array: str = "train",
    ridge: float | None = None,
    ridge_scale: float | None = None,
    method: Method = "auto",
    tol: float = 1e-6,
    rank: int | None = None,
    preconditioner: Literal["rpcholesky", "nystrom"] = "rpcholesky",
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
    ridge
        λ, absolute; default 0.
    ridge_scale
        Instead, λ over the mean of the diagonal.
    method, tol, rank, preconditioner, max_passes, seed
        Of the solver.
    memory_limit, client
        As for :func:`ntkpipe.operators.opening.as_operator`.
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
    if ridge is not None and ridge_scale is not None:
        raise ConfigError(f"ridge={ridge} and ridge_scale={ridge_scale} were given; needed one of them")
    rhs = right_hand_sides(store)
    shift = ridge or 0.0
    if ridge_scale is not None:
        check_number("ridge_scale", ridge_scale, low=0.0)
        shift = ridge_scale * float(find_kernel(store, array).diagonal().astype(np.float64).mean())
    options: dict[str, Any] = {
        "ridge": shift,
        "method": method,
        "tol": tol,
        "rank": rank,
        "preconditioner": preconditioner,
        "max_passes": max_passes,
        "seed": seed,
    }

    def find(operator: Operator, monitor: Monitor, checkpoint: Checkpoint) -> Solution:
        return solve(operator, rhs, monitor=monitor, checkpoint=checkpoint, memory_limit=memory_limit, **options)

    return _kept(store, "solve", array, options, find, memory_limit, client, progress)


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
        As for :func:`ntkpipe.operators.opening.as_operator`.
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

    def find(operator: Operator, monitor: Monitor, checkpoint: Checkpoint) -> LogDeterminant | LogDeterminantEstimate:
        return logdet(operator, monitor=monitor, checkpoint=checkpoint, memory_limit=memory_limit, **options)

    return _kept(store, "logdet", array, options, find, memory_limit, client, progress)


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
        As for :func:`ntkpipe.operators.opening.as_operator`.
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

    def find(operator: Operator, monitor: Monitor, checkpoint: Checkpoint) -> Density:
        return density(operator, top=top, monitor=monitor, checkpoint=checkpoint, memory_limit=memory_limit, **options)

    return _kept(store, "density", array, named, find, memory_limit, client, progress)


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
    found = load_result(store.store, _result_name("eigsh", find_array(store.store, array).layout.name))
    if found is None or found.get("status") != "converged":
        return None
    with reading_results(store.path):
        return StoredPairs(found["eigenvalues"], found["eigenvectors"])


def find_kernel(store: KernelStore, array: str) -> Kernel:
    """A symmetric kernel of a store by name.

    Raises
    ------
    ConfigError
        If there is no such array, or it is no symmetric kernel.
    """
    found = find_array(store.store, array)
    grid = found.layout.grid
    if grid is None or not grid.symmetric:
        raise ConfigError(f"{found.layout.name} is no kernel of samples with themselves; needed one as 'train'")
    return Kernel(found, store.manifest.digest())


def right_hand_sides(store: KernelStore) -> NDArray[np.float64]:
    """The train targets as right-hand sides in the rows of the kernel: (N, c), or (N·O, 1) for a full NTK.

    Raises
    ------
    ConfigError
        If there are none, or a full NTK has another number of outputs.
    """
    targets = store.targets
    if targets is None:
        raise ConfigError(f"{store.path} has no targets; give them to compute_kernel, or call ntkpipe.solve with yours")
    matrix = target_matrix(targets, num_classes_of(targets))
    rows = target_rows(matrix, store.manifest.num_covectors)
    if rows is None:
        raise ConfigError(
            f"the targets of {store.path} have {matrix.shape[1]} columns and the kernel {store.manifest.num_covectors} "
            "rows a sample; call ntkpipe.solve with right-hand sides of your own"
        )
    return rows


def _result_name(solver: str, array: str) -> str:
    """Below ``results/``: the solver, and the kernel where it is not the main one."""
    return solver if array == _TRAIN else f"{solver}-{array.replace('/', '-')}"


def _kept(
    store: KernelStore,
    solver: str,
    array: str,
    options: Mapping[str, Any],
    find: Callable[[Operator, Monitor, Checkpoint], Found],
    memory_limit: int | None,
    client: "Client | None",
    progress: bool,
) -> Found:
    """What a solver finds, saved; its checkpoint has the name of the question and goes when the answer is there."""
    kernel = find_kernel(store, array)
    name = _result_name(solver, kernel.name)
    digest = hashlib.sha256(json.dumps([kernel.identity, dict(options)], sort_keys=True).encode()).hexdigest()
    checkpoint = Checkpoint(store.store, f"{name}-{digest[:16]}")
    operator = as_operator(kernel, memory_limit=memory_limit, client=client)
    try:
        with store.store.in_use(), _shown(solver, progress) as monitor:
            found = find(operator, monitor, checkpoint)
            save_result(store.store, name, found.to_json(), found.arrays())
            checkpoint.clear()
    finally:
        operator.close()
    return found


@contextmanager
def _shown(solver: str, progress: bool) -> Iterator[Monitor]:
    with Passes(solver, enabled=progress) as shown:

        def monitor(step: Step) -> None:
            shown.show(step.work.passes, step.residual, step.target)

        try:
            yield monitor
        except KeyboardInterrupt:
            raise Interrupted(
                f"{solver} was interrupted; what it keeps is in the checkpoint, and the same command goes on from there"
            ) from None


# By the names of commands and steps, which are those of results.
SOLVERS: Mapping[str, Callable[..., Result]] = {
    "eigsh": eigsh_of_store,
    "solve": solve_store,
    "logdet": logdet_of_store,
    "density": density_of_store,
}
