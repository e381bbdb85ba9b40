"""Kernel regression systems: coefficients of many outputs, for one ridge or for a path of them."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.config import check_number
from ntkpipe.errors import ConfigError, NonFiniteError, ResourceError
from ntkpipe.operators.opening import as_operator
from ntkpipe.operators.operator import Operator, Work
from ntkpipe.resources import available_memory, format_bytes, process_memory
from ntkpipe.solvers.cg import block_cg, pcg
from ntkpipe.solvers.preconditioner import Preconditioner, default_rank, preconditioner_of
from ntkpipe.solvers.result import Monitor, ignore
from ntkpipe.solvers.solution import Solution

Method = Literal["auto", "pcg", "block_cg"]
_METHODS = ("auto", "pcg", "block_cg")
# Blocks of the shape of the right-hand sides, and of the preconditioner, that are in memory at a time.
_BLOCKS = 10
_FACTORS = 3


def solve(
    matrix: Any,
    rhs: ArrayLike,
    *,
    ridge: float = 0.0,
    method: Method = "auto",
    tol: float = 1e-6,
    rank: int | None = None,
    preconditioner: Literal["rpcholesky", "nystrom"] | Preconditioner = "rpcholesky",
    initial: ArrayLike | None = None,
    max_passes: int | None = None,
    seed: int = 0,
    memory_limit: int | None = None,
    monitor: Monitor = ignore,
) -> Solution:
    """Solve ``(K + ridge I) A = Y`` to a true residual, for all columns of Y together.

    Parameters
    ----------
    matrix
        K: an operator, a stored kernel or a symmetric array; see :func:`ntkpipe.operators.opening.as_operator`.
    rhs
        Y, shape (n, c) or (n,).
    ridge
        λ, absolute. Zero is allowed; how far it is sensible depends on how K is stored, see
        :meth:`ntkpipe.operators.operator.Operator.storage_floor`.
    method
        ``pcg``: conjugate gradients, each column for itself in shared passes. ``block_cg``: columns share directions,
        fewer passes and more memory and arithmetic in this process. ``auto``: ``block_cg`` for more than one column.
    tol
        Largest |Y - (K + λI) A| / |Y| of a column for the status ``converged``.
    rank
        Of the preconditioner; default ``min(1000, n/10)``. Iterations fall as it grows.
    preconditioner
        ``rpcholesky`` reads columns, in at most five passes; ``nystrom`` is one pass of ``rank`` columns. Or one that
        was made before, for any ridge.
    initial
        Where to start, of the shape of Y: one pass.
    max_passes
        Products at most, without those of the preconditioner; default 1,000, at least 2.
    seed
        Of the preconditioner. Equal seeds give equal bits.
    memory_limit
        Bytes that this process may have; default all that is free.
    monitor
        Called after each pass of conjugate gradients.

    Raises
    ------
    ConfigError
        If the matrix, the right-hand sides or an option is wrong.
    NonFiniteError
        If one of them holds NaN or infinity.
    ResourceError
        If the preconditioner and the blocks do not fit memory; with both numbers.
    TileError
        If a tile is missing or damaged; the message names it.

    Notes
    -----
    In this process: ``8 n (3 rank + 10 c)`` bytes, and the tiles that are kept.
    """
    return _solve_all(
        matrix,
        rhs,
        [ridge],
        method=method,
        tol=tol,
        rank=rank,
        preconditioner=preconditioner,
        initial=initial,
        max_passes=max_passes,
        seed=seed,
        memory_limit=memory_limit,
        monitor=monitor,
    )[0]


def solve_path(
    matrix: Any,
    rhs: ArrayLike,
    ridges: Sequence[float],
    *,
    method: Method = "auto",
    tol: float = 1e-6,
    rank: int | None = None,
    preconditioner: Literal["rpcholesky", "nystrom"] | Preconditioner = "rpcholesky",
    max_passes: int | None = None,
    seed: int = 0,
    memory_limit: int | None = None,
    monitor: Monitor = ignore,
) -> tuple[Solution, ...]:
    """Solve for several ridges: the preconditioner is made once, and each solution starts at the one before.

    Ridges are taken from large to small, whatever their order; the solutions have theirs. ``preconditioner_work`` is
    that of the first one that was solved, so sums over solutions are right.

    Parameters
    ----------
    matrix, rhs, method, tol, rank, preconditioner, seed, memory_limit, monitor
        As of :func:`solve`.
    ridges
        λ of each solution, at least one.
    max_passes
        Of each.

    Raises
    ------
    ConfigError
        If the matrix, the right-hand sides or an option is wrong.
    NonFiniteError
        If one of them holds NaN or infinity.
    ResourceError
        If the preconditioner and the blocks do not fit memory; with both numbers.
    TileError
        If a tile is missing or damaged; the message names it.
    """
    return _solve_all(
        matrix,
        rhs,
        ridges,
        method=method,
        tol=tol,
        rank=rank,
        preconditioner=preconditioner,
        initial=None,
        max_passes=max_passes,
        seed=seed,
        memory_limit=memory_limit,
        monitor=monitor,
    )


def _solve_all(
    matrix: Any,
    rhs: ArrayLike,
    ridges: Sequence[float],
    *,
    method: Method,
    tol: float,
    rank: int | None,
    preconditioner: Literal["rpcholesky", "nystrom"] | Preconditioner,
    initial: ArrayLike | None,
    max_passes: int | None,
    seed: int,
    memory_limit: int | None,
    monitor: Monitor,
) -> tuple[Solution, ...]:
    start, operator = perf_counter(), as_operator(matrix, memory_limit=memory_limit)
    block = _columns("right-hand sides", rhs, operator.num_rows)
    guess = None if initial is None else _columns("initial", initial, operator.num_rows)
    if guess is not None and guess.shape != block.shape:
        raise ConfigError(f"initial of {guess.shape[1]} columns for right-hand sides of {block.shape[1]}")
    if method not in _METHODS:
        raise ConfigError(f"method={method!r}; needed one of {', '.join(_METHODS)}")
    if not len(ridges):
        raise ConfigError("no ridge is given; needed at least one")
    values = [float(check_number("ridge", ridge, low=0.0, high=float(np.finfo(np.float64).max))) for ridge in ridges]
    check_number("tol", tol, low=0.0)
    most = int(check_number("max_passes", 1000 if max_passes is None else max_passes, low=2))
    rank_asked = _rank_of(operator, rank, preconditioner)
    options = {
        "method": method,
        "tol": tol,
        "rank": rank_asked,
        "preconditioner": preconditioner if isinstance(preconditioner, str) else preconditioner.method,
        "max_passes": most,
        "seed": seed,
        "memory_limit": memory_limit,
    }
    _require_room(block, rank_asked, memory_limit)
    chosen, why = _choose(method, block.shape[1])
    before = operator.work
    made = _prepare(operator, preconditioner, rank, seed)
    made_work = operator.work - before
    found: dict[int, Solution] = {}
    for number in sorted(range(len(values)), key=lambda i: -values[i]):
        started = operator.work
        run = block_cg if chosen == "block_cg" else pcg
        at_ridge = made.for_ridge(values[number])
        end = run(
            operator.shifted(values[number]),
            block,
            preconditioner=at_ridge,
            initial=guess,
            tol=tol,
            max_passes=most,
            monitor=monitor,
        )
        found[number] = Solution(
            status=end.status,
            message=end.message,
            work=operator.work - started + made_work,
            seconds=perf_counter() - start,
            options={"ridge": values[number], **options},
            matrix=operator.identity(),
            coefficients=end.solution.reshape(np.shape(rhs)),
            residuals=end.residuals,
            ridge=values[number],
            method=chosen,
            why=why,
            iterations=end.iterations,
            history=end.history,
            checks=end.checks,
            check_residuals=end.check_residuals,
            replacements=end.replacements,
            rank=at_ridge.rank,
            mu=at_ridge.mu,
            preconditioner_work=made_work,
        )
        start, made_work, guess = perf_counter(), Work(), end.solution
    return tuple(found[number] for number in range(len(values)))


def _choose(method: Method, num_columns: int) -> tuple[str, str]:
    """The method, and why it is this one."""
    if method != "auto":
        return method, "asked for"
    if num_columns > 1:
        return "block_cg", f"{num_columns} columns share directions"
    return "pcg", "there is one column"


def _columns(name: str, values: ArrayLike, num_rows: int) -> NDArray[np.float64]:
    """A block as float64 of two axes, checked.

    Raises
    ------
    ConfigError
        If its shape or dtype is wrong.
    NonFiniteError
        If it holds NaN or infinity.
    """
    block = np.asarray(values)
    is_right = block.ndim in {1, 2} and block.shape[0] == num_rows and block.size > 0 and block.dtype.kind in "fiub"
    if not is_right:
        raise ConfigError(
            f"{name} of shape {block.shape} and dtype {block.dtype}; needed ({num_rows},) or ({num_rows}, c) of real "
            "numbers"
        )
    block = np.ascontiguousarray(block, np.float64).reshape(num_rows, -1)
    if not np.isfinite(block).all():
        raise NonFiniteError(f"{name}: they hold NaN or infinity")
    return block


def _rank_of(operator: Operator, rank: int | None, preconditioner: str | Preconditioner) -> int:
    if isinstance(preconditioner, Preconditioner):
        return preconditioner.rank
    return default_rank(operator.num_rows) if rank is None else rank


def _prepare(operator: Operator, preconditioner: str | Preconditioner, rank: int | None, seed: int) -> Preconditioner:
    """The preconditioner, whose ridge is not set yet.

    Raises
    ------
    ConfigError
        If one was given that is of another size.
    """
    if not isinstance(preconditioner, Preconditioner):
        return preconditioner_of(operator, preconditioner, rank, ridge=0.0, seed=seed)
    if preconditioner.num_rows != operator.num_rows:
        raise ConfigError(
            f"a preconditioner of {preconditioner.num_rows:,} rows for a matrix of {operator.num_rows:,} rows"
        )
    return preconditioner


def _require_room(block: NDArray[np.float64], rank: int, memory_limit: int | None) -> None:
    """Refuse before anything is read.

    Raises
    ------
    ResourceError
        If blocks and preconditioner do not fit.
    """
    needed = 8 * block.shape[0] * (_FACTORS * min(rank, block.shape[0]) + _BLOCKS * block.shape[1])
    room = available_memory() if memory_limit is None else memory_limit - process_memory()
    if needed > room:
        raise ResourceError(
            f"rank {rank:,} and {block.shape[1]:,} columns of {block.shape[0]:,} rows need {format_bytes(needed)} of "
            f"memory; {format_bytes(room)} may be used. Give a smaller rank, or fewer columns at a time"
        )
