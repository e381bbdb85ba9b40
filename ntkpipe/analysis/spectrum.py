"""The spectrum of a kernel in a few numbers: extremes, condition, effective ranks and dimensions, density, tail."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

import numpy as np

from ntkpipe.analysis.power_law import PowerLaw, default_ranks, fit_power_law
from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import Budget, MemoryLimit, RidgeScale, check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator
from ntkpipe.base.tables import TableRows
from ntkpipe.learning.regression.sources import CountedStages, ridges_for, with_error
from ntkpipe.solvers.direct.eigh import eigvalsh
from ntkpipe.solvers.eigenpairs import Eigenpairs
from ntkpipe.solvers.inverse.choice import AnalysisMethod, all_eigenpairs
from ntkpipe.solvers.inverse.contract import WithError
from ntkpipe.solvers.memory import bytes_of_density, bytes_of_eigsh
from ntkpipe.solvers.result import Monitor, Result, Status, ignore, recorded
from ntkpipe.solvers.spectral.density import Density, density, smoothed
from ntkpipe.solvers.spectral.lanczos import eigsh
from ntkpipe.solvers.spectral.smallest import Smallest, bytes_of_smallest, smallest
from ntkpipe.store.results import Checkpoint

# Ridges of the effective dimension unless others are given, in mean diagonals.
_DEFAULT_RIDGES = tuple(10.0**power for power in range(-4, 3))
_NUM_POINTS, _WIDTH = 200, 0.1
_EPS = float(np.finfo(np.float64).eps)

R = TypeVar("R", bound=Result)
Function = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True, kw_only=True)
class KernelSpectrum(Result):
    """The spectrum of a symmetric matrix K in numbers. Errors are zero where numbers are exact."""

    method: str  # method, why: `exact` from all eigenvalues, or `streamed`, and why
    why: str
    num_rows: int  # n
    eigenvalues: FloatArray = field(repr=False)  # descending: all of them, or the leading ones
    largest: float  # λ_max
    smallest: float  # λ_min; streamed, the upper bound of it
    smallest_low: float | None  # lower bound of λ_min, if any; see :class:`ntkpipe.solvers.spectral.smallest.Smallest`
    smallest_high: float  # upper bound of λ_min
    # Bounds of λ_max / λ_min. None where λ_min may be zero, or lies below the storage floor and is not known.
    condition_low: float | None
    condition_high: float | None
    trace: float  # trace, frobenius: tr K and |K|_F, exact in any case
    frobenius: float
    floor: float  # what rounding to the storage dtype did to K in the spectral norm: eigenvalues below it are not known
    num_below_floor: float  # num_below_floor, num_below_floor_error: number of eigenvalues below it
    num_below_floor_error: float
    effective_rank: float  # tr K / λ_max (Koltchinskii, Lounici 2017, Bernoulli 23: "effective rank")
    entropy_rank: float  # exp(-Σ p_i log p_i), p_i = λ_i / tr K (Roy, Vetterli 2007, EUSIPCO: "effective rank", too)
    entropy_rank_error: float
    participation_ratio: float  # (tr K)² / |K|_F², exact in any case
    ridges: FloatArray  # λ, absolute, shape (r,)
    effective_dimension: FloatArray  # d(λ) = Σ λ_i / (λ_i + λ), shape (r,) (Zhang 2005, Neural Computation 17)
    effective_dimension_error: FloatArray
    density_grid: FloatArray = field(repr=False)  # a logarithmic grid, for plots
    density: FloatArray = field(repr=False)  # eigenvalues per decade on this grid; bells of 0.1 decades
    # α of λ_i ~ i^-α; None where fewer than 20 eigenvalues above the floor are in the range
    tail_exponent: float | None
    tail_exponent_error: float | None  # one standard deviation, see :func:`ntkpipe.analysis.power_law.fit_power_law`
    tail_first_rank: int | None  # tail_first_rank, tail_last_rank: the range of ranks that was fitted
    tail_last_rank: int | None
    tail_exponent_of_first_half: float | None  # α of each half of the range; where they differ, this is no power law
    tail_exponent_of_second_half: float | None
    tail_prefactor: float | None  # λ at rank 1 of the line
    tail_scatter: float | None  # root mean square distance from the line, in decades

    def _rows(self) -> TableRows:
        low = "?" if self.smallest_low is None else f"{self.smallest_low:.6g}"
        least = "?" if self.condition_low is None else f"{self.condition_low:.4g}"
        most = "not known" if self.condition_high is None else f"{self.condition_high:.4g}"
        bounds = f"between {low} and {self.smallest_high:.6g}"
        smallest = f"{self.smallest:.6g}" if self.smallest_low == self.smallest_high else f"one {bounds}"
        below = with_error(self.num_below_floor, self.num_below_floor_error)
        rows = [
            ("method", f"{self.method}: {self.why}"),
            ("eigenvalues", f"{self.largest:.6g} to {smallest}, {self.num_rows:,} rows"),
            ("condition number", least if least == most else f"{least} to {most}"),
            ("storage floor", f"{self.floor:.2g}, {below} below"),
            ("trace, Frobenius norm", f"{self.trace:.6g}, {self.frobenius:.6g}"),
            ("effective rank", f"{self.effective_rank:.4g} (trace / largest)"),
            ("entropy rank", f"{with_error(self.entropy_rank, self.entropy_rank_error)} (exp of spectral entropy)"),
            ("participation ratio", f"{self.participation_ratio:.4g}"),
        ]
        dimensions = zip(self.ridges, self.effective_dimension, self.effective_dimension_error, strict=True)
        rows += [(f"effective dimension at {ridge:.3g}", with_error(*of)) for ridge, *of in dimensions]
        if self.tail_exponent is not None:
            exponent = f"{self.tail_exponent:.3f} ± {self.tail_exponent_error:.2g}"
            ranks = f"ranks {self.tail_first_rank} to {self.tail_last_rank}"
            halves = f"halves {self.tail_exponent_of_first_half:.3f}, {self.tail_exponent_of_second_half:.3f}"
            rows.append(("tail", f"rank^-{exponent}, {ranks}; {halves}"))
        return rows


@recorded()
def spectrum(
    kernel: Any,
    *,
    eigenpairs: Eigenpairs | None = None,
    ridges: Sequence[float] | None = None,
    ridge_scale: RidgeScale = None,
    tail_ranks: Sequence[int] | None = None,
    method: AnalysisMethod = "auto",
    k: int = 100,
    num_probes: int = 16,
    max_passes: int = 100,
    memory_limit: MemoryLimit = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    monitor: Monitor = ignore,
) -> KernelSpectrum:
    """Extremes, condition number, effective ranks and dimensions, density and tail of the spectrum of a kernel.

    Exact from all eigenvalues by LAPACK where these fit. Streamed: λ_max and the leading k eigenvalues by
    :func:`ntkpipe.eigsh`; bounds of λ_min by :func:`ntkpipe.smallest`; all sums over eigenvalues from
    :func:`ntkpipe.density` with the leading pairs spliced in, and trace and Frobenius norm, which are known, as control
    variates; errors hold the scatter of probes and what more Lanczos steps could change. Trace, Frobenius norm,
    effective rank and participation ratio are as exact as λ_max then, too.

    Cost: exact 4/3 n³ flops and one pass; streamed some 13 passes, up to ``max_passes``, and 50 to 100. Memory: exact
    ``16 n²`` bytes, or ``8 n²``; streamed ``8 n (11 k + steps · num_probes)`` bytes or so.

    Parameters
    ----------
    eigenpairs
        Eigenpairs that are known. All n of them make it exact at no cost; fewer are spliced in in place of ``k``.
    ridges
        Ridges λ of the effective dimension. Default 10^-4 to 10^2 mean diagonals.
    tail_ranks
        First and last rank of the power law. Default those of :func:`ntkpipe.analysis.power_law.default_ranks`.
    method
        How it is computed: ``exact``, ``streamed``, or ``auto``: exact where it fits the memory.
    k
        Number of leading eigenvalues where it is streamed.
    num_probes
        Number of probes of the density where it is streamed.
    max_passes
        Most passes for the density.

    Raises
    ------
    ResourceError, TileError
        If ``exact`` was asked for and does not fit; if a tile of a stored kernel is missing or damaged.
    """
    operator: Operator = kernel
    budget = Budget.of(memory_limit)
    n = operator.num_rows
    check_number("k", k, low=1)
    if tail_ranks is not None and len(tail_ranks) != 2:
        raise ConfigError(f"tail_ranks={tail_ranks!r}; needed two numbers, the first and the last rank")
    statistics, floor = operator.statistics(), operator.storage_floor()
    shifts, options = ridges_for(_DEFAULT_RIDGES, ridges, ridge_scale, operator)
    given, why = all_eigenpairs(operator, eigenpairs, budget, method, monitor, eigvalsh)
    is_whole = given is not None and len(given.eigenvalues) == n
    status: Status = "converged"
    kept = None if is_whole else checkpoint
    stages = CountedStages(kept, operator, None, function="spectrum", seed=seed, k=k)
    trace, frobenius = statistics.trace, statistics.frobenius

    def stage(name: str, kind: type[R], function: Callable[..., R], *args: Any, room: int, **options: Any) -> R:
        how = {"memory_limit": budget.at_least(room), "checkpoint": stages.part(name), "seed": seed, "monitor": monitor}
        return stages.result(name, kind, partial(function, operator, *args, **options, **how))

    if given is not None and is_whole:
        found, message = _exact(np.array(given.eigenvalues), floor), "all eigenvalues, by LAPACK in float64"
        sums = _sums(shifts, float(found["eigenvalues"].sum()), partial(sum_of_values, found["eigenvalues"]))
    else:
        if given is None:
            given = stage("leading", Eigenpairs, eigsh, min(k, n), room=bytes_of_eigsh(n, min(k, n)))
            status = given.status
        how: dict[str, Any] = {"num_probes": num_probes, "top": given, "tol": 0.01, "max_passes": max_passes}
        spread = stage("density", Density, density, room=bytes_of_density(n, num_probes), **how)
        low = stage("smallest", Smallest, smallest, room=bytes_of_smallest(n))
        found = _streamed(np.array(given.eigenvalues), spread, low, floor)
        sums = _sums(shifts, trace, partial(sum_of_density, spread, trace=trace, squares=frobenius**2))
        # The density is as good as its errors say, whatever counts it would need to be called converged.
        message = f"leading {len(given.eigenvalues)} eigenvalues, {num_probes} probes of {spread.num_steps} steps"
        if status != "converged":
            message = "of a solver: leading eigenpairs did not converge"
        elif low.status != "converged":
            status, message = low.status, f"of a solver: {low.message}"
    return KernelSpectrum(
        status=status,
        message=message,
        work=stages.work,
        seconds=stages.seconds,
        options=options,
        why=why,
        num_rows=n,
        trace=trace,
        frobenius=frobenius,
        floor=floor,
        effective_rank=trace / found["largest"] if found["largest"] else 0.0,
        participation_ratio=trace**2 / frobenius**2 if frobenius else 0.0,
        ridges=shifts,
        **_tail(found["eigenvalues"], n, floor, tail_ranks),
        **found,
        **sums,
    )


def _exact(values: FloatArray, floor: float) -> dict[str, Any]:
    largest, least = float(values[0]), float(values[-1])
    is_known = least > max(floor, 0.0) and largest > 0
    condition = largest / least if is_known else None
    grid, smooth = smoothed(values, np.ones(len(values)), floor, num_points=_NUM_POINTS, width=_WIDTH)
    return {
        "method": "exact",
        "eigenvalues": values,
        "largest": largest,
        **dict.fromkeys(("smallest", "smallest_low", "smallest_high"), least),
        # Below the floor λ_min is anything up to it.
        "condition_low": condition if is_known else (largest / (max(least, 0.0) + floor) if floor > 0 else None),
        "condition_high": condition,
        "density_grid": grid,
        "density": smooth,
        "num_below_floor": float((values < floor).sum()),
        "num_below_floor_error": 0.0,
    }


def _streamed(values: FloatArray, spread: Density, low: Smallest, floor: float) -> dict[str, Any]:
    grid, smooth = spread.smooth(num_points=_NUM_POINTS, width=_WIDTH)
    below = spread.count_above([floor])
    return {
        "method": "streamed",
        "eigenvalues": values,
        "largest": float(values[0]),
        "smallest": float(low.eigenvalues[0]),
        "smallest_low": low.low,
        "smallest_high": low.high,
        "condition_low": low.condition_low,
        "condition_high": low.condition_high,
        "density_grid": grid,
        "density": smooth,
        "num_below_floor": spread.num_rows - float(below.values[0]),
        "num_below_floor_error": float(below.standard_errors[0] + below.truncation_errors[0]),
    }


def _sums(ridges: FloatArray, trace: float, sum_of: Callable[[Function], WithError]) -> dict[str, Any]:
    def entropy(values: FloatArray) -> FloatArray:
        share = np.maximum(values / trace, 0.0) if trace > 0 else np.zeros_like(values)
        return np.asarray(-share * np.log(np.where(share > 0, share, 1.0)))

    def learnt(values: FloatArray, ridge: float) -> FloatArray:
        positive = np.maximum(values, 0.0)
        return np.asarray(positive / np.where(positive + ridge > 0, positive + ridge, 1.0))

    of_entropy = sum_of(entropy)
    dimensions = [sum_of(partial(learnt, ridge=float(ridge))) for ridge in ridges]
    rank = float(np.exp(of_entropy.value))
    return {
        "entropy_rank": rank,
        "entropy_rank_error": rank * of_entropy.error,
        "effective_dimension": np.array([one.value for one in dimensions]),
        "effective_dimension_error": np.array([one.error for one in dimensions]),
    }


def _tail(values: FloatArray, num_rows: int, floor: float, ranks: Sequence[int] | None) -> dict[str, Any]:
    """The power law of the range that was asked for, or of the default one; fields are None where there is none."""
    if ranks is None:
        known = int((values > max(floor, 64 * _EPS * float(np.abs(values).max(initial=0.0)))).sum())
        ranks = default_ranks(num_rows, known)
    law = None if ranks is None else fit_power_law(values, first_rank=ranks[0], last_rank=ranks[1])
    return {f"tail_{one.name}": None if law is None else getattr(law, one.name) for one in fields(PowerLaw)}


def sum_of_values(values: FloatArray, function: Function) -> WithError:
    """Exact, from all eigenvalues."""
    return WithError(float(function(values).sum()))


def sum_of_density(density: Density, function: Function, trace: float, squares: float) -> WithError:
    """Estimated, with trace and squared Frobenius norm as control variates, and with both errors.

    Eigenvalues that were spliced in count exactly. For the rest, f is fitted by a + b λ + c λ² in the measure of all
    probes; the sum of that is known, and only what f differs from it is estimated, so the scatter of the probes counts
    for that alone.

    What more Lanczos steps could change is bracketed: where derivatives of f alternate in sign from the third on, as
    those of λ / (λ + ridge) and -λ log λ do, the integral over a probe's measure lies between its Gauss rule and the
    Gauss-Radau rule with a node at the lower end of the spectrum, zero (Golub and Meurant 2010, Matrices, Moments and
    Quadrature with Applications, chapter 6). The middle is taken, and half of the width is the truncation error.
    """
    exact = density.eigenvalues
    rest = density.num_rows - len(exact)
    if rest == 0:
        return sum_of_values(exact, function)
    nodes, weights = density.nodes, density.weights
    moments = np.array([rest, trace - exact.sum(), squares - (exact**2).sum()])
    scale = max(float(np.abs(nodes).max()), np.finfo(np.float64).tiny)

    def powers(values: FloatArray) -> FloatArray:
        scaled = values / scale
        return np.stack([np.ones_like(scaled), scaled, scaled**2], axis=-1)

    root = np.sqrt(weights.reshape(-1))
    fit, *_ = np.linalg.lstsq(root[:, None] * powers(nodes.reshape(-1)), root * function(nodes).reshape(-1), rcond=None)

    def beyond(values: FloatArray, mass: FloatArray) -> FloatArray:
        return np.asarray((mass * (function(values) - powers(values) @ fit)).sum(axis=1))

    known = float(function(exact).sum() + fit @ (moments / np.array([1.0, scale, scale**2])))
    gauss, radau = beyond(nodes, weights), beyond(*_radau(density))
    samples = (gauss + radau) / 2
    standard_error = float(samples.std(ddof=1) / len(samples) ** 0.5)
    return WithError(known + float(samples.mean()), standard_error + float(np.abs(gauss - radau).mean() / 2))


def _radau(density: Density) -> tuple[FloatArray, FloatArray]:
    """Nodes and weights of the Gauss-Radau rules, of one node more, with a node at zero.

    In the eigenvectors of a probe's tridiagonal matrix T the longer one is diagonal but for its last row, which holds
    their last entries times the coupling that leads out of the space: the residuals of the nodes, whose signs
    alternate where first entries are positive (Golub 1973).
    """
    nodes, weights, residuals = density.nodes, density.weights, density.node_residuals
    count = nodes.shape[1]
    # Below all nodes, also where rounding of the storage made eigenvalues negative.
    ends = np.minimum(0.0, nodes.min(axis=1) - _EPS * np.abs(nodes).max(axis=1))
    gaps = nodes - ends[:, None]
    border = residuals * (-1.0) ** np.arange(count - 1, -1, -1)
    arrow = np.zeros((len(nodes), count + 1, count + 1))
    index = np.arange(count)
    arrow[:, index, index] = nodes
    arrow[:, index, count] = arrow[:, count, index] = border
    arrow[:, count, count] = ends + (residuals**2 / np.where(gaps > 0, gaps, 1.0)).sum(axis=1)
    values, vectors = np.linalg.eigh(arrow)
    first = np.einsum("pj,pjk->pk", np.sqrt(weights), vectors[:, :count])
    return values, first**2
