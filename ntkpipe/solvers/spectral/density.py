"""The spectral density without eigenvectors: stochastic Lanczos quadrature, with exact eigenvalues spliced in."""

import math
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import digest_of
from ntkpipe.base.tables import TableRows
from ntkpipe.operators.blas import single_threaded_blas
from ntkpipe.operators.opening import open_for_solver
from ntkpipe.solvers.checkpoint import Journal
from ntkpipe.solvers.result import Monitor, Result, Status, Step, ignore
from ntkpipe.solvers.spectral.krylov import ProbeLanczos, is_due, steps_that_fit
from ntkpipe.solvers.spectral.quadrature import Rule, gauss_rule
from ntkpipe.store.results import Checkpoint

# Thresholds, from the floor to the largest eigenvalue, at which counts must have settled.
_NUM_THRESHOLDS = 64
_EPS = float(np.finfo(np.float64).eps)


class TopPairs(Protocol):
    """Exact eigenpairs to splice in: values of shape (k,), orthonormal vectors of shape (n, k)."""

    @property
    def eigenvalues(self) -> NDArray[np.float64]:
        """Shape (k,)."""

    @property
    def eigenvectors(self) -> NDArray[np.float64]:
        """Shape (n, k)."""


@dataclass(frozen=True)
class Counts:
    """Numbers of eigenvalues above thresholds. Attributes have one entry a threshold."""

    thresholds: NDArray[np.float64]  # λ
    values: NDArray[np.float64]  # estimates of N(λ)
    standard_errors: NDArray[np.float64]  # what other probes would change: one standard deviation of the mean
    truncation_errors: NDArray[np.float64]  # what more steps with the same probes could change at most


@dataclass(frozen=True, kw_only=True)
class Density(Result):
    """The distribution of eigenvalues.

    Attributes
    ----------
    eigenvalues
        Exact ones that were spliced in, shape (k,), descending.
    nodes, weights
        Gauss rules of the probes for the rest, each of shape (p, m): a node stands for ``weight`` eigenvalues.
    node_residuals
        An eigenvalue is so near to a node; shape (p, m).
    num_rows
        n.
    num_steps
        m.
    floor
        Eigenvalues below it are not known from zero: the storage floor, or rounding of products.
    resolved_above
        From here on to larger λ counts are as accurate as ``tol`` asks for; the floor if all are.
    """

    eigenvalues: NDArray[np.float64]
    nodes: NDArray[np.float64] = field(repr=False)
    weights: NDArray[np.float64] = field(repr=False)
    node_residuals: NDArray[np.float64] = field(repr=False)
    num_rows: int
    num_steps: int
    floor: float
    resolved_above: float

    def count_above(self, thresholds: ArrayLike) -> Counts:
        """Numbers of eigenvalues above thresholds, with their errors."""
        wanted = np.asarray(thresholds, np.float64).reshape(-1)
        return _count(Rule(self.nodes, self.weights, self.node_residuals), self.eigenvalues, self.num_rows, wanted)

    def smooth(self, *, num_points: int = 200, width: float = 0.1) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Eigenvalues per decade on a logarithmic grid, for plots: ``(λ, density)``, each of shape (num_points,).

        Nodes become Gaussian bells in log10 λ; their area is the number of eigenvalues. What is below the floor is
        left out.
        """
        values = np.concatenate([self.eigenvalues, self.nodes.reshape(-1)])
        weights = np.concatenate([np.ones(len(self.eigenvalues)), self.weights.reshape(-1) / len(self.nodes)])
        return smoothed(values, weights, self.floor, num_points=num_points, width=width)

    def _below(self) -> float:
        """Eigenvalues under minus the floor, as far as nodes show them."""
        found = (self.weights * (self.nodes < -self.floor)).sum() / len(self.weights)
        return float(found) + int((self.eigenvalues < -self.floor).sum())

    def _rows(self) -> TableRows:
        largest = max(self.nodes.max(initial=0.0), self.eigenvalues.max(initial=0.0))
        levels = [level for level in largest * 10.0 ** -np.arange(1, 8) if level > self.floor]
        counts = self.count_above([*levels, self.floor])
        shown = zip(counts.thresholds, counts.values, counts.standard_errors, counts.truncation_errors, strict=True)
        return [
            ("rows", f"{self.num_rows:,}, {len(self.eigenvalues)} exact eigenvalues"),
            ("largest", f"{largest:.6g}"),
            *(
                (f"above {level:.2e}", f"{value:.6g} ± {error:.2g} (Monte Carlo) ± {truncation:.2g} (truncation)")
                for level, value, error, truncation in shown
            ),
            ("floor", f"{self.floor:.2e}; below minus that {self._below():.6g}"),
            ("probes", f"{len(self.nodes)}, of {self.num_steps} steps"),
        ]


def smoothed(
    values: NDArray[np.float64], weights: NDArray[np.float64], floor: float, *, num_points: int, width: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weighted eigenvalues as a density per decade: ``(λ, density)``; see :meth:`Density.smooth`."""
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


