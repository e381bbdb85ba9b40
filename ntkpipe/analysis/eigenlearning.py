"""Risk of kernel ridge regression that theory predicts from the eigensystem of a population, and learning curves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.arrays import FloatArray, rows_of
from ntkpipe.base.config import Budget, MemoryLimit, RidgeScale, check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator
from ntkpipe.base.tables import TableRows
from ntkpipe.base.targets import Task
from ntkpipe.learning.regression.sources import CountedStages, ridges_for, train_targets
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.eigenpairs import Eigenpairs
from ntkpipe.solvers.inverse.choice import all_eigenpairs
from ntkpipe.solvers.inverse.contract import Question
from ntkpipe.solvers.inverse.exact import ByEigenpairs
from ntkpipe.solvers.result import Monitor, OfTargets, Step, ignore, recorded
from ntkpipe.store.results import Checkpoint

# Shares of the samples, and ridges in mean diagonals, unless others are given.
_DEFAULT_PARTS = (32, 16, 8, 4)
_DEFAULT_RIDGES = (0.0, 1e-2, 1e-1, 1.0, 10.0)
# Bisection of log κ from any bracket to the last bit takes fewer.
_MOST_STEPS = 200
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Prediction:
    """What theory says of kernel ridge regression on n samples."""

    kappa: float  # κ, the effective ridge (regularisation) of Simon et al., in units of population eigenvalues
    # L_i = λ_i / (λ_i + κ), shape (m,): which part of mode i is learnt. With ridge 0 they add up to n.
    learnabilities: FloatArray
    # E_0 = n / (n - Σ L_i²) ≥ 1, by which noise and modes that are not learnt are amplified
    overfitting_coefficient: float
    # Expected squared error on a new sample whose target has the noise, too; of each output, shape (c,)
    test_loss: FloatArray
    train_loss: FloatArray  # expected squared error on the train samples, shape (c,)


def effective_ridge(eigenvalues: ArrayLike, num_samples: float, ridge: float) -> float:
    """κ, the solution of ``Σ λ_i / (λ_i + κ) + δ / κ = n``.

    Zero where there is none above zero: without ridge and with n positive eigenvalues at most, which are then all
    learnt.
    """
    values = _population(eigenvalues)
    check_number("num_samples", num_samples, low=1e-300)
    check_number("ridge", ridge, low=0.0, high=1e300)
    positive = values[values > 0]
    if ridge == 0 and len(positive) <= num_samples:
        return 0.0
    # With x = log κ the left side falls; at κ = (Σλ + δ)/n it is below n, since λ/(λ + κ) < λ/κ.
    high = float(np.log((positive.sum() + ridge) / num_samples))
    low = high
    while _excess(positive, num_samples, ridge, low) < 0:
        low -= 8.0
    for _ in range(_MOST_STEPS):
        middle = (low + high) / 2
        if high - low <= 4 * _EPS * max(1.0, abs(middle)):
            break
        if _excess(positive, num_samples, ridge, middle) > 0:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def eigenlearning(
    eigenvalues: ArrayLike, powers: ArrayLike, num_samples: float, ridge: float, *, noise: float = 0.0
) -> Prediction:
    """Predicted risk of kernel ridge regression: the eigenlearning equations of Simon, Dickens, Karkada and DeWeese.

    With κ from ``Σ L_i + δ/κ = n`` and ``L_i = λ_i / (λ_i + κ)``,

    ``E_0 = n / (n - Σ L_i²)``, ``E_test = E_0 (Σ (1 - L_i)² v_i² + σ²)``, ``E_train = (δ / (n κ))² E_test``.

    The theory takes features to be as if Gaussian and n large; it is exact in neither case alone. Cost is O(m).

    Simon, Dickens, Karkada, DeWeese 2023, The Eigenlearning Framework: A Conservation Law Perspective on Kernel
    Regression and Wide Neural Networks, TMLR, arXiv 2110.03922, section "The eigenlearning equations".
    """
    values, weights = _population(eigenvalues), _powers(powers, eigenvalues)
    check_number("noise", noise, low=0.0)
    kappa = effective_ridge(values, num_samples, ridge)
    learnt = (values > 0).astype(np.float64) if kappa == 0 else values / (values + kappa)
    missing = num_samples - float((learnt**2).sum())
    if missing <= 0:
        # All n eigenvalues are learnt: κ → 0, where E_0 diverges as 1/κ and what is not learnt vanishes as κ².
        coefficient = np.inf
        test = np.where(weights[values <= 0].sum(axis=0) + noise > 0, np.inf, 0.0)
    else:
        coefficient = num_samples / missing
        test = coefficient * ((((1 - learnt) ** 2) @ weights) + noise)
    shrink = (ridge / (num_samples * kappa)) ** 2 if kappa > 0 else 0.0
    return Prediction(
        kappa=kappa,
        learnabilities=learnt,
        overfitting_coefficient=float(coefficient),
        test_loss=test,
        train_loss=shrink * test if shrink else np.zeros_like(test),
    )


def canatar(
    eigenvalues: ArrayLike, powers: ArrayLike, num_samples: float, ridge: float, *, noise: float = 0.0
) -> FloatArray:
    """Predicted generalisation error by Canatar, Bordelon and Pehlevan, Eq. 4; of each output, shape (c,).

    With η_ρ the eigenvalues, P samples, ridge λ and target ``Σ w_ρ sqrt(η_ρ) φ_ρ``, in their letters:

    ``κ = λ + Σ κ η_ρ / (κ + P η_ρ)``, ``γ = Σ P η_ρ² / (κ + P η_ρ)²``,
    ``E_g = 1 / (1 - γ) Σ η_ρ / (κ + P η_ρ)² (κ² w_ρ² + σ² P η_ρ)``.

    E_g is the error against the target without noise. Their κ is n times that of eigenlearning, and with
    ``v_ρ² = η_ρ w_ρ²`` it is ``E_g = E_test - σ²``: one theory in two forms, so without noise both numbers are equal.
    Found here from their equations alone, as a check.

    Canatar, Bordelon, Pehlevan 2021, Spectral bias and task-model alignment explain generalization in kernel
    regression and infinitely wide neural networks, Nature Communications 12, arXiv 2006.13198.
    """
    values, weights = _population(eigenvalues), _powers(powers, eigenvalues)
    check_number("noise", noise, low=0.0)
    kappa = num_samples * effective_ridge(values, num_samples, ridge)
    if kappa == 0:
        return np.where(weights[values <= 0].sum(axis=0) + noise > 0, np.inf, 0.0)
    denominators = (kappa + num_samples * values) ** 2
    gamma = float((num_samples * values**2 / denominators).sum())
    # 1 - γ by the first equation over κ, since γ is one to rounding where the ridge is small.
    rest = ridge / kappa + kappa * float((values / denominators).sum())
    signal = (kappa**2 / denominators) @ weights
    return np.asarray((signal + noise * gamma) / rest, np.float64)


def predicted(
    eigenvalues: FloatArray, vectors: FloatArray, rows: FloatArray, sizes: Sequence[int], ridges: FloatArray
) -> tuple[dict[str, Any], FloatArray]:
    """Predictions of both for each size and ridge, by the fields of results, (s, r); and learnabilities, (s, r, n).

    The eigensystem of a kernel of n rows, and its targets, stand for the population's. What rounding made negative is
    zero.
    """
    values, powers = np.maximum(eigenvalues, 0.0) / len(rows), (vectors.T @ rows) ** 2 / len(rows)
    found = [[eigenlearning(values, powers, size, ridge) for ridge in ridges] for size in sizes]
    by_mode, total = powers.sum(axis=1), float(powers.sum())

    def each(function: Callable[[Prediction], float]) -> FloatArray:
        return np.array([[float(function(one)) for one in of_size] for of_size in found])

    fields = {
        "eigenlearning": each(lambda one: one.test_loss.mean()),
        "canatar": np.array([[canatar(values, powers, size, ridge).mean() for ridge in ridges] for size in sizes]),
        "kappa": each(lambda one: one.kappa),
        "target_learnability": each(lambda one: one.learnabilities @ by_mode / (total or 1.0)),
    }
    return fields, np.array([[one.learnabilities for one in of_size] for of_size in found])


def _excess(values: FloatArray, num_samples: float, ridge: float, log_kappa: float) -> float:
    kappa = np.exp(log_kappa)
    return float((values / (values + kappa)).sum() + ridge / kappa - num_samples)


def _population(eigenvalues: ArrayLike) -> FloatArray:
    values = np.asarray(eigenvalues, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or values.min() < 0:
        raise ConfigError(
            f"population eigenvalues of shape {values.shape}; needed (m,), finite and not negative. Set those below "
            "zero, which rounding makes, to zero"
        )
    return values


def _powers(powers: ArrayLike, eigenvalues: ArrayLike) -> FloatArray:
    weights = np.asarray(powers, np.float64)
    weights = weights[:, None] if weights.ndim == 1 else weights
    count = len(np.asarray(eigenvalues))
    if weights.ndim != 2 or len(weights) != count or not np.isfinite(weights).all() or weights.min(initial=0.0) < 0:
        raise ConfigError(f"powers of shape {weights.shape}; needed ({count},) or ({count}, c), not negative")
    return weights


@dataclass(frozen=True, kw_only=True)
class LearningCurve(OfTargets):
    """Losses by size of the train set and ridge; arrays are of shape (s, r) unless said otherwise.

    Losses are mean squared errors over samples and outputs, means over the subsets that were drawn; an ``_error`` is
    the standard error of that mean.
    """

    num_samples: int  # size of the population, N
    num_subsets: int  # how many were drawn of each size
    sizes: NDArray[np.int64]  # samples in a train set, shape (s,)
    ridges: FloatArray  # λ, absolute, shape (r,)
    # Measured on all samples, those of the train set too: what eigenlearning and Canatar predict for a new sample
    population_loss: FloatArray
    population_loss_error: FloatArray = field(repr=False)
    left_out_loss: FloatArray  # measured on the samples that are not in the train set: what KARE estimates
    left_out_loss_error: FloatArray = field(repr=False)
    kare: FloatArray  # by each train set alone
    kare_error: FloatArray = field(repr=False)
    eigenlearning: FloatArray  # predicted from the eigensystem of all N samples
    canatar: FloatArray = field(repr=False)  # the same number by the equations of another paper
    kappa: FloatArray = field(repr=False)  # κ of eigenlearning
    target_learnability: FloatArray = field(repr=False)  # share of their power that is learnt, `Σ L_i v_i² / Σ v_i²`
    eigenlearning_ratio: FloatArray  # eigenlearning_ratio, canatar_ratio: over `population_loss`
    canatar_ratio: FloatArray = field(repr=False)
    kare_ratio: FloatArray  # over `left_out_loss`

    def _rows(self) -> TableRows:
        population = f"{self.num_samples:,} samples, {self.num_subsets} train sets of each size"
        rows = [("population", population)]
        for line, size in enumerate(self.sizes):
            for place, ridge in enumerate(self.ridges):
                loss, error = self.left_out_loss[line, place], self.left_out_loss_error[line, place]
                kare, theory = self.kare_ratio[line, place], self.eigenlearning_ratio[line, place]
                said = f"left-out loss {loss:.4g} ± {error:.1g}, KARE {kare:.3f} of it"
                rows.append((f"{size:,} at λ = {ridge:.4g}", f"{said}; eigenlearning {theory:.3f} of the population's"))
        return rows


@recorded()
def learning_curve(
    kernel: Any,
    targets: ArrayLike,
    *,
    sizes: Sequence[int] | None = None,
    ridges: Sequence[float] | None = None,
    ridge_scale: RidgeScale = None,
    num_subsets: int = 4,
    eigenpairs: Eigenpairs | None = None,
    task: Task = "auto",
    memory_limit: MemoryLimit = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    monitor: Monitor = ignore,
) -> LearningCurve:
    """Test the theory of generalisation where the eigensystem is known: train sets drawn from the samples of a kernel.

    All N samples are the population. So ``λ_i = k_i / N`` and ``v_i² = (u_iᵀ y)² / N`` are not estimates, and the
    predictions of :mod:`ntkpipe.analysis.eigenlearning` for n of the samples can be held against kernel regression on
    random subsets of n, as Canatar et al. (2021) and Simon et al. (2023) do for real data. Theory draws samples
    independently; subsets have none twice, and n ≪ N makes that the same. For n near N the population is the train
    set, and the prediction is of its train loss: not of new samples.

    Cost: all eigenpairs, one for each subset of n rows, and the columns of these. Memory: ``40 N²`` bytes, or
    ``16 N²``; for a subset ``8 N n`` and ``40 n²``.

    Parameters
    ----------
    kernel
        The kernel K of the population: what :func:`ntkpipe.as_operator` takes. Where it does not fit memory, give
        ``as_operator(kernel).leading(n)``. One of N·c rows is a full NTK, whose train sets are of whole samples.
    sizes
        Samples n in a train set, each less than N. Default N/32 to N/4.
    ridges
        Ridges λ ≥ 0. Default 0 and 0.01 to 10 mean diagonals.
    num_subsets
        Number of train sets of each size, at least 2.
    eigenpairs
        All eigenpairs of K, if known.
    checkpoint
        Where losses of finished subsets are saved; another call for the same curve goes on behind them.
    monitor
        Function that is called after the eigenpairs, and after each subset.
    """
    operator: Operator = kernel
    before = operator.work
    train = train_targets(operator, targets, None, task)
    rows, width, count = train.rhs, train.width, operator.num_rows // train.width
    numbers = _sizes(sizes, count)
    check_number("num_subsets", num_subsets, low=2)
    shifts, options = ridges_for(_DEFAULT_RIDGES, ridges, ridge_scale, operator)
    system, _ = all_eigenpairs(operator, eigenpairs, Budget.of(memory_limit), "exact", monitor)
    assert system is not None
    decides = {"sizes": numbers, "ridges": shifts.tolist(), "num_subsets": num_subsets, "seed": seed}
    stages = CountedStages(checkpoint, operator, train, function="learning_curve", **decides)
    draws = np.empty((3, len(numbers), len(shifts), num_subsets))
    rng = np.random.default_rng(seed)
    for place, size in enumerate(numbers):
        for draw in range(num_subsets):
            chosen = np.sort(rng.permutation(count)[:size])
            part, measure = f"size-{size}-{draw}", partial(_measure, operator, rows, chosen, shifts, width)
            is_new = part not in stages
            draws[:, place, :, draw] = stages.once(part, measure)["losses"]
            if is_new:
                monitor(Step(operator.work - before, None, 0.0))
    means, errors = draws.mean(axis=3), draws.std(axis=3, ddof=1) / num_subsets**0.5
    names = "population_loss", "left_out_loss", "kare"
    measured: dict[str, Any] = {name: mean for name, mean in zip(names, means, strict=True)}
    measured |= {f"{name}_error": error for name, error in zip(names, errors, strict=True)}
    theory, _ = predicted(system.eigenvalues, system.vectors, rows, [size * width for size in numbers], shifts)
    return LearningCurve(
        status="converged",
        message="all eigenpairs in float64",
        work=stages.work,
        seconds=stages.seconds,
        options=options,
        num_samples=count,
        num_subsets=num_subsets,
        sizes=np.array(numbers, np.int64),
        ridges=shifts,
        kare_ratio=means[2] / means[1],
        **train.targets.fields,
        eigenlearning_ratio=theory["eigenlearning"] / means[0],
        canatar_ratio=theory["canatar"] / means[0],
        **measured,
        **theory,
    )


def _sizes(sizes: Sequence[int] | None, count: int) -> list[int]:
    if sizes is None:
        sizes = sorted({count // part for part in _DEFAULT_PARTS if count // part})
    if not len(sizes):
        raise ConfigError(f"no size of a train set is given for {count} samples; needed at least one")
    for size in sizes:
        check_number("size", size, low=1, high=count - 1)
    return [int(size) for size in sizes]


def _measure(
    operator: Operator, rows: FloatArray, chosen: NDArray[np.int64], ridges: FloatArray, width: int
) -> dict[str, FloatArray]:
    """Population loss, left-out loss and KARE of one train set at each ridge, shape (3, r)."""
    inside = rows_of(chosen, width)
    columns = operator.columns(inside)
    is_outside = np.ones(len(rows), bool)
    is_outside[inside] = False
    square = DenseOperator(columns[inside], storage_dtype=operator.storage_dtype)
    inverse, question = ByEigenpairs.of(square, Budget(), ignore, ""), Question(rows[inside], width)
    found = np.full((3, len(ridges)), np.nan)
    for place, ridge in enumerate(ridges):
        fit = inverse.fit(question, float(ridge))
        if fit.verdict.status == "converged":  # else there is no solution to speak of
            squares = (columns @ fit.coefficients - rows) ** 2
            kare = fit.generalised_cross_validation.value
            found[:, place] = squares.mean(), squares[is_outside].mean(), kare
    return {"losses": found}
