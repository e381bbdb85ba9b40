"""The log determinant without a factor: stochastic Lanczos quadrature of what a preconditioner leaves."""

import math
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator
from ntkpipe.base.tables import TableRows
from ntkpipe.operators.blas import single_threaded_blas
from ntkpipe.operators.opening import open_for_solver
from ntkpipe.solvers.checkpoint import Journal
from ntkpipe.solvers.linear.preconditioner import Preconditioner, preconditioner_of
from ntkpipe.solvers.result import Monitor, Result, Status, Step, ignore
from ntkpipe.solvers.spectral.krylov import ProbeLanczos, is_due, steps_that_fit
from ntkpipe.solvers.spectral.quadrature import gauss_rule, radau_rule
from ntkpipe.store.results import Checkpoint

_EPS = float(np.finfo(np.float64).eps)
# Below it the half of the steps says nothing.
_FEWEST_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class LogDeterminantEstimate(Result):
    """``log det(K + ridge I)``, estimated.

    Attributes
    ----------
    value
        The estimate; NaN if the matrix is not positive definite.
    standard_error
        What other probes would change: one standard deviation of the mean.
    truncation_error
        What more steps would change: twice the change from half as many, or the width of the bracket if that is
        smaller. The first is no bound; more steps can only make the value smaller.
    lower, upper
        What these probes would give after infinitely many steps lies between: a bracket of truncation alone. Without a
        ridge above the storage floor there is no lower end, and it is -infinity.
    samples
        Of each probe, shape (p,); their mean is the value.
    half_samples
        The same after half as many steps.
    ridge
        λ.
    num_rows, num_steps
        n and m.
    rank
        Of the preconditioner; 0 without one.
    smallest_ritz
        The smallest Ritz value of the matrix that was sampled, preconditioned and with the ridge: an upper bound of its
        smallest eigenvalue.
    """

    value: float
    standard_error: float
    truncation_error: float
    lower: float
    upper: float
    samples: NDArray[np.float64] = field(repr=False)
    half_samples: NDArray[np.float64] = field(repr=False)
    ridge: float
    num_rows: int
    num_steps: int
    rank: int
    smallest_ritz: float

    def _rows(self) -> TableRows:
        errors = f"± {self.standard_error:.2g} (Monte Carlo) ± {self.truncation_error:.2g} (truncation)"
        return [
            ("log det", f"{self.value:.8g} {errors}"),
            ("per row", f"{self.value / self.num_rows:.6g}"),
            ("bracket", f"{self.lower:.8g} to {self.upper:.8g}, of truncation alone"),
            ("ridge", f"{self.ridge:.6g}"),
            ("probes", f"{len(self.samples)}, of {self.num_steps} steps"),
            ("preconditioner", f"of rank {self.rank}" if self.rank else "none"),
        ]