@single_threaded_blas()
def density(
    matrix: Any,
    *,
    num_probes: int = 16,
    num_steps: int | None = None,
    top: TopPairs | None = None,
    tol: float = 0.05,
    max_passes: int = 100,
    memory_limit: int | None = None,
    seed: int = 0,
    monitor: Monitor = ignore,
    checkpoint: Checkpoint | None = None,
) -> Density:
    """The spectral density of K by stochastic Lanczos quadrature: how many eigenvalues lie where.

    One pass a step for all probes, and one for the Frobenius norm if that is not known.

    Parameters
    ----------
    matrix
        K: what :func:`ntkpipe.as_operator` takes.
    num_probes
        Random vectors, p ≥ 2. The Monte-Carlo error falls like ``1 / sqrt(p)``.
    num_steps
        Lanczos steps; as many as ``tol`` needs if none.
    top
        Exact eigenpairs, best the largest: they are counted as such, and probes are kept orthogonal to them.
    tol
        Largest error of a count that is called converged, Monte-Carlo and truncation error together, as a part of n.
    max_passes
        Most steps, if ``num_steps`` is none.
    memory_limit
        Bytes that this process may have with the Lanczos vectors, ``steps * p * n`` float64, which dominate; default
        what it has and half of what is free.
    seed
        Of the probes.
    monitor
        Called after each pass.
    checkpoint
        Where each step is written, 8 p n bytes, so that another call goes on from the last one, also with a higher
        ``max_passes``. The caller clears it.

    Raises
    ------
    ConfigError
        If numbers are out of range, or ``top`` does not fit the matrix or is not orthonormal.
    ResourceError
        If memory does not hold two steps.

    Notes
    -----
    Ubaru, Chen and Saad (2017), algorithm 1, with Rademacher probes and full reorthogonalisation of each. We depart in
    what a count is: the middle of what the Gauss rule of a probe allows, by the separation theorem of Chebyshev, Markov
    and Stieltjes, and half of that range is the truncation error. The usual sign, a small change from half as many
    steps, is unsafe: below the smallest node it is zero, where counts of ill-conditioned matrices are wrong by half
    of n. The standard error is at least that of a projector with Rademacher probes, ``2 N (n - N) / (n p)`` squared,
    since the scatter of few probes says little where counts are small. Where pairs are spliced in, probes are scaled
    to the number of the others, which is known; the bias of that, of order ``1 / n``, is far below all errors.
    """
    begin = perf_counter()
    operator, room = open_for_solver(matrix, memory_limit)
    before, n = operator.work, operator.num_rows
    num_probes = int(check_number("num_probes", num_probes, low=2))
    tol = float(check_number("tol", tol, low=0.0, high=1.0))
    max_passes = int(check_number("max_passes", max_passes, low=1))
    if num_steps is not None:
        num_steps = int(check_number("num_steps", num_steps, low=1))
    values, vectors = _exact_pairs(top, n)
    asked = min(num_steps or max_passes, n)
    most = steps_that_fit(n, num_probes, asked, room)
    probes = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), (n, num_probes))
    lanczos = ProbeLanczos(probes, most, vectors)
    masses = np.where(lanczos.squared_norms > 0, n - len(values), 0.0)
    floor = max(operator.storage_floor(), 64 * _EPS * operator.frobenius())

    decides = {"function": "density", "matrix": operator.identity(), "probes": num_probes, "seed": seed}
    journal = Journal(checkpoint, {**decides, "top": _name_of(vectors)}, {"probes": lanczos})

    rule, counts, worst = Rule(*np.zeros((3, num_probes, 1))), None, math.inf
    largest = max(floor, float(values.max(initial=0.0)))
    is_begun = False
    while True:
        steps = lanczos.num_steps
        is_last = steps == most or bool(lanczos.ended.all())
        settled = False
        if counts is None or is_last or is_due(steps):
            rule = gauss_rule(*lanczos.coefficients(steps), masses) if steps else rule
            counts = _count(rule, values, n, _thresholds(floor, largest, rule))
            worst = float((counts.standard_errors + counts.truncation_errors).max()) / n
            is_even = bool((counts.truncation_errors <= counts.standard_errors / 4).all())
            settled = num_steps is None and (worst <= tol or is_even) and steps > 0
        if is_begun:
            monitor(Step(operator.work - before, worst, tol))
        if is_last or settled:
            break
        lanczos.absorb(operator.matmat(lanczos.block))
        journal.save()
        is_begun = True
    status, message, resolved = _judge(counts, n, tol, "memory_limit" if most < asked else "num_steps or max_passes")
    return Density(
        status=status,
        message=message,
        work=operator.work - before,
        seconds=perf_counter() - begin,
        options={
            "num_probes": num_probes,
            "num_steps": num_steps,
            "top": len(values),
            "tol": tol,
            "max_passes": max_passes,
            "memory_limit": memory_limit,
            "seed": seed,
        },
        matrix=operator.identity(),
        eigenvalues=values,
        nodes=rule.nodes,
        weights=rule.weights,
        node_residuals=rule.residuals,
        num_rows=n,
        num_steps=lanczos.num_steps,
        floor=floor,
        resolved_above=resolved,
    )


