"""Functions of gradient flow in a Krylov space, with bounds of their errors."""

import math

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.solvers.result import Status
from ntkpipe.solvers.spectral.krylov import BlockLanczos

_EPS = float(np.finfo(np.float64).eps)
_PER_DECADE = 24  # points of a decade of time at which the defect is computed


class Flow:
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