@single_threaded_blas()
def slq_logdet(
    matrix: Any,
    *,
    ridge: float = 0.0,
    preconditioner: Literal["rpcholesky", "nystrom"] | Preconditioner | None = "rpcholesky",
    rank: int | None = None,
    num_probes: int = 16,
    num_steps: int | None = None,
    tol: float = 0.01,
    max_passes: int = 200,
    memory_limit: int | None = None,
    seed: int = 0,
    monitor: Monitor = ignore,
    checkpoint: Checkpoint | None = None,
) -> LogDeterminantEstimate:
    """``log det(K + ridge I)`` by stochastic Lanczos quadrature, with both of its errors.

    One pass a step for all probes, one for diagonal and Frobenius norm if these are not known, and what the
    preconditioner takes, five at most by default. It makes both errors smaller by far where K is ill-conditioned.

    Parameters
    ----------
    matrix
        K: what :func:`ntkpipe.as_operator` takes.
    ridge
        λ ≥ 0, added to the diagonal.
    preconditioner
        P = F F' + μ I, or how it is made; then ``log det P + tr log(P^-1/2 (K + λ I) P^-1/2)`` is computed, and only
        the trace is estimated. None samples K + λ I itself.
    rank
        Of a preconditioner that is made; default ``min(1000, n/10)``.
    num_probes
        Random vectors, p ≥ 2. The Monte-Carlo error falls like ``1 / sqrt(p)``.
    num_steps
        Lanczos steps; if none, as many as make the truncation error small against the Monte-Carlo error.
    tol
        Largest error that is called converged, both together, as a part of n: 0.01 is one per cent of the geometric
        mean of the eigenvalues.
    max_passes
        Most steps, if ``num_steps`` is none.
    memory_limit
        Bytes that this process may have with the Lanczos vectors, ``steps * p * n`` float64; default what it has and
        half of what is free. The preconditioner has ``rank * n`` more, three times that while it is made.
    seed
        Of the probes, and of a preconditioner that is made.
    monitor
        Called after each pass.
    checkpoint
        Where each step is written, 8 p n bytes, so that another call goes on from the last one, also with a higher
        ``max_passes``. The caller clears it.

    Raises
    ------
    ConfigError
        If numbers are out of range, or the preconditioner is of another matrix.
    ResourceError
        If memory does not hold two steps.

    Notes
    -----
    Ubaru, Chen and Saad (2017), algorithm 1, with Rademacher probes and full reorthogonalisation of each. Even
    derivatives of the logarithm are negative and odd ones positive, so Gauss quadrature is above the integral and
    Gauss-Radau quadrature with a node below the spectrum is under it (Golub and Meurant 2010). Such a node is known
    if K has no eigenvalue under minus the storage floor: ``ridge - floor``, or with a preconditioner, for which
    F F' ≤ K, that over μ, and one at most.
    """
    begin = perf_counter()
    operator, room = open_for_solver(matrix, memory_limit)
    before, n = operator.work, operator.num_rows
    ridge = float(check_number("ridge", float(ridge), low=0.0, high=1e300))
    num_probes = int(check_number("num_probes", num_probes, low=2))
    tol = float(check_number("tol", tol, low=0.0, high=1.0))
    max_passes = int(check_number("max_passes", max_passes, low=1))
    if num_steps is not None:
        num_steps = int(check_number("num_steps", num_steps, low=1))
    named = preconditioner
    if isinstance(preconditioner, str):
        preconditioner = preconditioner_of(operator, preconditioner, rank, ridge=ridge, seed=seed)
    elif preconditioner is not None and preconditioner.num_rows != n:
        raise ConfigError(f"a preconditioner of {preconditioner.num_rows} rows for a matrix of {n}")
    asked = min(num_steps or max_passes, n)
    most = steps_that_fit(n, num_probes, asked, room)
    probes = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), (n, num_probes))
    lanczos = ProbeLanczos(probes, most)
    floor = max(operator.storage_floor(), 8 * _EPS * operator.frobenius())
    scale, known = (1.0, 0.0) if preconditioner is None else (preconditioner.mu, preconditioner.logdet())
    sampled = _Sampled(operator.shifted(ridge), preconditioner)
    end = (ridge - floor) / scale
    end = end if preconditioner is None else min(end, 1.0)

    decides = {"function": "logdet", "matrix": operator.identity(), "ridge": ridge, "probes": num_probes, "seed": seed}
    # One of equal rank, shift and determinant is taken for the same.
    chosen = None if preconditioner is None else [preconditioner.rank, scale, known]
    journal = Journal(checkpoint, {**decides, "preconditioner": chosen}, {"probes": lanczos})

    found, error, is_begun = None, None, False
    while True:
        steps = lanczos.num_steps
        is_done = is_last = steps == most or bool(lanczos.ended.all())
        if steps and (found is None or is_last or is_due(steps)):
            found = _Estimate(lanczos, end, known)
            error = (found.standard_error + found.truncation) / n
            is_enough = found.truncation <= max(found.standard_error / 4, tol * n / 20)
            is_done = is_last or not found.is_positive or (num_steps is None and is_enough)
        if is_begun:
            monitor(Step(operator.work - before, error, tol))
        if found is not None and is_done:
            break
        lanczos.absorb(sampled.multiply(lanczos.block))
        journal.save()
        is_begun = True
    status, message = _judge(
        found, n, tol, floor / scale, "memory_limit" if most < asked else "num_steps or max_passes"
    )
    return LogDeterminantEstimate(
        status=status,
        message=message,
        work=operator.work - before,
        seconds=perf_counter() - begin,
        options={
            "ridge": ridge,
            "preconditioner": named if named is None or isinstance(named, str) else named.method,
            "rank": 0 if preconditioner is None else preconditioner.rank,
            "num_probes": num_probes,
            "num_steps": num_steps,
            "tol": tol,
            "max_passes": max_passes,
            "memory_limit": memory_limit,
            "seed": seed,
        },
        matrix=operator.identity(),
        value=float(found.samples.mean()),
        standard_error=found.standard_error,
        truncation_error=found.truncation,
        lower=found.lower,
        upper=float(found.samples.mean()),
        samples=found.samples,
        half_samples=found.half_samples,
        ridge=ridge,
        num_rows=n,
        num_steps=lanczos.num_steps,
        rank=0 if preconditioner is None else preconditioner.rank,
        smallest_ritz=found.smallest,
    )


