"""Log determinants: exact by a factor, or estimated by Lanczos quadrature of what a preconditioner leaves."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.blas import single_threaded_blas
from ntkpipe.base.config import Budget, MemoryLimit, RidgeScale, absolute_ridge
from ntkpipe.base.errors import ConfigError, IndefiniteError
from ntkpipe.base.operator import Operator, Work
from ntkpipe.base.tables import TableRows
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.linear.preconditioner import Preconditioner, preconditioner_of
from ntkpipe.solvers.probe_lanczos import gauss_rule, lowest_eigenvalue, radau_rule, rounded_up
from ntkpipe.solvers.result import Monitor, Result, Status, ignore, recorded
from ntkpipe.solvers.spectral.krylov import Sampler, Sampling
from ntkpipe.store.results import Checkpoint

_EPS = float(np.finfo(np.float64).eps)
_MOST_ERROR = 0.01  # as a fraction of n: one per cent of the geometric mean of the eigenvalues
_FEWEST_STEPS = 8  # with fewer, a comparison with half of them is meaningless


@dataclass(frozen=True, kw_only=True)
class LogDeterminant(Result):
    """``log det(K + ridge I)`` by a Cholesky factor: exact for the stored entries but for rounding in float64."""

    value: float  # log det(K + (ridge + jitter) I)
    ridge: float  # ridge, jitter: what was added to the diagonal; a jitter only where it was allowed and needed
    jitter: float
    num_rows: int  # n
    smallest_pivot: float  # smallest_pivot, largest_pivot: of the factor, squared
    largest_pivot: float
    floor: float  # eigenvalues below it are not known, because entries were rounded when they were stored
    # About what that did to the value, see `CholeskyFactor.logdet_error`. Above n / 100 the status is `indefinite at
    # storage precision`.
    storage_error: float

    def _rows(self) -> TableRows:
        added = f"{self.ridge:.6g}" + (f", and a jitter of {self.jitter:.6g}" if self.jitter else "")
        return [
            ("log det", f"{self.value:.12g} ± {self.storage_error:.2g} (rounding of stored entries)"),
            ("per row", f"{self.value / self.num_rows:.6g}"),
            ("ridge", added),
            ("pivots", f"{self.smallest_pivot:.4g} to {self.largest_pivot:.4g}; storage floor {self.floor:.2g}"),
        ]


@dataclass(frozen=True, kw_only=True)
class LogDeterminantEstimate(Result):
    """``log det(K + ridge I)``, estimated."""

    value: float  # the estimate; NaN if the matrix is not positive definite
    standard_error: float  # monte-Carlo error: one standard deviation of the mean over probes
    # Estimated effect of more steps, which can only make the value smaller: twice the change from half as many, which
    # is no bound, or the width of the bracket if that is smaller
    truncation_error: float
    # lower, upper: bracket of the value that these probes would give after infinitely many steps: of truncation
    # alone. Without a ridge above the storage floor, `lower` is -infinity.
    lower: float
    upper: float
    samples: FloatArray = field(repr=False)  # value of each probe, shape (p,); their mean is the value
    half_samples: FloatArray = field(repr=False)  # the same after half as many steps
    ridge: float  # λ
    num_rows: int  # num_rows, num_steps: n and m
    num_steps: int
    rank: int  # rank of the preconditioner; 0 without one
    # The smallest Ritz value of the matrix that was sampled, preconditioned and with the ridge: an upper bound of its
    # smallest eigenvalue
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


@recorded()
@single_threaded_blas()
def slq_logdet(
    matrix: Any,
    *,
    ridge: float = 0.0,
    ridge_scale: RidgeScale = None,
    preconditioner: Literal["rpcholesky", "nystrom"] | Preconditioner | None = "rpcholesky",
    rank: int | None = None,
    num_probes: int = 16,
    num_steps: int | None = None,
    tol: float = 0.01,
    max_passes: int = 200,
    memory_limit: MemoryLimit = None,
    seed: int = 0,
    monitor: Monitor = ignore,
    checkpoint: Checkpoint | None = None,
) -> LogDeterminantEstimate:
    """``log det(K + ridge I)`` by stochastic Lanczos quadrature, with both of its errors.

    One pass a step for all probes, one for diagonal and Frobenius norm if these are not known, and what the
    preconditioner takes, five at most by default. It makes both errors smaller by far where K is ill-conditioned. The
    Lanczos vectors, ``steps * p * n`` float64, dominate memory; the preconditioner takes ``3 * rank * n`` at most.

    Parameters
    ----------
    preconditioner
        P = F F' + μ I, or how it is made. Only the trace in ``log det P + tr log(P^-1/2 (K + λ I) P^-1/2)`` is
        estimated then. None samples K + λ I itself.
    num_steps
        Lanczos steps; default as many as make truncation small against the Monte-Carlo error.
    tol
        Largest sum of both errors that is called converged, as a fraction of n: 0.01 is one per cent of the geometric
        mean of the eigenvalues.
    max_passes
        Most Lanczos steps where ``num_steps`` is not given.
    checkpoint
        Where each step is written, 8 p n bytes, so that another call goes on from the last one, also with a higher
        ``max_passes``. The caller clears it.

    Notes
    -----
    Ubaru, Chen and Saad (2017), algorithm 1, with Rademacher probes and full reorthogonalisation of each. Even
    derivatives of the logarithm are negative and odd ones positive, so Gauss quadrature is above the integral and
    Gauss-Radau quadrature with a node below the spectrum is under it (Golub and Meurant 2010). Such a node is known
    if K has no eigenvalue under minus the storage floor: ``ridge - floor``, or with a preconditioner, for which
    F F' ≤ K, that over μ, and one at most.
    """
    operator: Operator = matrix
    before, n = operator.work, operator.num_rows
    ridge = absolute_ridge(ridge, ridge_scale, operator.diagonal)
    options = Sampling(num_probes, num_steps, tol, max_passes, seed, Budget.of(memory_limit))
    named = preconditioner
    if isinstance(preconditioner, str):
        preconditioner = preconditioner_of(operator, preconditioner, rank, seed).for_ridge(ridge)
    elif preconditioner is not None and preconditioner.num_rows != n:
        raise ConfigError(f"a preconditioner of {preconditioner.num_rows} rows for a matrix of {n}")
    sampling = _Sampling(operator, options, preconditioner, ridge)
    # Preconditioners of equal rank, shift and determinant are taken for the same.
    chosen = None if preconditioner is None else [preconditioner.rank, sampling.scale, sampling.known]
    decides: Any = {"function": "logdet", "probes": num_probes, "seed": seed, "ridge": ridge, "preconditioner": chosen}
    sampling.run(before, monitor, checkpoint, **decides)
    (status, message), used = sampling.judge(), preconditioner.rank if preconditioner else 0
    return LogDeterminantEstimate(
        status=status,
        message=message,
        options={"preconditioner": getattr(named, "method", named), "rank": used},
        value=float(sampling.samples.mean()),
        standard_error=sampling.standard_error,
        truncation_error=sampling.truncation,
        lower=sampling.lower,
        upper=float(sampling.samples.mean()),
        samples=sampling.samples,
        half_samples=sampling.half_samples,
        ridge=ridge,
        num_rows=n,
        num_steps=sampling.lanczos.num_steps,
        rank=used,
        smallest_ritz=sampling.smallest,
    )


class _Sampling(Sampler):
    """The estimate from the steps taken, of a known part and the trace of ``log P^-1/2 (K + λ I) P^-1/2``."""

    def __init__(
        self, operator: Operator, options: Sampling, preconditioner: Preconditioner | None, ridge: float
    ) -> None:
        super().__init__(operator, options)
        self._preconditioner, self._shifted, self._ridge = preconditioner, operator.shifted(ridge), ridge
        floor = max(operator.storage_floor(), 8 * _EPS * operator.frobenius())
        self.scale, self.known = (1.0, 0.0) if preconditioner is None else (preconditioner.mu, preconditioner.logdet())
        # P is μ at least, and more where F has all columns.
        is_full = preconditioner is not None and preconditioner.rank == preconditioner.num_rows
        least = self.scale + float(preconditioner.values.min()) if preconditioner and is_full else self.scale
        self._floor, end = floor / least, (ridge - floor) / self.scale
        self._end = end if preconditioner is None else min(end, 1.0)

    def _multiply(self, block: FloatArray) -> FloatArray:
        whiten = self._preconditioner and self._preconditioner.inverse_sqrt
        return whiten(self._shifted.matmat(whiten(block))) if whiten else self._shifted.matmat(block)

    def _estimate(self, steps: int) -> tuple[float, bool]:
        lanczos, num_rows = self.lanczos, self._operator.num_rows
        coefficients = lanczos.coefficients(steps)
        rule = gauss_rule(*coefficients, lanczos.squared_norms)
        self.smallest, self.lower = float(rule.nodes.min()), -math.inf
        if not self.smallest > 0:
            self.samples = self.half_samples = np.full(len(rule.nodes), math.nan)
            self.standard_error = self.truncation = math.inf
            return math.inf, True
        self.samples = self.known + rule.integrate(np.log)
        half = gauss_rule(*lanczos.coefficients(max(1, steps // 2)), lanczos.squared_norms)
        self.half_samples = self.known + half.integrate(np.log)
        self.standard_error = float(self.samples.std(ddof=1)) / math.sqrt(len(self.samples))
        change = abs(float((self.half_samples - self.samples).mean()))
        self.truncation = 2 * change if steps >= _FEWEST_STEPS else math.inf
        if lanczos.ended.all():
            self.truncation, self.lower = 0.0, float(self.samples.mean())
        elif 0 < self._end < self.smallest:
            below = radau_rule(*coefficients, lanczos.squared_norms, self._end)
            self.lower = self.known + float(below.integrate(np.log).mean())
            self.truncation = min(self.truncation, max(0.0, float(self.samples.mean()) - self.lower))
        is_enough = self.truncation <= max(self.standard_error / 4, self._tol * num_rows / 20)
        return (self.standard_error + self.truncation) / num_rows, is_enough and self._is_open

    def judge(self) -> tuple[Status, str]:
        """Status and message; Ritz values up to the floor cannot be told from zero."""
        if not self.smallest > self._floor:
            why = f"the smallest Ritz value, {self.smallest:.3g}, is not known from zero (floor {self._floor:.3g})"
            if not self.smallest > 0:
                why = f"a Ritz value is {self.smallest:.3g}: K + λI is not positive definite"
            lowest = lowest_eigenvalue(self._operator)
            ridge = lowest.ridge(max(4.0 * self._floor * self.scale, 2.0 * self._ridge))
            why += f", so the logarithm is not known; of K {lowest.words}"
            why += f". Give a larger ridge, an absolute one of at least {ridge:.2g}"
            return "indefinite at storage precision", why
        wanted = self._tol * self._operator.num_rows
        error = (self.standard_error + self.truncation) / self._operator.num_rows
        said = f"the errors add up to {error:.2g} n"
        if self.truncation > max(self.standard_error, wanted / 10):
            advice = f"{self.limit} ended it; give more steps or a preconditioner"
            return "step limit", f"{said}, most of it truncation: {advice}"
        if error > self._tol:
            # An error that is estimated by few probes may be larger by a third.
            left = max(wanted - self.truncation, 0.5 * wanted)
            factor = 2.0 * (self.standard_error / max(left, self.standard_error * 1e-9)) ** 2
            advice = f"give {factor:.2g} times the probes"
            if factor * len(self.samples) > self._operator.num_rows:
                advice += ", or take a factor, which is exact: ntkpipe.logdet with method='cholesky'"
            return "not converged", f"{said}, most of it Monte-Carlo error; {advice}"
        return "converged", f"{said}, at most the {self._tol:.2g} n asked for"


@recorded(keep_tiles=lambda given: given["method"] == "slq")
def logdet(
    matrix: Any,
    *,
    ridge: float = 0.0,
    ridge_scale: RidgeScale = None,
    method: Literal["cholesky", "slq"] = "cholesky",
    jitter: Literal["auto"] | None = None,
    path: str | Path | None = None,
    preconditioner: Literal["rpcholesky", "nystrom"] | Preconditioner | None = None,
    rank: int | None = None,
    num_probes: int | None = None,
    num_steps: int | None = None,
    tol: float | None = None,
    max_passes: int | None = None,
    seed: int | None = None,
    memory_limit: MemoryLimit = None,
    monitor: Monitor = ignore,
    checkpoint: Checkpoint | None = None,
) -> LogDeterminant | LogDeterminantEstimate:
    """``log det(K + ridge I)``.

    Parameters
    ----------
    method
        ``cholesky``: exact, n³/3 multiplications and additions, one pass for the factor and one for the storage floor,
        and two reads of the factor for what storage did to the value; see :func:`ntkpipe.cholesky`.
        ``slq``: an estimate with its errors in some tens of passes; see :func:`ntkpipe.slq_logdet`.
    jitter
        Whether ``cholesky`` may raise the diagonal: ``auto``, or none.
    path
        Folder for a factor of ``cholesky`` that does not fit in memory.
    preconditioner
        How the preconditioner of ``slq`` is made, or one that was made before; default ``rpcholesky``.
    num_probes
        Number of random vectors of ``slq``; default 16.
    num_steps
        Lanczos steps of ``slq``; default as many as are needed.
    tol
        Largest error of ``slq`` that is called converged, as a fraction of n; default 0.01.
    max_passes
        Most Lanczos steps of ``slq``; default 200.
    checkpoint
        Where steps of ``slq`` are saved; a factor in ``path`` is its own.

    Returns
    -------
    The result; either has a ``value``.

    Raises
    ------
    IndefiniteError
        If a pivot is not positive; the message says where, and which ridge helps.
    """
    operator: Operator = matrix
    sampling: dict[str, Any] = {"preconditioner": preconditioner, "rank": rank, "num_probes": num_probes}
    sampling |= {"num_steps": num_steps, "tol": tol, "max_passes": max_passes, "seed": seed}
    given = {name: value for name, value in sampling.items() if value is not None}
    others = [name for name, value in {"jitter": jitter, "path": path}.items() if value is not None]
    if wrong := others if method == "slq" else list(given):
        raise ConfigError(f"{', '.join(wrong)}: no option{'s'[: len(wrong) > 1]} of method={method!r}")
    common: dict[str, Any] = {"ridge": ridge, "ridge_scale": ridge_scale, "memory_limit": memory_limit}
    if method == "slq":
        found = slq_logdet(operator, **common, **given, monitor=monitor, checkpoint=checkpoint)
        options = {name: value for name, value in found.options.items() if name != "memory_limit"}
        return replace(found, work=Work(), seconds=0.0, options=options)  # the rest is recorded around this call
    # With it :meth:`CholeskyFactor.logdet_error` is small, by bounds of its traces.
    least = rounded_up(operator.storage_floor() * max(4.0 / (_MOST_ERROR * operator.num_rows), 16.0))
    try:
        factor = cholesky(operator, **common, jitter=jitter, path=path, monitor=monitor)
    except IndefiniteError as refused:
        advised = refused.advising(least, refused.otherwise)
        raise advised from None
    error, status, message = factor.logdet_error(), factor.status, factor.message
    if error > _MOST_ERROR * operator.num_rows:
        status = "indefinite at storage precision"
        ridge = max(least, rounded_up(2.0 * factor.shift))
        message += "; but rounding of the stored entries leaves the determinant open: give a larger ridge, an absolute "
        message += f"one of at least {ridge:.2g}"
    return LogDeterminant(
        status=status,
        message=message,
        options={name: factor.options[name] for name in ("panel_width", "threads")},
        value=factor.logdet,
        ridge=factor.ridge,
        jitter=factor.jitter,
        num_rows=factor.num_rows,
        smallest_pivot=factor.smallest_pivot,
        largest_pivot=factor.largest_pivot,
        floor=factor.storage_floor(),
        storage_error=error,
    )
