"""Conjugate gradients for many right-hand sides together: recurrences, and the loop in which true residuals decide."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray, column_norms
from ntkpipe.base.operator import Operator
from ntkpipe.solvers.linear.preconditioner import Preconditioner
from ntkpipe.solvers.probe_lanczos import lowest_eigenvalue, ridge_of_solves
from ntkpipe.solvers.result import Monitor, Status, Step, ignore

_EPS = float(np.finfo(np.float64).eps)
_ROUNDING = 4 * _EPS  # curvature of a direction of length one, relative to the norm of the matrix, that may be nothing
_CHECK_EVERY = 25
_DRIFT = 10.0  # a true residual larger than the recursive one by this factor replaces it
_LEAST_GAIN = 2.0
_MOST_POOR_GAINS = 2
_TOO_LARGE = 100.0  # rounding of a product with an iterate, as a multiple of the best residual, from where it is lost
_SPENT = 10  # passes, as a multiple of the rows
_LARGE = 1e6  # an iterate of so many times |b| / |A| is as bad as a residual of |b|


class Recurrence(ABC):
    """An iteration that updates a solution and, by the same products, its residual."""

    shares_directions = False  # whether columns advance by each other's directions, so that they restart together

    def __init__(
        self, operator: Operator, preconditioner: Preconditioner | None, solution: FloatArray, residual: FloatArray
    ) -> None:
        self._operator, self._preconditioner = operator, preconditioner
        self.solution, self.residual = solution, residual
        self.largest = 0.0  # about the norm of the matrix, as far as it is known
        if preconditioner is not None:
            self.largest = float(preconditioner.values.max(initial=0.0)) + preconditioner.ridge

    @abstractmethod
    def restart(self, columns: NDArray[np.bool_]) -> None:
        """Begin anew from :attr:`residual`, for some columns; called before the first step."""

    @abstractmethod
    def step(self, columns: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Advance some columns by one pass; return which of them met a direction without positive curvature."""


