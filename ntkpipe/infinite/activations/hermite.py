"""Any activation, by its Hermite series with a bound on what is left out, and elsewhere by quadrature."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.given import as_real
from ntkpipe.infinite.activations import plane, rules
from ntkpipe.infinite.activations.dual import RAISED, TINY, Dual
from ntkpipe.infinite.state import Kept, State

Function: TypeAlias = Callable[[Any], Any]

TERMS = 128
_STEP = 0.02  # of the trapezoidal rule; with kinks, panels are 22 times as wide
_HALVINGS = 4
_AGREES = LEAST_TOLERANCE = 1e-14  # relative difference of a rule and the next finer one
_STEIN = 1e-10
_SETTLED = 2e-15  # of a rule that the plane may use
# Of E σ² − Σ a², relative to E σ²: rounding of sums of 1,409 terms in pairs, and of 128 squares.
_ROUNDING = 256 * 2.0**-52


@cache
def _weighted(step: float) -> FloatArray:
    nodes, weights = rules.trapezoid(step)
    return rules.hermite(nodes, TERMS) * weights


@dataclass(frozen=True, eq=False)
class Series(Dual):
    """E[σ(u)σ(v)] = Σ a_k(p) a_k(q) c^k, a_k(p) = E[σ(√p x) h_k(x)] (Han et al. 2022, arXiv 2209.04121).

    What is left out behind K terms is at most t(p) t(q) |c|^K, t² = E σ² − Σ a². Where that is above the tolerance,
    which is relative to √(E σ(u)² E σ(v)²), pairs are integrated in the plane.
    """

    operations = 6.0 * TERMS
    name: str
    function: Function
    derivative: Function
    kinks: tuple[float, ...]
    tolerance: float

    def keep(self, p: FloatArray, gain: float) -> Kept:
        """Of each variance: p, 1 / √p, the step of the plane; E σ², t, coefficients; the same three of σ'."""
        values, places = np.unique(p, return_inverse=True)
        parts = zip(*map(self._row, values.tolist()), strict=True)
        return tuple(np.array(part)[places.reshape(p.shape)] for part in parts)

    def _row(self, p: float) -> tuple[Any, ...]:
        nodes, weights, weighted, step = self._rule(p)
        raised = math.sqrt(RAISED if self.kinks else 1.0)
        kept: list[Any] = [p, raised / math.sqrt(p) if p > TINY else 0.0, step]
        for function in (self.function, self.derivative):
            values = self._values(function, math.sqrt(p) * nodes)
            coefficients = (weighted * values).sum(axis=1)
            square = float((values * values * weights).sum())
            rest = max(square - float((coefficients * coefficients).sum()), 0.0)
            kept += [square, math.sqrt(rest + _ROUNDING * square), coefficients]
        # E[x σ(√p x)] = √p E[σ'(√p x)] (Stein), but for what a jump adds.
        gap = abs(kept[5][1] - math.sqrt(p) * kept[8][0])
        if gap > _STEIN * (math.sqrt(kept[3]) + math.sqrt(p * kept[6])):
            raise ConfigError(
                f"activation {self.name!r} at variance {p:.3g}: E[x f(√p x)] and √p E[df(√p x)] differ by {gap:.2g}; "
                "either has kinks that kinks= does not name, or the second is not the derivative of the first, or the "
                "first jumps, and then has no tangent kernel"
            )
        return tuple(kept)

    def _rule(self, p: float) -> tuple[FloatArray, FloatArray, FloatArray, float]:
        """Nodes, weights, weights times polynomials, and the coarsest step for the plane; the finest that is needed."""
        for halvings in range(_HALVINGS + 1):
            step = _STEP / 2**halvings
            gaps = self._gaps(p, step)
            if gaps[0] <= _AGREES and self.kinks:
                nodes, weights = self._panels(p, step)
                return nodes, weights, rules.hermite(nodes, TERMS) * weights, step
            if gaps[0] <= _AGREES:
                coarse = step * 2 ** (next((at for at, gap in enumerate(gaps) if gap > _SETTLED), len(gaps)))
                return *rules.trapezoid(step), _weighted(step), coarse
        advice = (
            "other kinks, or jumps, are missing in kinks="
            if self.kinks
            else "if it or its derivative has kinks, declare where, kinks=(0.0,)"
        )
        raise ConfigError(
            f"activation {self.name!r} at variance {p:.3g}: integrals do not converge to {_AGREES:g} (rules differ by "
            f"{gaps[0]:.1e}); {advice}; if it is steep for such a variance, give smaller W_std, b_std or inputs"
        )

    def _gaps(self, p: float, step: float) -> list[float]:
        """Relative differences of E σ² and E σ'², the larger one, between this rule and coarser ones."""
        found = []
        for function in (self.function, self.derivative):
            if self.kinks:
                finer, coarser = (self._square(function, p, *self._panels(p, width)) for width in (step, 2 * step))
                sums = [finer, coarser]
            else:
                nodes, weights = rules.trapezoid(step)
                terms = self._values(function, math.sqrt(p) * nodes) ** 2 * weights
                sums = [float(terms[:: 2**at].sum()) * 2**at for at in range(6)]
            found.append([abs(other - sums[0]) / max(sums[0], 1e-300) for other in sums[1:]])
        return [max(pair) for pair in zip(*found, strict=True)]

    def _square(self, function: Function, p: float, nodes: FloatArray, weights: FloatArray) -> float:
        return float((self._values(function, math.sqrt(p) * nodes) ** 2 * weights).sum())

    def _panels(self, p: float, step: float) -> tuple[FloatArray, FloatArray]:
        cuts = np.array(self.kinks) / math.sqrt(p) if p > 0.0 else np.zeros(0)
        return rules.panels(rules.cut(22 * step, cuts))

    def _values(self, function: Function, at: FloatArray) -> FloatArray:
        try:
            found = function(at)
        except Exception as error:
            raise ConfigError(
                f"activation {self.name!r} raised {type(error).__name__} for an array: {error}"
            ) from error
        values = as_real(f"activation {self.name!r}", found).astype(np.float64)
        if values.shape != at.shape or not np.isfinite(values).all():
            raise ConfigError(
                f"activation {self.name!r}, or its derivative, of an array {at.shape} gives {values.shape}, or numbers "
                f"that are not finite, between {at.min():.3g} and {at.max():.3g}; needed a finite number for each"
            )
        return values

    def apply(self, state: State, left: Kept, right: Kept, gain: float) -> None:
        """See :meth:`Dual.apply`."""
        spread = [state.spread(rows, columns) for rows, columns in zip(left, right, strict=True)]
        variances, inverse, steps, squares, rests, terms, slope_squares, slope_rests, slope_terms = spread
        value, slope, cosine, size, other = state.scratch(5)
        np.multiply(*inverse, out=cosine)
        cosine *= state.s
        np.clip(cosine, -1.0, 1.0, out=cosine)
        _horner(*terms, cosine, value, other)
        _horner(*slope_terms, cosine, slope, other)
        # A sample with itself, or with a copy, has the variance that was kept of it, to the last bit.
        same = (state.s == variances[0]) & (state.s == variances[1])
        np.copyto(value, squares[0], where=same)
        np.copyto(slope, slope_squares[0], where=same)
        powers(cosine, size)
        missed = np.zeros(same.shape, bool)
        for square, rest in ((squares, rests), (slope_squares, slope_rests)):
            bound = np.multiply(*rest, out=other)
            bound *= size  # on what the series leaves out
            missed |= bound > self.tolerance * np.sqrt(np.multiply(*square))
        for at in zip(*np.nonzero(missed & ~same), strict=True):
            p, q = (float(np.broadcast_to(each, same.shape)[at]) for each in variances)
            step = min(float(np.broadcast_to(each, same.shape)[at]) for each in steps)
            value[at], slope[at] = self.in_plane(p, q, float(cosine[at]), step)
        np.multiply(value, gain, out=state.s)
        slope *= gain
        state.theta *= slope

    def in_plane(self, p: float, q: float, cosine: float, step: float) -> list[float]:
        """V and V̇ by quadrature."""
        small, large = min(p, q), max(p, q)  # so that (x, x') has the bits of (x', x)
        functions = (self.function, self.derivative)
        if self.kinks:
            return plane.kinked(functions, self.kinks, small, large, cosine)
        return plane.smooth(functions, small, large, cosine, step)

    def slow(self, s: float, p: float, q: float) -> tuple[float, float]:
        """By quadrature."""
        scale = math.sqrt(p) * math.sqrt(q) if min(p, q) > TINY else 0.0
        steps = [self._rule(each)[3] for each in (p, q)]
        cosine = s / scale * (RAISED if self.kinks else 1.0) if scale else 0.0
        value, slope = self.in_plane(p, q, min(max(cosine, -1.0), 1.0), min(steps) / 2)
        return value, slope


def powers(c: FloatArray, out: FloatArray) -> None:
    """|c|^TERMS."""
    np.abs(c, out=out)
    for _ in range(TERMS.bit_length() - 1):
        out *= out


def _horner(left: FloatArray, right: FloatArray, c: FloatArray, out: FloatArray, other: FloatArray) -> None:
    """Σ left_k right_k c^k, entry by entry; coefficients are along the last axis."""
    columns = np.ascontiguousarray(np.moveaxis(right, -1, 0))
    np.multiply(left[..., -1], columns[-1], out=out)
    for k in range(TERMS - 2, -1, -1):
        out *= c
        out += np.multiply(left[..., k], columns[k], out=other)