class _Sampled:
    """``P^-1/2 (K + λ I) P^-1/2``."""

    def __init__(self, operator: Operator, preconditioner: Preconditioner | None) -> None:
        self._operator = operator
        self._preconditioner = preconditioner

    def multiply(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        if self._preconditioner is None:
            return self._operator.matmat(block)
        return self._preconditioner.inverse_sqrt(self._operator.matmat(self._preconditioner.inverse_sqrt(block)))


class _Estimate:
    """What the steps up to now say. ``known`` is the part that needs no estimate."""

    def __init__(self, lanczos: ProbeLanczos, end: float, known: float) -> None:
        steps = lanczos.num_steps
        coefficients = lanczos.coefficients(steps)
        rule = gauss_rule(*coefficients, lanczos.squared_norms)
        self.smallest = float(rule.nodes.min())
        self.is_positive = self.smallest > 0
        self.lower = -math.inf
        if not self.is_positive:
            self.samples = self.half_samples = np.full(len(rule.nodes), math.nan)
            self.standard_error = self.truncation = math.inf
            return
        self.samples = known + rule.integrate(np.log)
        half = gauss_rule(*lanczos.coefficients(max(1, steps // 2)), lanczos.squared_norms)
        self.half_samples = known + half.integrate(np.log)
        self.standard_error = float(self.samples.std(ddof=1)) / math.sqrt(len(self.samples))
        change = abs(float((self.half_samples - self.samples).mean()))
        self.truncation = 2 * change if steps >= _FEWEST_STEPS else math.inf
        if lanczos.ended.all():
            self.truncation, self.lower = 0.0, float(self.samples.mean())
        elif 0 < end < self.smallest:
            below = radau_rule(*coefficients, lanczos.squared_norms, end)
            self.lower = known + float(below.integrate(np.log).mean())
            self.truncation = min(self.truncation, max(0.0, float(self.samples.mean()) - self.lower))


def _judge(found: _Estimate, num_rows: int, tol: float, floor: float, limit: str) -> tuple[Status, str]:
    """Status and its sentence; ``floor`` is the smallest Ritz value that is known from zero."""
    if not found.is_positive:
        why = f"a Ritz value is {found.smallest:.3g}: the matrix is not positive definite"
        return "indefinite at storage precision", f"{why}, and has no log determinant; give a larger ridge"
    if found.smallest <= floor:
        why = f"the smallest Ritz value, {found.smallest:.3g}, is not known from zero (floor {floor:.3g})"
        return "indefinite at storage precision", f"{why}, nor is its logarithm; give a larger ridge"
    error = (found.standard_error + found.truncation) / num_rows
    said = f"the errors add up to {error:.2g} n"
    if found.truncation > max(found.standard_error, tol * num_rows / 10):
        return "step limit", f"{said}, most of it truncation: {limit} ended it; give more steps or a preconditioner"
    if error > tol:
        factor = (found.standard_error / max(tol * num_rows - found.truncation, 1e-3 * tol * num_rows + 1e-300)) ** 2
        return "not converged", f"{said}, most of it Monte-Carlo error; give {max(factor, 1.1):.2g} times the probes"
    return "converged", f"{said}, at most the {tol:.2g} n asked for"