def _name_of(vectors: NDArray[np.float64] | None) -> str | None:
    return None if vectors is None else digest_of(vectors)


def _thresholds(floor: float, largest: float, rule: Rule) -> NDArray[np.float64]:
    """From the floor to the largest eigenvalue, evenly in the logarithm."""
    end = max(largest, float(rule.nodes.max(initial=0.0)), floor)
    return np.geomspace(floor, end, _NUM_THRESHOLDS) if floor > 0 else np.zeros(1)


def _count(rule: Rule, exact: NDArray[np.float64], num_rows: int, thresholds: NDArray[np.float64]) -> Counts:
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


def _judge(counts: Counts, num_rows: int, tol: float, limit: str) -> tuple[Status, str, float]:
    """Status, its sentence, and from where on counts are as asked for."""
    errors = (counts.standard_errors + counts.truncation_errors) / num_rows
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


def _exact_pairs(top: TopPairs | None, num_rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Values, descending, and vectors."""
    if top is None:
        return np.zeros(0), None
    values, vectors = np.array(top.eigenvalues, np.float64), np.asarray(top.eigenvectors, np.float64)
    if vectors.shape != (num_rows, len(values)):
        raise ConfigError(f"top has eigenvectors of shape {vectors.shape}; needed ({num_rows}, {len(values)})")
    gap = float(np.abs(vectors.T @ vectors - np.eye(len(values))).max(initial=0.0))
    if not gap <= 1e-8:
        raise ConfigError(f"eigenvectors of top are orthonormal to {gap:.2g} only; needed 1e-8")
    return np.sort(values)[::-1], vectors
