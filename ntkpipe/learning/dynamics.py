"""Training by gradient flow, at many times from one Krylov space."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.arrays import FloatArray, require_bounded
from ntkpipe.base.blas import single_threaded_blas
from ntkpipe.base.config import Budget, MemoryLimit, check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.given import as_real
from ntkpipe.base.operator import Operator, digest_of
from ntkpipe.base.tables import TableRows
from ntkpipe.base.targets import Targets, Task
from ntkpipe.learning.regression.sources import initial_matrix
from ntkpipe.solvers.blocks import as_block, as_targets
from ntkpipe.solvers.inverse.contract import INDEFINITE
from ntkpipe.solvers.result import Monitor, OfTargets, Status, ignore, recorded
from ntkpipe.solvers.spectral.krylov import BlockLanczos, Stepping, TopEigenvalue, is_due, steps_that_fit
from ntkpipe.store.kernel_store import KernelSet
from ntkpipe.store.results import Checkpoint

_EPS = float(np.finfo(np.float64).eps)
_PER_DECADE = 24  # points of a decade of time at which the defect is computed


@dataclass(frozen=True, kw_only=True)
class Dynamics(OfTargets):
    """Gradient flow of the linearised model on ``½ |f - Y|²``, with coefficients for predictions.

    With targets of shape (n,), the last axis of arrays is absent.
    """

    times: FloatArray  # shape (T,); infinity may be among them
    learning_rate: float  # η. The flow at time t is gradient descent of rate η after t steps, up to terms of order η λ.
    residuals: FloatArray = field(repr=False)  # `f_t - Y` on the train samples, shape (T, n, c)
    coefficients: FloatArray = field(repr=False)  # `K^-1 (I - exp(-η t K)) (Y - f_0)`, shape (T, n, c)
    losses: FloatArray = field(repr=False)  # `½ |f_t - Y|²` of each output, shape (T, c)
    # Bounds of `|residuals - exact| / |Y - f_0|`, the largest over outputs, shape (T,). `K @ coefficients` is right
    # to twice that.
    errors: FloatArray
    storage_errors: FloatArray  # the same, from rounding to the storage dtype, to first order; not in `errors`
    # `|K coefficients + (f_0 - Y) - residuals| / |Y - f_0|` by products with K at the last finite time and at
    # infinity, the larger of both: zero for exact functions
    defect: float
    statuses: tuple[Status, ...]  # status at each time
    largest_eigenvalue: float  # the largest Ritz value
    num_steps: int  # block Lanczos steps
    dimension: int  # dimension of the Krylov space

    def predict(self, cross: ArrayLike, initial_outputs: ArrayLike | None = None) -> FloatArray:
        """Functions on other samples at all times, shape (T, m, c): ``f_0 + K_cross @ coefficients``."""
        block = as_real("the cross kernel", cross.test_train if isinstance(cross, KernelSet) else cross)
        if block.ndim != 2 or block.shape[1] != self.coefficients.shape[1]:
            raise ConfigError(f"a cross kernel of shape {block.shape}; needed (m, {self.coefficients.shape[1]})")
        require_bounded("the cross kernel", block)
        found = np.stack([block @ at_time for at_time in self.coefficients]).astype(np.float64, copy=False)
        if initial_outputs is None:
            return found
        return np.asarray(found + initial_matrix(initial_outputs, found.shape[1:]))

    def _rows(self) -> TableRows:
        reached = [
            (f"t = {time:.4g}", f"loss {np.sum(loss):.4g}, error {error:.1e} ({status})")
            for time, loss, error, status in zip(self.times, self.losses, self.errors, self.statuses, strict=True)
        ]
        return [
            ("learning rate", f"{self.learning_rate:.6g} (largest eigenvalue {self.largest_eigenvalue:.6g})"),
            *reached,
            ("defect", f"{self.defect:.1e}, by products with K"),
            ("Krylov space", f"{self.num_steps} steps, {self.dimension} dimensions"),
        ]


@recorded()
@single_threaded_blas()
def dynamics(
    matrix: Any,
    targets: ArrayLike,
    *,
    times: Sequence[float] | NDArray[Any],
    learning_rate: float | None = None,
    initial_outputs: ArrayLike | None = None,
    task: Task = "auto",
    tol: float = 1e-6,
    max_passes: int = 500,
    memory_limit: MemoryLimit = None,
    seed: int = 0,
    monitor: Monitor = ignore,
    checkpoint: Checkpoint | None = None,
) -> Dynamics:
    """Training by gradient flow with a fixed kernel, ``df/dt = -η K (f - Y)``, without eigenvectors.

    The loss is ``½ |f - Y|²``, summed over samples and outputs: no 1/n. For the mean, give ``learning_rate = η / n``.
    All times come from one block Krylov space of ``Y - f_0``, one pass a step. Passes grow like ``sqrt(η t λ_max)`` at
    worst; one more checks the result, and one measures the storage floor if that is not known.

    Parameters
    ----------
    matrix
        K, positive semi-definite: what :func:`ntkpipe.as_operator` takes.
    targets
        Y, shape (n, c) or (n,). Integers, booleans and strings of shape (n,) are labels of classes, which become
        one-hot columns. Where each sample has as many rows as outputs, as in a full NTK, Y may have the shape
        (samples, outputs), or be labels of samples; functions have the shape (n,) then.
    times
        t ≥ 0, in steps of gradient descent; ``math.inf`` is the limit, a ridgeless regression.
    learning_rate
        η > 0; default one over the largest eigenvalue, for which a random vector joins the first passes.
    initial_outputs
        f_0, of the shape of ``targets``, or of the columns that labels become; default zero.
    tol
        Largest error at each time, relative to ``|Y - f_0|`` of each output.
    max_passes
        Most steps.
    memory_limit
        Bytes that this process may use; default what it uses already and half of what is free. The vectors of the
        space, ``steps * c * n`` float64, and the results, ``2 T c n``, dominate.
    seed
        Seed of the random vector.
    checkpoint
        Where steps are written, 8 c n bytes each; a call goes on from them, also with a higher ``max_passes``.

    Notes
    -----
    Functions are ``V f(T) V'`` of the block Lanczos process with full reorthogonalisation (Saad 1992; Hochbruck and
    Lubich 1997). Formulas of the flow: Jacot, Gabriel and Hongler (2018), Lee et al. (2019), with the loss above.
    Errors are bounds; estimates from the last coefficient are unsafe where η t is large. The Krylov function u follows
    ``u' + η K u = η d(t)`` with a known defect d, so its error is at most ``η ∫ |d(s)| ds`` up to t, since
    ``|exp(-η s K)| ≤ 1``. The integral is taken numerically over all earlier times, and a term for rounding in float64
    is added. At infinity the error is the residual of ``K a = Y - f_0``. Ritz values within rounding of zero, or below
    the storage floor, count as zero there: the limit is that of the pseudo-inverse, and the status says so if targets
    have a part there.
    """
    operator: Operator = matrix
    before = operator.work
    encoded, columns, shape = as_targets(targets, operator, task)
    if initial_outputs is not None:
        columns = columns - _initial(initial_outputs, np.shape(targets), encoded, operator.num_rows)
    try:
        wanted = np.array(times, np.float64)
    except (TypeError, ValueError, OverflowError):
        wanted = np.zeros(0)
    if wanted.ndim != 1 or not len(wanted) or not (wanted >= 0).all():
        raise ConfigError(f"times={times!r}; needed one or more numbers of at least 0, math.inf among them if wanted")
    check_number("tol", tol, low=1e-14, high=1.0)
    check_number("max_passes", max_passes, low=1)
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise ConfigError(f"learning_rate={learning_rate!r}; needed a positive number")
    require_bounded("times", np.where(np.isinf(wanted), 0.0, wanted))
    require_bounded("learning_rate", np.array([learning_rate or 1.0]))
    most = steps_that_fit(operator.num_rows, columns.shape[1] + 1, max_passes, Budget.of(memory_limit))
    training = _Training(operator, columns, wanted, learning_rate, tol, most, seed)
    of_rate = seed if learning_rate is None else None
    training.run(before, monitor, checkpoint, function="dynamics", start=digest_of(columns), seed=of_rate)
    flow, space, shape = training.flow(), training.space, (len(wanted), *shape)
    functions, coefficients, errors, defect = training.functions(flow)
    statuses, status, message = training.judge(flow, errors, "memory_limit" if most < max_passes else "max_passes")
    return Dynamics(
        status=status,
        message=message,
        times=wanted,
        learning_rate=training.rate,
        residuals=functions.reshape(shape),
        coefficients=coefficients.reshape(shape),
        losses=0.5 * np.einsum("tnc,tnc->tc", functions, functions).reshape(len(wanted), *shape[2:]),
        errors=errors,
        storage_errors=np.minimum(flow.sensitivities(operator.storage_floor()), 1.0),
        defect=defect,
        statuses=statuses,
        largest_eigenvalue=max(flow.largest, training.top.value),
        num_steps=space.num_steps,
        dimension=space.dimension,
        **encoded.fields,
    )


class _Flow:
    """Functions of T and what is known of their errors, for targets whose columns have unit size."""

    def __init__(self, space: BlockLanczos, times: FloatArray, learning_rate: float, floor: float) -> None:
        values, self._vectors = np.linalg.eigh(space.matrix())
        self.lowest = float(values.min(initial=0.0))
        self.largest = float(values.max(initial=0.0))
        self._floor = floor
        # Between -floor and zero there is rounding only, and nothing must grow from it.
        self._values = np.where((values < 0) & (values >= -floor), 0.0, values)
        self._is_null = np.abs(values) <= floor
        self._start = self._vectors[: space.start.shape[0]].T @ space.start
        width = space.coupling.shape[1] if space.num_steps else 0
        self._exit = space.coupling @ self._vectors[len(values) - width :] if width else np.zeros((0, len(values)))
        # Products of no dimensions: times are of no account, and infinity is not multiplied with zero.
        self._scaled = times * learning_rate
        self.errors = self._bounds()

    def functions(self) -> list[tuple[FloatArray, FloatArray]]:
        """For each time: coefficients in the space of ``exp(-η t K)`` and ``K^-1 (I - exp(-η t K))`` of the targets."""
        found = []
        # Where negative eigenvalues let functions grow beyond all numbers, they are no numbers; the status says why.
        with np.errstate(over="ignore", invalid="ignore"):
            for scaled in self._scaled:
                decay = self._is_null.astype(float) if math.isinf(scaled) else np.exp(-scaled * self._values)
                parts = (decay[:, None] * self._start, self._phi(scaled)[:, None] * self._start)
                found.append((self._vectors @ parts[0], self._vectors @ parts[1]))
        return found

    def _phi(self, scaled: float) -> FloatArray:
        """``(1 - exp(-s λ)) / λ``, which is s where λ is zero, and the pseudo-inverse where s is infinite."""
        is_limit = math.isinf(scaled)
        is_zero = self._is_null if is_limit else self._values == 0
        safe = np.where(is_zero, 1.0, self._values)
        grown: FloatArray = 1.0 / safe if is_limit else -np.expm1(-scaled * safe) / safe
        grown[is_zero] = 0.0 if is_limit else scaled
        return np.asarray(grown)

    def _bounds(self) -> FloatArray:
        """Largest bound over columns, for each time."""
        found = np.zeros(len(self._scaled))
        is_finite = np.isfinite(self._scaled)
        if not len(self._values):
            return found
        if is_finite.any():
            found[is_finite] = self._integrals(self._scaled[is_finite])
        if not is_finite.all():
            left = self._exit @ (self._phi(math.inf)[:, None] * self._start)
            found[~is_finite] = np.linalg.norm(left, axis=0).max(initial=0.0)
        return found + 32 * _EPS + np.where(is_finite, 4 * _EPS * self.sensitivities(self.largest), 0.0)

    def _integrals(self, scaled: FloatArray) -> FloatArray:
        """``∫ |d(s)| ds`` up to each time, by the trapezoidal rule in log s; infinite where numbers end."""
        last = max(float(scaled.max()), 1e-3 / self.largest if self.largest > 0 else 1e-3)
        first = min(1e-3 / self.largest if self.largest > 0 else last, last)
        count = 2 + int(_PER_DECADE * math.log10(max(last / first, 1.0)))
        points = np.unique(np.concatenate([np.geomspace(first, last, count), scaled[scaled > first]]))
        with np.errstate(over="ignore", invalid="ignore"):
            defects = np.stack([self._defect(point) for point in points])
            heights = defects * points[:, None]
            pieces = np.diff(np.log(points))[:, None] * (heights[1:] + heights[:-1]) / 2
            sums = np.concatenate([np.zeros((1, pieces.shape[1])), np.cumsum(pieces, axis=0)])
            sums += np.maximum(self._defect(0.0), defects[0]) * first
            worst = np.nan_to_num(sums.max(axis=1), nan=math.inf)
            found = np.where(scaled <= first, worst[0] * scaled / first, worst[np.searchsorted(points, scaled)])
            found = found * np.exp(scaled * max(0.0, -self.lowest - self._floor))
        return np.asarray(np.nan_to_num(found, nan=math.inf, posinf=math.inf))

    def _defect(self, scaled: float) -> FloatArray:
        """``|d|`` of each column."""
        left = self._exit @ (np.exp(-scaled * self._values)[:, None] * self._start)
        return np.asarray(np.linalg.norm(left, axis=0))

    def sensitivities(self, perturbation: float) -> FloatArray:
        """What a change of K of this spectral norm does to ``exp(-η t K)``, to first order; shape (T,)."""
        lowest = max(self.lowest, 0.0)
        finite = np.where(np.isinf(self._scaled), 0.0, self._scaled)
        limit = perturbation / lowest if lowest > 0 else math.inf
        return np.where(np.isinf(self._scaled), limit, finite * perturbation * np.exp(-finite * lowest))

    def growth(self, index: int) -> float:
        """Share of a column that grows, since eigenvalues are negative below the storage floor."""
        grows = self._values < 0
        scaled = min(float(self._scaled[index]), 1e300)
        with np.errstate(over="ignore"):
            grown = np.expm1(np.minimum(-scaled * self._values[grows], 300.0))[:, None] * self._start[grows]
        return float(np.linalg.norm(grown, axis=0).max(initial=0.0))

    @property
    def null_share(self) -> float:
        """Share of a column where eigenvalues are not known from zero."""
        return float(np.linalg.norm(self._start[self._is_null], axis=0).max(initial=0.0))

    def status(self, index: int, tol: float) -> Status | None:
        """Status at one time, where more steps would change nothing."""
        is_open = math.isinf(self._scaled[index]) and self.null_share > tol
        return "indefinite at storage precision" if is_open or self.growth(index) > tol else None


class _Training(Stepping):
    """Krylov space of the scaled columns ``Y - f_0``, and the largest eigenvalue where no learning rate is given."""

    def __init__(
        self,
        operator: Operator,
        columns: FloatArray,
        times: FloatArray,
        learning_rate: float | None,
        tol: float,
        max_steps: int,
        seed: int,
    ) -> None:
        super().__init__(operator, tol)
        self._times, self._given = times, learning_rate
        self._sizes = np.linalg.norm(columns, axis=0)
        self._units = columns / np.where(self._sizes > 0, self._sizes, 1.0)
        self._floor = max(operator.storage_floor(), 8 * _EPS * operator.frobenius())
        self.space = BlockLanczos(self._units, max_steps)
        self.top = TopEigenvalue(operator.num_rows, seed)  # takes steps where no learning rate is given
        self.spaces = {"targets": self.space, "top": self.top}
        self._error = math.inf

    @property
    def rate(self) -> float:
        if self._given:
            return self._given
        if self.top.value <= 0:
            raise ConfigError("the matrix has no positive eigenvalue, so no learning rate follows; give learning_rate")
        return 1.0 / self.top.value

    def judge(self, flow: _Flow, errors: FloatArray, limit: str) -> tuple[tuple[Status, ...], Status, str]:
        """Status at each time, and status and message over all of them."""
        is_cut = self.space.num_steps == self.space.max_steps and not self.space.is_exhausted
        missed: Status = "step limit" if is_cut else "stagnated"
        reached: list[Status] = ["converged" if error <= self._tol else missed for error in errors]
        statuses = tuple(flow.status(index, self._tol) or status for index, status in enumerate(reached))
        worst = int(np.argmax(errors))
        at_worst = f"an error of {errors[worst]:.1e} at t = {self._times[worst]:.4g}"
        if INDEFINITE in statuses:
            index = statuses.index(INDEFINITE)
            why = f"{flow.null_share:.2g} of the targets lie where eigenvalues are not known from zero"
            if flow.growth(index) > self._tol:
                why = f"an eigenvalue is at most {flow.lowest:.3g}, so functions grow"
            return statuses, INDEFINITE, f"at t = {self._times[index]:.4g}: {why}; stop earlier, or add a ridge to K"
        if "stagnated" in statuses:
            why = f"rounding in float64 leaves {at_worst}"
            return statuses, "stagnated", f"{why}; stop earlier, add a ridge to K, or raise tol"
        if "step limit" in statuses:
            return statuses, "step limit", f"{limit} is reached with {at_worst}; raise it"
        return statuses, "converged", f"errors are at most {errors.max(initial=0.0):.1e} at all times"

    def flow(self) -> _Flow:
        return _Flow(self.space, self._times, self.rate, self._floor)

    @property
    def _has_rate(self) -> bool:
        return self._given is not None or self.top.is_settled

    @property
    def _is_last(self) -> bool:
        return self.space.num_steps == self.space.max_steps or self.space.is_exhausted or self._error <= self._tol

    def look(self) -> tuple[float, bool]:
        """Return the largest error, and whether no more steps are needed."""
        steps = self.space.num_steps
        is_limit = steps == self.space.max_steps or self.space.is_exhausted
        if steps and (is_limit or is_due(steps)) and (self._given or self.top.value > 0):
            self._error = float(self.flow().errors.max(initial=0.0))
        return self._error, self._is_last and self._has_rate

    def advance(self) -> None:
        """Take one pass, for the space, the largest eigenvalue, or both."""
        growing: list[BlockLanczos | TopEigenvalue] = [] if self._is_last else [self.space]
        if not self._has_rate:
            growing.append(self.top)
        blocks = [space.block for space in growing]
        product = self._operator.matmat(np.concatenate(blocks, axis=1))
        ends = np.cumsum([block.shape[1] for block in blocks])
        for space, part in zip(growing, np.split(product, ends[:-1], axis=1), strict=True):
            space.absorb(np.ascontiguousarray(part))

    def functions(self, flow: _Flow) -> tuple[FloatArray, FloatArray, FloatArray, float]:
        """Residuals and coefficients at all times, their errors, and the defect; one pass."""
        shape = (len(self._times), *self._units.shape)
        functions, coefficients = np.empty(shape), np.empty(shape)
        with np.errstate(over="ignore", invalid="ignore"):
            for index, (decayed, grown) in enumerate(flow.functions()):
                functions[index], coefficients[index] = self.space.combine(decayed), self.space.combine(grown)
        errors, defect = self._verify(functions, coefficients, flow.errors)
        functions *= -self._sizes
        coefficients *= self._sizes
        return functions, coefficients, errors, defect

    def _verify(self, functions: FloatArray, coefficients: FloatArray, errors: FloatArray) -> tuple[FloatArray, float]:
        """Errors with the true residual at infinity, and the defect; one pass for infinity and the last finite time."""
        units, times = self._units, self._times
        ends = times[np.isfinite(times)].max(initial=-1.0), math.inf
        checked = [index for end in ends for index in np.flatnonzero(times == end)[:1]]
        checked = [index for index in checked if np.isfinite(coefficients[index]).all()]
        if not checked or not units.any():
            return errors, math.inf if units.any() else 0.0
        products = self._operator.matmat(np.concatenate([coefficients[index] for index in checked], axis=1))
        found, defect = errors.copy(), 0.0
        for index, product in zip(checked, np.split(products, len(checked), axis=1), strict=True):
            size = float(np.linalg.norm(product + functions[index] - units, axis=0).max())
            defect = max(defect, size)
            same = times == times[index]
            found[same] = np.maximum(found[same], size if math.isinf(times[index]) else size / 2)
        return found, defect


def _initial(initial_outputs: ArrayLike, shape: tuple[int, ...], encoded: Targets, num_rows: int) -> FloatArray:
    """Columns of f_0, which has the shape of the targets, or of the columns that labels became."""
    needed = (len(encoded.matrix),) if encoded.is_flat else encoded.matrix.shape
    values = as_real("initial_outputs", initial_outputs)
    if values.shape not in {needed, shape if encoded.classes is None else needed}:
        raise ConfigError(f"initial_outputs of shape {values.shape}; needed {needed}, as targets have")
    block = as_block("initial_outputs", values, len(encoded.matrix))
    return require_bounded("initial_outputs", block).reshape(num_rows, -1)