class _Independent(Recurrence):
    """Preconditioned conjugate gradients: each right-hand side has its own scalars, all share the passes.

    Columns that are done leave the products. Hestenes and Stiefel, 1952; preconditioned as in Saad, Iterative Methods
    for Sparse Linear Systems, 2nd ed., algorithm 9.1.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._directions = np.zeros_like(self.residual)
        # r' P^-1 r of the previous step; infinite where a column begins anew.
        self._products = np.full(self.residual.shape[1], np.inf)

    def restart(self, columns: NDArray[np.bool_]) -> None:
        self._products[columns] = np.inf

    def step(self, columns: NDArray[np.bool_]) -> NDArray[np.bool_]:
        residual = self.residual[:, columns]
        whitened = residual if self._preconditioner is None else self._preconditioner.solve(residual)
        products = np.einsum("ij,ij->j", residual, whitened)
        directions = whitened + products / self._products[columns] * self._directions[:, columns]
        image = self._operator.matmat(directions)
        curvature = np.einsum("ij,ij->j", directions, image)
        squared = np.einsum("ij,ij->j", directions, directions)
        self.largest = max(self.largest, float((curvature / squared).max(initial=0.0)))
        is_positive = curvature > _ROUNDING * self.largest * squared
        length = np.divide(products, curvature, out=np.zeros_like(products), where=is_positive)
        self.solution[:, columns] += length * directions
        self.residual[:, columns] -= length * image
        self._directions[:, columns] = directions
        self._products[columns] = products
        broken = np.zeros_like(columns)
        broken[columns] = ~is_positive
        return broken


class _Block(Recurrence):
    """Block conjugate gradients: every right-hand side profits from the search directions of all.

    O'Leary, 1980, in the form of Dubrulle ("Retooling the method of block conjugate gradients", ETNA 12, 2001), with an
    orthonormal basis of the residuals, P^-1/2 R = Q C, so they may be linearly dependent. We depart in three points:
    the preconditioner is split; the first basis is as large as the rank of the residuals, so right-hand sides may be
    equal, or more than rows; and directions without curvature, to float64 rounding, are left out.
    """

    shares_directions = True
    _whitened = 0.0  # the largest curvature of a direction so far, about the norm of the preconditioned matrix

    def _whiten(self, block: FloatArray) -> FloatArray:
        return block if self._preconditioner is None else self._preconditioner.inverse_sqrt(block)

    def restart(self, columns: NDArray[np.bool_]) -> None:
        del columns
        basis, sizes, mixing = np.linalg.svd(self._whiten(self.residual), full_matrices=False)
        kept = sizes > max(self.residual.shape) * _EPS * sizes.max(initial=0.0)
        self._basis = np.ascontiguousarray(basis[:, kept])
        self._mixing = sizes[kept, None] * mixing[kept]
        self._directions = self._basis

    def step(self, columns: NDArray[np.bool_]) -> NDArray[np.bool_]:
        directions = self._whiten(self._directions)
        image = self._operator.matmat(directions)
        whitened = self._whiten(image)
        projected = self._directions.T @ whitened
        curvature, axes = np.linalg.eigh((projected + projected.T) / 2)
        self._whitened = max(self._whitened, float(curvature.max(initial=0.0)))
        if self._preconditioner is None:
            self.largest = self._whitened
        rounding = len(curvature) * _ROUNDING * self._whitened
        if not curvature.size or curvature[0] < -rounding or curvature[-1] <= rounding:
            return columns.copy()
        kept = curvature > rounding
        lengths = (axes[:, kept] / curvature[kept]) @ axes[:, kept].T
        steps = lengths @ self._mixing
        self.solution += directions @ steps
        self.residual -= image @ steps
        self._basis, upper = np.linalg.qr(self._basis - whitened @ lengths)
        self._directions = self._basis + self._directions @ upper.T
        self._mixing = upper @ self._mixing
        return np.zeros_like(columns)


RECURRENCES = {"pcg": _Independent, "block_cg": _Block}


@dataclass(frozen=True, kw_only=True)
class IterationState:
    """State of an iteration, from which another one can go on with new directions."""

    solution: FloatArray  # shape (n, c)
    history: FloatArray  # recursive residuals, relative, shape (iterations, c)
    checks: NDArray[np.int64]  # after how many iterations true residuals were computed, shape (m,)
    check_residuals: FloatArray  # true residuals, relative, shape (m, c)
    replacements: int  # how often residuals were replaced by the true ones
    passes: int  # products: steps, checks, and one for each start that was not zero

    @property
    def iterations(self) -> int:
        """Steps of one pass each; every check is one pass more."""
        return len(self.history)


@dataclass(frozen=True, kw_only=True)
class Iterate(IterationState):
    """Outcome: the iterate of each column with the smallest true residual of all that were computed."""

    residuals: FloatArray  # true residuals of the solution, relative to the right-hand sides, shape (c,)
    status: Status
    message: str
    gave_up: bool  # whether the caller ended it


class Iteration:
    """Solution of ``A X = B`` by an iteration until true residuals are small, or cannot become so.

    True residuals, a pass each, are computed every 25 iterations and where recursive ones claim success, and only they
    decide. One that is ten times the recursive replaces it, and directions begin anew (van der Vorst and Ye, SIAM J.
    Sci. Comput. 22, 2000, who estimate it); a column that gains less than a factor of two by two replacements in a row
    has stagnated. Columns of B are scaled to norm one, and those of zeros left out.

    Where A is singular and B not in its range, iterates and residuals grow beyond all bounds; residuals grow for a
    while where A is only ill-conditioned, too. So sizes tell: a column has stagnated once rounding of A times its
    iterate is far above its best residual, since later iterates are larger still. It gets the smoothed iterate, the
    point of small residual and size on the line from the last one to the iterate (Zhou and Walker, SIAM J. Sci. Comput.
    15, 1994), as do columns whose residual at the end is above that of zero.

    Memory: about eight blocks of the shape of B, with those of the iteration.
    """

    def __init__(
        self,
        operator: Operator,
        rhs: FloatArray,
        *,
        initial: FloatArray | None = None,
        tol: float = 1e-6,
        max_passes: int = 1000,
        monitor: Monitor = ignore,
        give_up: Callable[[FloatArray], bool] | None = None,  # whether to stop, given the history
        earlier: IterationState | None = None,  # where to go on, instead of `initial`
        keep: Callable[[IterationState], None] = lambda state: None,  # called at each check, and when an error ends it
    ) -> None:
        self._operator, self._tol, self._monitor, self._max_passes = operator, tol, monitor, max_passes
        self._give_up, self._keep, self._before = give_up, keep, operator.work
        self._shape, self._scales = rhs.shape, column_norms(rhs)
        self._kept = self._scales > 0.0
        self._rhs = rhs[:, self._kept] / self._scales[self._kept]
        self._passes, self._replacements, self._gave_up = 0, 0, False
        self._history: list[FloatArray] = []
        self._checks: list[tuple[int, FloatArray]] = []
        if earlier is not None:
            self._passes, self._replacements, initial = earlier.passes, earlier.replacements, earlier.solution
            self._history = list(earlier.history[:, self._kept])
            self._checks = list(zip(earlier.checks.tolist(), earlier.check_residuals[:, self._kept], strict=True))
        self._num_earlier = len(self._history)
        self._start = np.zeros_like(self._rhs)
        self._residual = self._rhs
        if initial is not None and initial.any():
            self._start = initial[:, self._kept] / self._scales[self._kept]
            self._residual = self._true_residual(self._start)
        is_bad = np.linalg.norm(self._residual, axis=0) >= 1.0
        if earlier is None:
            self._start[:, is_bad], self._residual[:, is_bad] = 0.0, self._rhs[:, is_bad]
        self._best, self._best_residuals = self._start.copy(), np.linalg.norm(self._residual, axis=0)
        self._best[:, is_bad], self._best_residuals[is_bad] = 0.0, 1.0
        self._smooth, self._smooth_residual = self._best.copy(), np.where(is_bad, self._rhs, self._residual)
        count = self._rhs.shape[1]
        self._is_broken, self._is_stuck = np.zeros(count, bool), np.zeros(count, bool)
        self._targets = np.full(count, tol)
        self._replaced = np.full(count, np.inf)
        self._poor_gains = np.zeros(count, int)

    def _true_residual(self, solution: FloatArray) -> FloatArray:
        product = self._operator.matmat(solution)
        self._passes += 1
        return np.subtract(self._rhs, product, out=product)

    @property
    def _is_open(self) -> NDArray[np.bool_]:
        """Columns whose true residual is too large, and may still become smaller."""
        return np.asarray((self._best_residuals > self._tol) & ~self._is_broken & ~self._is_stuck)

    def _tell(self, residuals: FloatArray) -> None:
        self._monitor(Step(self._operator.work - self._before, float(residuals.max()), self._tol))

    def run(self, make: Callable[[FloatArray, FloatArray], Recurrence]) -> Iterate:
        """Iterate until no column is open, or passes are used up; the state is kept, whatever ends it."""
        recurrence = make(self._start, self._residual.copy())
        try:
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                self._iterate(recurrence)
        except BaseException as error:
            if len(self._history) > self._num_earlier:
                try:
                    self._keep(self._state(self._finite(recurrence)))
                except Exception as another:  # noqa: BLE001 - the first error is the one to report
                    error.add_note(f"what was reached could not be kept: {another}")
            raise
        status, message = self._judge()
        (residuals,), state = self._spread([self._best_residuals]), vars(self._state(self._best))
        return Iterate(residuals=residuals, status=status, message=message, gave_up=self._gave_up, **state)

    def _finite(self, recurrence: Recurrence) -> FloatArray:
        """The solution, with the best iterate in columns that have overflowed."""
        return np.where(np.isfinite(recurrence.solution).all(axis=0), recurrence.solution, self._best)

    def _iterate(self, recurrence: Recurrence) -> None:
        recursive = np.linalg.norm(recurrence.residual, axis=0)
        if self._is_open.any():
            recurrence.restart(np.ones_like(self._is_open))
        while self._is_open.any() and self._passes + 2 <= self._max_passes and not self._gave_up:
            active = self._is_open & (recursive > self._targets)
            if recurrence.shares_directions:
                active = np.ones_like(active)
            broken = recurrence.step(active)
            self._passes += 1
            recursive = np.linalg.norm(recurrence.residual, axis=0)
            self._history.append(recursive)
            self._smoothen(recurrence)
            self._tell(recursive)
            broken |= ~np.isfinite(recursive)
            self._is_broken |= broken.any() if recurrence.shares_directions else broken
            new = self._history[self._num_earlier :]
            self._gave_up = self._give_up is not None and self._give_up(np.array(new))
            is_due = len(self._history) % _CHECK_EVERY == 0 or self._passes + 2 > self._max_passes
            claims = ~(self._is_open & (recursive > self._targets)).any()
            if is_due or claims or self._gave_up:
                self._check(recurrence, recursive)
                recursive = np.linalg.norm(recurrence.residual, axis=0)
        self._look_back()

    def _smoothen(self, recurrence: Recurrence) -> None:
        """Move smoothed iterates towards the new ones, to where residuals and sizes together are smallest."""
        weight = (recurrence.largest / _LARGE) ** 2
        change, step = recurrence.residual - self._smooth_residual, recurrence.solution - self._smooth
        slopes = _dots(change, self._smooth_residual) + weight * _dots(step, self._smooth)
        lengths = -slopes / (_dots(change, change) + weight * _dots(step, step))
        moved = np.isfinite(lengths) & (lengths != 0.0)
        self._smooth_residual[:, moved] += lengths[moved] * change[:, moved]
        self._smooth[:, moved] += lengths[moved] * step[:, moved]

    def _hoped(self, columns: NDArray[np.bool_], residuals: FloatArray) -> NDArray[np.bool_]:
        """Which of these columns may have a smaller residual where they are smoothed."""
        return np.asarray(columns & (np.linalg.norm(self._smooth_residual, axis=0) < residuals))

    def _look_back(self) -> None:
        """Try the smoothed iterates of columns that broke down or stagnated; at most one pass."""
        is_lost = (self._best_residuals > self._tol) & (self._is_broken | self._is_stuck)
        if self._passes < self._max_passes and (hoped := self._hoped(is_lost, self._best_residuals)).any():
            true = np.linalg.norm(self._true_residual(self._smooth), axis=0)
            self._tell(true)
            self._remember(self._smooth, np.where(hoped, true, np.inf))

    def _remember(self, solution: FloatArray, residuals: FloatArray) -> None:
        better = residuals < self._best_residuals
        self._best[:, better], self._best_residuals[better] = solution[:, better], residuals[better]

    def _check(self, recurrence: Recurrence, recursive: FloatArray) -> None:
        """Compute true residuals, remember the best iterates, and replace residuals that have drifted."""
        solution = checked = self._finite(recurrence)
        if self._passes + 1 >= self._max_passes or self._gave_up:
            # Nothing comes after it: where zero would be better than the iterate, the smoothed one may be.
            checked = np.where(self._hoped(recursive >= 1.0, recursive), self._smooth, solution)
        residual = self._true_residual(checked)
        true = np.linalg.norm(residual, axis=0)
        self._checks.append((len(self._history), true))
        self._keep(self._state(solution))
        self._tell(true)
        self._remember(checked, true)
        rounding = _EPS * recurrence.largest * np.linalg.norm(solution, axis=0)
        self._is_stuck |= rounding > _TOO_LARGE * self._best_residuals
        is_open = self._is_open
        # The recursive residual met the target and the true one missed it by little: ask for a little more.
        claimed = is_open & (recursive <= self._targets)
        self._targets[claimed] = recursive[claimed] / 2
        drifted = is_open & (true > _DRIFT * recursive)
        if not drifted.any():
            return
        is_poor = drifted & (true * _LEAST_GAIN > self._replaced)
        self._poor_gains[is_poor] += 1
        self._poor_gains[drifted & ~is_poor] = 0
        self._replaced[drifted] = true[drifted]
        self._is_stuck |= self._poor_gains >= _MOST_POOR_GAINS
        if recurrence.shares_directions:
            drifted[:] = True
        self._replacements += 1
        recurrence.residual[:, drifted] = residual[:, drifted]
        self._targets[drifted] = self._tol
        if self._is_open.any():
            recurrence.restart(drifted)

    def _state(self, scaled: FloatArray) -> IterationState:
        solution = np.zeros(self._shape)
        solution[:, self._kept] = scaled * self._scales[self._kept]
        return IterationState(
            solution=solution,
            history=self._spread(self._history),
            checks=np.array([number for number, _ in self._checks], np.int64),
            check_residuals=self._spread([values for _, values in self._checks]),
            replacements=self._replacements,
            passes=self._passes,
        )

    def _spread(self, rows: list[FloatArray]) -> FloatArray:
        """Rows of numbers for all columns, with zero for right-hand sides that are zero."""
        spread = np.zeros((len(rows), self._shape[1]))
        spread[:, self._kept] = np.array(rows).reshape(len(rows), len(self._targets))
        return spread

    def _judge(self) -> tuple[Status, str]:
        worst = float(self._best_residuals.max(initial=0.0))
        is_open = self._best_residuals > self._tol
        said = f"true residuals are at most {worst:.2g}"
        if not is_open.any():
            return "converged", f"{said} after {len(self._history)} iterations"
        said += f", and {int(is_open.sum())} of {len(is_open)} columns are above tol={self._tol:.2g}"
        # In exact arithmetic there are no more steps than rows, and more passes are no help where several times as many
        # were none.
        is_spent = not self._gave_up and self._passes > _SPENT * self._operator.num_rows
        is_broken, is_stuck = self._is_broken & is_open, (self._is_stuck | is_spent) & is_open
        if (is_broken | is_stuck).any():
            lowest = lowest_eigenvalue(self._operator)
            ridge = lowest.ridge(ridge_of_solves(self._operator, self._tol))
            where = ": a direction without curvature beyond rounding was met" if is_broken.any() else ""
            status: Status = "indefinite at storage precision" if is_broken.any() else "stagnated"
            return status, (
                f"{said}{where}, so the matrix is singular for these right-hand sides or too ill-conditioned; "
                f"{lowest.words}. Raise the absolute ridge by at least {ridge:.2g}, or take the solution of minimum "
                "norm: KernelRegression(method='eigh')"
            )
        if self._gave_up:
            return "step limit", f"{said}: it was ended after {len(self._history)} iterations"
        return "step limit", f"{said} after {self._passes} passes: give more of them, a larger rank or a larger ridge"


def _dots(left: FloatArray, right: FloatArray) -> FloatArray:
    return np.asarray(np.einsum("ij,ij->j", left, right))
