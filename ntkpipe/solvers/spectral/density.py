"""Spectral densities by stochastic Lanczos quadrature, with exact eigenvalues spliced in."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.blas import single_threaded_blas
from ntkpipe.base.config import Budget, MemoryLimit, check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator, digest_of
from ntkpipe.base.tables import TableRows
from ntkpipe.solvers.eigenpairs import Eigenpairs, pairs_of
from ntkpipe.solvers.probe_lanczos import QuadratureRule, gauss_rule
from ntkpipe.solvers.result import Monitor, Result, Status, ignore, recorded
from ntkpipe.solvers.spectral.krylov import Sampler, Sampling
from ntkpipe.store.results import Checkpoint

_NUM_THRESHOLDS = 64  # from the floor to the largest eigenvalue: there counts must have settled
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Counts:
    """Numbers of eigenvalues above thresholds; arrays have one entry per threshold."""

    thresholds: FloatArray  # λ
    values: FloatArray  # estimates of N(λ)
    standard_errors: FloatArray  # Monte-Carlo errors: one standard deviation of the mean over probes
    truncation_errors: FloatArray  # most that more steps with the same probes could change


@dataclass(frozen=True, kw_only=True)
class Density(Result):
    """The distribution of eigenvalues."""

    eigenvalues: FloatArray  # exact eigenvalues that were spliced in, shape (k,), descending
    # nodes, weights: Gauss rules of the probes for the rest, shape (p, m): a node stands for `weight` eigenvalues
    nodes: FloatArray = field(repr=False)
    weights: FloatArray = field(repr=False)
    node_residuals: FloatArray = field(repr=False)  # an eigenvalue lies so near to each node, shape (p, m)
    num_rows: int  # n
    num_steps: int  # m
    floor: float  # smaller eigenvalues cannot be told from zero: the storage floor, or rounding of products
    resolved_above: float  # counts above this λ are as accurate as `tol` asks for; the floor if all are

    def count_above(self, thresholds: ArrayLike) -> Counts:
        """Numbers of eigenvalues above thresholds, with their errors."""
        rule = QuadratureRule(self.nodes, self.weights, self.node_residuals)
        return _count(rule, self.eigenvalues, self.num_rows, np.asarray(thresholds, np.float64).reshape(-1))

    def smooth(self, *, num_points: int = 200, width: float = 0.1) -> tuple[FloatArray, FloatArray]:
        """Eigenvalues per decade on a logarithmic grid, for plots: ``(λ, density)``, each of shape (num_points,).

        Nodes become Gaussian bells in log10 λ whose area is the number of eigenvalues; nodes below the floor are left
        out.
        """
        values = np.concatenate([self.eigenvalues, self.nodes.reshape(-1)])
        weights = np.concatenate([np.ones(len(self.eigenvalues)), self.weights.reshape(-1) / len(self.nodes)])
        return smoothed(values, weights, self.floor, num_points=num_points, width=width)

    def _rows(self) -> TableRows:
        largest = max(self.nodes.max(initial=0.0), self.eigenvalues.max(initial=0.0))
        levels = [level for level in largest * 10.0 ** -np.arange(1, 8) if level > self.floor]
        below = float((self.weights * (self.nodes < -self.floor)).sum() / len(self.weights))
        below += int((self.eigenvalues < -self.floor).sum())
        counts = self.count_above([*levels, self.floor])
        shown = zip(counts.thresholds, counts.values, counts.standard_errors, counts.truncation_errors, strict=True)
        return [
            ("rows", f"{self.num_rows:,}, {len(self.eigenvalues)} exact eigenvalues"),
            ("largest", f"{largest:.6g}"),
            *(
                (f"above {level:.2e}", f"{value:.6g} ± {error:.2g} (Monte Carlo) ± {truncation:.2g} (truncation)")
                for level, value, error, truncation in shown
            ),
            ("floor", f"{self.floor:.2e}; below minus that {below:.6g}"),
            ("probes", f"{len(self.nodes)}, of {self.num_steps} steps"),
        ]


def smoothed(
    values: FloatArray, weights: FloatArray, floor: float, *, num_points: int, width: float
) -> tuple[FloatArray, FloatArray]:
    """Density per decade of weighted eigenvalues, ``(λ, density)``; see :meth:`Density.smooth`."""
    check_number("num_points", num_points, low=2)
    check_number("width", width, low=1e-3, high=10.0)
    kept = (values > floor) & (weights > 0)
    if not kept.any():
        return np.geomspace(0.1, 10.0, num_points), np.zeros(num_points)
    places, weights = np.log10(values[kept]), weights[kept]
    grid = np.linspace(places.min() - 4 * width, places.max() + 4 * width, num_points)
    found = np.zeros(num_points)
    for place, weight in zip(places, weights, strict=True):
        found += weight * np.exp(-0.5 * ((grid - place) / width) ** 2)
    return 10.0**grid, found / (width * math.sqrt(2 * math.pi))


@recorded()
@single_threaded_blas()
def density(
    matrix: Any,
    *,
    num_probes: int = 16,
    num_steps: int | None = None,
    top: Eigenpairs | None = None,
    tol: float = 0.05,
    max_passes: int = 100,
    memory_limit: MemoryLimit = None,
    seed: int = 0,
    monitor: Monitor = ignore,
    checkpoint: Checkpoint | None = None,
) -> Density:
    """The spectral density of K by stochastic Lanczos quadrature: how many eigenvalues lie where.

    One pass a step for all probes, and one for the Frobenius norm if that is not known. The Lanczos vectors,
    ``steps * p * n`` float64, dominate memory.

    Parameters
    ----------
    num_steps
        Lanczos steps; default as many as ``tol`` needs.
    top
        Exact eigenpairs, preferably the largest: they are counted as such, and probes are orthogonal to them.
    tol
        Largest error of a count that is called converged, Monte-Carlo plus truncation error, as a fraction of n.
    max_passes
        Most Lanczos steps where ``num_steps`` is not given.
    checkpoint
        Where each step is written, 8 p n bytes, so that another call goes on from the last one, also with a higher
        ``max_passes``. The caller clears it.

    Notes
    -----
    Ubaru, Chen and Saad (2017), algorithm 1, with Rademacher probes and full reorthogonalisation of each. We depart in
    what a count is: the middle of what the Gauss rule of a probe allows, by the separation theorem of Chebyshev, Markov
    and Stieltjes; half of that range is the truncation error. A small change from half as many steps, the usual sign,
    is unsafe: below the smallest node it is zero, where counts may be wrong by half of n. The standard error is at
    least that of a projector with Rademacher probes, ``2 N (n - N) / (n p)`` squared. Where pairs are spliced in,
    probes are scaled to the number of the others, which is known, with a negligible bias of order ``1 / n``.
    """
    operator: Operator = matrix
    before, n = operator.work, operator.num_rows
    options = Sampling(num_probes, num_steps, tol, max_passes, seed, Budget.of(memory_limit))
    values, vectors = _exact_pairs(top, n)
    counting = _Counting(operator, options, values, vectors)
    spliced = None if vectors is None else digest_of(vectors)
    counting.run(before, monitor, checkpoint, function="density", probes=num_probes, seed=seed, top=spliced)
    is_exhausted = bool(counting.lanczos.ended.all())
    status, message, resolved = _judge(counting.counts, n, tol, counting.limit, is_exhausted=is_exhausted)
    return Density(
        status=status,
        message=message,
        options={"top": len(values)},
        eigenvalues=values,
        nodes=counting.rule.nodes,
        weights=counting.rule.weights,
        node_residuals=counting.rule.residuals,
        num_rows=n,
        num_steps=counting.lanczos.num_steps,
        floor=counting.floor,
        resolved_above=resolved,
    )


class _Counting(Sampler):
    """Counts of eigenvalues from the Lanczos steps taken, with exact ones spliced in."""

    counts: Counts  # from the first look on

    def __init__(self, operator: Operator, options: Sampling, values: FloatArray, vectors: FloatArray | None) -> None:
        super().__init__(operator, options, vectors)
        self._values = values
        self._masses = np.where(self.lanczos.squared_norms > 0, operator.num_rows - len(values), 0.0)
        self.floor = max(operator.storage_floor(), 64 * _EPS * operator.frobenius())
        self._largest = max(self.floor, float(values.max(initial=0.0)))
        self.rule = QuadratureRule(*np.zeros((3, options.num_probes, 1)))

    def _estimate(self, steps: int) -> tuple[float, bool]:
        n = self._operator.num_rows
        if steps:
            self.rule = gauss_rule(*self.lanczos.coefficients(steps), self._masses)
        end = max(self._largest, float(self.rule.nodes.max(initial=0.0)), self.floor)
        thresholds = np.geomspace(self.floor, end, _NUM_THRESHOLDS) if self.floor > 0 else np.zeros(1)
        self.counts = _count(self.rule, self._values, n, thresholds)
        monte_carlo, truncation = self.counts.standard_errors, self.counts.truncation_errors
        worst = float((monte_carlo + truncation).max()) / n
        is_enough = worst <= self._tol or bool((truncation <= monte_carlo / 4).all())
        return worst, is_enough and self._is_open


def _count(rule: QuadratureRule, exact: FloatArray, num_rows: int, thresholds: FloatArray) -> Counts:
    found = rule.mass_above(thresholds)
    above, below = rule.unsettled(thresholds)
    found += (below - above) / 2
    num_probes, rest = len(found), num_rows - len(exact)
    values = found.mean(axis=0)
    inside = np.clip(values, 0.0, rest)
    variances = np.maximum(found.var(axis=0, ddof=1), 2 * inside * (rest - inside) / max(rest, 1))
    return Counts(
        thresholds=thresholds,
        values=values + (exact[:, None] > thresholds).sum(axis=0),
        standard_errors=np.sqrt(variances / num_probes),
        truncation_errors=((above + below) / 2).mean(axis=0),
    )


def _judge(counts: Counts, num_rows: int, tol: float, limit: str, *, is_exhausted: bool) -> tuple[Status, str, float]:
    """Status, message, and the λ from which counts are accurate enough."""
    errors = (counts.standard_errors + counts.truncation_errors) / num_rows
    if is_exhausted and len(errors) > 1:
        errors[-1] = 0.0  # at the largest eigenvalue, which is known then: rounding decides whether it is above itself
    bad = np.flatnonzero(errors > tol)
    if not len(bad):
        said = f"counts are right to {errors.max():.2g} n, one standard error and truncation together"
        return "converged", said, float(counts.thresholds[0])
    last = int(bad[-1])
    resolved = float(counts.thresholds[last + 1]) if last + 1 < len(errors) else math.inf
    where = f"counts are right to {tol:.2g} n above λ = {resolved:.3g} only"
    if counts.truncation_errors[bad].max() > tol * num_rows / 2:
        return "step limit", f"{where}: {limit} ended it; give more steps", resolved
    return "not converged", f"{where}: the Monte-Carlo error is too large; give more probes", resolved


def _exact_pairs(top: Eigenpairs | None, num_rows: int) -> tuple[FloatArray, FloatArray | None]:
    """Check eigenpairs; values are returned in descending order."""
    if top is None:
        return np.zeros(0), None
    values, vectors = pairs_of("top", top, num_rows)
    gap = float(np.abs(vectors.T @ vectors - np.eye(len(values))).max(initial=0.0))
    if not gap <= 1e-8:
        raise ConfigError(f"eigenvectors of top are orthonormal to {gap:.2g} only; needed 1e-8")
    return np.sort(values)[::-1], vectors
