"""Kernel regression systems: coefficients of many outputs, for one ridge or for a path of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from ntkpipe.base.arrays import FloatArray, require_bounded
from ntkpipe.base.blas import single_threaded_blas
from ntkpipe.base.config import Budget, MemoryLimit, RidgeScale, absolute_ridge, absolute_ridges, check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator, Work, digest_of
from ntkpipe.base.targets import Task
from ntkpipe.solvers.blocks import as_block, as_targets
from ntkpipe.solvers.checkpoint import Stages
from ntkpipe.solvers.inverse.systems import Solution, SolutionPath, SolveMethod, SolveOptions, SystemCheckpoint, Systems
from ntkpipe.solvers.linear.preconditioner import Preconditioner
from ntkpipe.solvers.result import Monitor, ignore, recorded
from ntkpipe.store.results import Checkpoint

_MOST_PASSES = 1000


@recorded()
@single_threaded_blas()
def solve(
    matrix: Any,
    rhs: ArrayLike,
    *,
    ridge: float = 0.0,
    ridge_scale: RidgeScale = None,
    task: Task = "auto",
    method: SolveMethod = "auto",
    tol: float = 1e-6,
    rank: int | None = None,
    preconditioner: Literal["rpcholesky", "nystrom"] | Preconditioner = "rpcholesky",
    initial: ArrayLike | None = None,
    max_passes: int | None = None,
    seed: int = 0,
    memory_limit: MemoryLimit = None,
    path: str | Path | None = None,
    monitor: Monitor = ignore,
    checkpoint: Checkpoint | None = None,
) -> Solution:
    """Solve ``(K + ridge I) A = Y`` to a true residual, for all columns of Y together.

    Parameters
    ----------
    rhs
        Right-hand sides Y, or targets: shape (n, c) or (n,). Integers, booleans and strings of shape (n,) are labels of
        classes, which become one-hot columns. Where each sample has as many rows as outputs, as in a full NTK, Y may
        have the shape (samples, outputs), or be labels of samples; coefficients have the shape (n,) then.
    ridge
        λ ≥ 0, added to the diagonal. How small it may sensibly be depends on how K is stored, see
        :meth:`ntkpipe.base.operator.Operator.storage_floor`.
    method
        ``pcg``: conjugate gradients, each column on its own in shared passes. ``block_cg``: columns share directions,
        which takes fewer passes and more arithmetic in this process. ``cholesky``: the tiled factor, in memory or in
        files below ``path``, with one step of refinement. ``eigh``: all eigenpairs, ``16 n²`` bytes; without a ridge
        the solution of smallest norm, where eigenvalues up to a cut-off count as zero, see
        :func:`ntkpipe.solvers.inverse.exact.cut_off`. ``auto``: whichever takes fewer operations of Cholesky, if
        it fits memory or has a path, and ``block_cg`` (``pcg`` for one column). Conjugate gradients that turn out slow
        are given up for Cholesky, and a Cholesky that meets a pivot that is not positive, or misses ``tol``, for
        conjugate gradients; without a ridge, where K is singular or not surely regular, for ``eigh`` if that fits.
        Operations are counted, not timed: equal calls get equal bits. ``method`` and ``why`` of the result say what
        happened.
    tol
        Largest |Y - (K + λI) A| / |Y| of a column for the status ``converged``.
    preconditioner
        ``rpcholesky`` reads columns, in at most five passes; ``nystrom`` is one pass of ``rank`` columns. Or one that
        was made before, for any ridge.
    initial
        Start, of the shape of Y; costs one pass.
    max_passes
        Most products, without those of the preconditioner; default 1,000, at least 2.
    path
        Folder for a Cholesky factor that does not fit memory, ``4 n²`` bytes. Each panel is a checkpoint, and the
        factor stays for :func:`ntkpipe.cholesky` to open. Default None: the factor is in memory.
    checkpoint
        Where conjugate gradients are saved: the preconditioner once it is made, ``8 n rank`` bytes; the iterate, 8 n c
        bytes, every 25 iterations and when Ctrl-C or an error ends the call. Another call for the same system goes on
        from there; it may have other ``max_passes`` and ``memory_limit``, and ignores ``initial``. Its directions begin
        anew, so it needs a few iterations more than an uninterrupted call and has other bits, but meets the same
        ``tol``. Costs, ``history`` and ``max_passes`` count from the first call. A factor in memory is not saved. The
        checkpoint stays when the call returns: clear it once the result is saved.

    Raises
    ------
    IndefiniteError
        If ``cholesky`` was asked for and a pivot is not positive.

    Notes
    -----
    Memory: ``8 n (3 rank + 11 c)`` bytes and the tiles that are kept; Cholesky 4 n² bytes and a few panels.
    """
    operator: Operator = matrix
    encoded, block, shape = as_targets(rhs, operator, task)
    absolute = absolute_ridge(ridge, ridge_scale, operator.diagonal)
    guess = None if initial is None else as_block("initial coefficients", initial, operator.num_rows)
    if guess is not None and guess.shape != block.shape:
        raise ConfigError(f"initial of {guess.shape[1]} columns for right-hand sides of {block.shape[1]}")
    if guess is not None:
        require_bounded("initial", guess)
    budget, passes = Budget.of(memory_limit), _MOST_PASSES if max_passes is None else max_passes
    options = SolveOptions(method, tol, rank, preconditioner, passes, seed, budget, monitor, path)
    kept = SystemCheckpoint(checkpoint, _decides(operator, block, absolute, options), block.shape)
    found = Systems(operator, block, options, 1).solve(absolute, guess, kept)
    coefficients = found.coefficients.reshape(shape)
    said = {**encoded.fields, "work": kept.work, "seconds": kept.seconds}
    return replace(found, coefficients=coefficients, **said)


@recorded()
@single_threaded_blas()
def solve_path(
    matrix: Any,
    rhs: ArrayLike,
    ridges: Sequence[float],
    *,
    ridge_scale: RidgeScale = None,
    task: Task = "auto",
    method: SolveMethod = "auto",
    tol: float = 1e-6,
    rank: int | None = None,
    preconditioner: Literal["rpcholesky", "nystrom"] | Preconditioner = "rpcholesky",
    max_passes: int | None = None,
    seed: int = 0,
    memory_limit: MemoryLimit = None,
    monitor: Monitor = ignore,
    checkpoint: Checkpoint | None = None,
) -> SolutionPath:
    """Solve for several ridges: the preconditioner is made once, and each solution starts at the one before.

    Ridges are solved from large to small; solutions are returned in the order given. ``preconditioner_work`` is counted
    in the first one that was solved, so sums over solutions are right.

    Parameters
    ----------
    rhs
        Right-hand sides Y, or targets, as in :func:`solve`.
    ridges
        λ of each solution, at least one.
    method
        How to solve, as in :func:`solve`. ``auto`` makes one decision for all ridges.
    tol
        Largest relative residual of a column for the status ``converged``.
    preconditioner
        How the preconditioner is made, or one that was made before, as in :func:`solve`.
    max_passes
        Most products for each ridge; default 1,000, at least 2.
    checkpoint
        Where the preconditioner, each solution, and the iterate of the one under way are saved. Another call solves no
        ridge twice, and goes on with the one under way as :func:`solve` does. The caller clears it.

    Raises
    ------
    IndefiniteError
        If ``cholesky`` was asked for and a pivot is not positive.
    """
    operator: Operator = matrix
    before = operator.work
    encoded, block, shape = as_targets(rhs, operator, task)
    values = absolute_ridges(ridges, ridge_scale, operator.diagonal)
    budget, passes = Budget.of(memory_limit), _MOST_PASSES if max_passes is None else max_passes
    options = SolveOptions(method, tol, rank, preconditioner, passes, seed, budget, monitor)
    decides = _decides(operator, block, values, options)
    stages = Stages(checkpoint, decides)
    systems = Systems(operator, block, options, len(values), stages)
    found: dict[int, Solution] = {}
    guess: FloatArray | None = None
    for number in sorted(range(len(values)), key=lambda i: -values[i]):
        name, start = f"ridge-{number}", guess

        def run(ridge: float = float(values[number]), name: str = name, start: Any = start) -> Solution:
            kept = SystemCheckpoint(stages.part(name), {**decides, "ridge": ridge}, block.shape)
            return systems.solve(ridge, start, kept)

        one = stages.result(name, Solution, run)
        with stages.journal.reading():
            guess = np.asarray(one.coefficients).reshape(block.shape)
        whose: dict[str, Any] = {"matrix": operator.identity(), **encoded.fields}
        found[number] = replace(one, coefficients=one.coefficients.reshape(shape), **whose)
    solutions = tuple(found[number] for number in range(len(values)))
    worst = next((one for one in solutions if not one.is_converged), solutions[0])
    return SolutionPath(
        status=worst.status,
        message=worst.message,
        work=sum((one.work for one in solutions), Work()) - (operator.work - before),
        ridges=values,
        coefficients=np.stack([one.coefficients for one in solutions]),
        residuals=np.stack([one.residuals for one in solutions]),
        statuses=tuple(one.status for one in solutions),
        methods=tuple(one.method for one in solutions),
        iterations=np.array([one.iterations for one in solutions]),
        **encoded.fields,
        _solutions=solutions,
    )


def _decides(operator: Operator, rhs: FloatArray, ridge: float | FloatArray, options: SolveOptions) -> dict[str, Any]:
    """Everything that a checkpoint must have been made with; after a check of the options."""
    check_number("tol", options.tol, low=0.0)
    check_number("max_passes", options.max_passes, low=2)
    if options.rank is not None:
        check_number("rank", options.rank, low=1)
    of_system = {"function": "solve", "matrix": operator.identity(), "rhs": digest_of(rhs), "ridge": ridge}
    asked = {"method": options.method, "tol": options.tol, "seed": options.seed, **options.resolved(operator)}
    return of_system | {name: asked[name] for name in ("method", "tol", "rank", "preconditioner", "seed")}
