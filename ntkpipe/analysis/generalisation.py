"""What theory says of the test error of kernel ridge regression, against what is measured, and where to trust it.

Each estimate is of the loss of ``A = G y`` with G = (K + λI)^-1, λ absolute, and n rows.

KARE (Jacot et al. 2020), from the train kernel alone, is ``ρ = (1/n yᵀ (K/n + λ'I)^-2 y) / (1/n tr (K/n + λ'I)^-1)²``
with λ' = λ/n; the factors n cancel: ``ρ = n |G y|² / (tr G)²``. Generalised cross-validation (Golub, Heath, Wahba
1979), ``(1/n) |(I - H) y|² / ((1/n) tr(I - H))²`` with ``H = K G``, is the same number for every λ > 0, as I - H = λG.
Leave-one-out, ``(1/n) Σ ((G y)_i / G_ii)²`` (PRESS, Allen 1974), is n exact refits. KARE is that with each G_ii
replaced by their mean, as it would be if features were Gaussian: both differ where samples are unlike each other, and
that decides where KARE is trusted.

Eigenlearning (Simon et al. 2023) and Canatar et al. (2021), see :mod:`ntkpipe.analysis.eigenlearning`, need the
eigensystem of the kernel operator, estimated from the train kernel as ``λ_i = k_i / n`` and ``v_i² = (u_iᵀ y)² / n``,
with k_i, u_i the eigenpairs of K. That is biased: n samples show n eigenvalues, so at λ → 0 all seem learnt, κ → 0, and
the prediction is zero. Noise of targets is in v_i² already.

Cost: exact, all eigenpairs, then ``n² (c + 1)`` multiplications a ridge and one of the test kernel; streamed, two
times some ten to forty passes a ridge, for c and 2 p columns, from the largest to the smallest ridge.

Jacot, Şimşek, Spadaro, Hongler, Gabriel 2020, Kernel Alignment Risk Estimator: Risk Prediction from Training Data,
NeurIPS 33, arXiv 2006.09796. Simon et al. arXiv 2110.03922. Canatar et al. arXiv 2006.13198. That generalised
cross-validation predicts the risk of kernels of networks while plug-in spectra do not is also found by Wei, Hu,
Steinhardt 2022, arXiv 2203.06176.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ntkpipe.analysis.eigenlearning import predicted
from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import Budget, MemoryLimit, RidgeScale, check_number
from ntkpipe.base.operator import Operator
from ntkpipe.base.tables import TableRows
from ntkpipe.base.targets import Task
from ntkpipe.learning.regression.sources import CountedStages, HeldOut, ridges_for, train_targets
from ntkpipe.solvers.eigenpairs import Eigenpairs
from ntkpipe.solvers.inverse.choice import AnalysisMethod, all_eigenpairs, find_inverse
from ntkpipe.solvers.inverse.contract import INDEFINITE, Fit, Question, WithError, as_fields, squares
from ntkpipe.solvers.inverse.exact import ByEigenpairs
from ntkpipe.solvers.result import Monitor, OfTargets, Status, ignore, recorded
from ntkpipe.store.results import Checkpoint

# Ridges unless others are given, in mean diagonals.
_DEFAULT_RIDGES = tuple(10.0**power for power in range(-4, 3))
# The smallest eigenvalue of K + λI must be this many storage floors for its inverse to be known.
_FLOORS = 10.0
# Standard errors by which leave-one-out and test loss differ for another reason than chance. True errors are a bit
# larger, since left-out errors are not independent.
_SIGMAS = 3.0


@dataclass(frozen=True, kw_only=True)
class Generalisation(OfTargets):
    """Estimates of the test loss of kernel ridge regression. Arrays have an entry a ridge unless said otherwise.

    Losses are mean squared errors over samples and outputs. An ``_error`` is one standard deviation of what was
    estimated, zero where a number is exact; that of ``test_loss`` is of the choice of test samples.
    """

    method: str  # method, why: `exact` or `streamed`, and why
    why: str
    num_rows: int  # n
    num_outputs: int  # outputs that share the kernel; a full NTK has one, and a row for each output of a sample
    ridges: FloatArray  # λ, absolute, shape (r,)
    test_loss: FloatArray  # test_loss, test_loss_error: measured; NaN without test data
    test_loss_error: FloatArray
    train_loss: FloatArray  # loss of the same predictor on its own samples
    kare: FloatArray  # kare, kare_error: the kernel alignment risk estimator
    kare_error: FloatArray
    generalised_cross_validation: FloatArray  # the same number, from train loss and effective dimension
    leave_one_out_loss: FloatArray  # what trust is judged by: each sample predicted from all others; NaN if not known
    leave_one_out_loss_error: FloatArray
    eigenlearning: FloatArray  # eigenlearning, canatar: from the train kernel's own eigensystem; NaN if streamed
    canatar: FloatArray
    eigenlearning_kappa: FloatArray  # κ of that, in population eigenvalues; NaN if streamed
    learnabilities: FloatArray = field(repr=False)  # L_i = λ_i / (λ_i + κ), shape (r, n); (r, 0) if streamed
    target_learnability: FloatArray  # share of their power that is learnt, `Σ L_i v_i² / Σ v_i²`; NaN if streamed
    # The signal capture threshold by the train kernel alone, 1 / tr (K + λI)^-1: κ of eigenlearning without its bias
    kappa: FloatArray
    kappa_error: FloatArray
    overfitting_coefficient: FloatArray  # e_0 = n ∂κ/∂λ of that κ: n tr G² / (tr G)²
    overfitting_coefficient_error: FloatArray
    effective_dimension: FloatArray  # effective_dimension, effective_dimension_error: tr K (K + λI)^-1
    effective_dimension_error: FloatArray
    kare_ratio: FloatArray  # kare_ratio, eigenlearning_ratio, canatar_ratio, leave_one_out_ratio: each over `test_loss`
    eigenlearning_ratio: FloatArray
    canatar_ratio: FloatArray
    leave_one_out_ratio: FloatArray
    kare_is_trusted: tuple[bool, ...]  # whether KARE and GCV can be trusted
    eigenlearning_is_trusted: tuple[bool, ...]  # whether eigenlearning and Canatar can be trusted
    reasons: tuple[str, ...]  # why or why not, in words
    floor: float  # what rounding to the storage dtype did to K in the spectral norm

    def _rows(self) -> TableRows:
        is_measured = bool(np.isfinite(self.test_loss).any())
        rows = [("method", f"{self.method}: {self.why}")]
        for index, ridge in enumerate(self.ridges):
            if is_measured:
                numbers = (self.kare_ratio, self.eigenlearning_ratio, self.leave_one_out_ratio)
                said = f"test loss {self.test_loss[index]:.4g} ± {self.test_loss_error[index]:.1g}; of it"
            else:
                numbers = (self.kare, self.eigenlearning, self.leave_one_out_loss)
                said = "no test data; losses by"
            kare, theory, left_out = (f"{number[index]:.3g}" for number in numbers)
            estimates = f"KARE = GCV {kare}, eigenlearning = Canatar {theory}, leave-one-out {left_out}"
            trusted = {"KARE": self.kare_is_trusted[index], "eigenlearning": self.eigenlearning_is_trusted[index]}
            names = " and ".join(name for name, is_trusted in trusted.items() if is_trusted) or "none"
            rows.append((f"λ = {ridge:.4g}", f"{said} {estimates}; trust {names}"))
        return rows


@recorded()
def generalisation(
    kernel: Any,
    targets: ArrayLike,
    *,
    ridges: Sequence[float] | None = None,
    ridge_scale: RidgeScale = None,
    test_kernel: Any = None,
    test_targets: ArrayLike | None = None,
    eigenpairs: Eigenpairs | None = None,
    method: AnalysisMethod = "auto",
    task: Task = "auto",
    tolerance: float = 0.1,
    num_probes: int = 32,
    tol: float = 1e-8,
    memory_limit: MemoryLimit = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    monitor: Monitor = ignore,
) -> Generalisation:
    """Estimate the test loss of kernel ridge regression across ridges by theory, and compare it with what is measured.

    Losses are means over columns of Y. Estimates are KARE, which is generalised cross-validation, exact leave-one-out,
    where all rows of a sample are left out together, and eigenlearning, which is the theory of Canatar et al.; sources,
    formulas and cost are in :mod:`ntkpipe.analysis.generalisation`. Eigenlearning with the spectrum of n train samples
    can be trusted only where few of them are learnt; :func:`ntkpipe.learning_curve` has a larger population.

    An estimate is trusted where it is within ``tolerance`` of leave-one-out and the smallest eigenvalue of K + λI is
    above ten storage floors. That holds for samples that the kernel does not know: after training on them leave-one-out
    is below the test loss, too; where both differ by more than ``tolerance`` and three standard errors, nothing is
    trusted.

    Parameters
    ----------
    ridges
        Ridges λ ≥ 0. Default 10^-4 to 10^2 mean diagonals.
    eigenpairs
        All eigenpairs of K, descending, if they are known.
    method
        How it is computed: ``exact`` by all eigenpairs, ``40 n²`` bytes, or ``16 n²``; ``streamed`` by passes,
        ``8 n c`` bytes a ridge and ``8 n (3 rank + 11 c)`` for c columns at a time; ``auto``: exact where it fits the
        memory, or by Cholesky factors where these do, without what needs the eigensystem.
    tolerance
        Largest relative difference from leave-one-out that is trusted.
    num_probes
        Number of random probes for traces, and of samples to leave out, where it is streamed.
    tol
        Relative residual of the systems where it is streamed.

    Raises
    ------
    ResourceError, TileError
        If ``exact`` was asked for and does not fit; if a tile of a stored kernel is missing or damaged.
    """
    operator: Operator = kernel
    budget = Budget.of(memory_limit)
    train = train_targets(operator, targets, None, task)
    check_number("tolerance", tolerance, low=0.0, high=1.0)
    check_number("num_probes", num_probes, low=2)
    test = HeldOut.of(test_kernel, test_targets, train)
    shifts, options = ridges_for(_DEFAULT_RIDGES, ridges, ridge_scale, operator)
    how: dict[str, Any] = {"tol": tol, "seed": seed, "monitor": monitor, "ridges": shifts.tolist()}
    pairs, why = all_eigenpairs(operator, eigenpairs, budget, method, monitor)
    system = None if pairs is None or not pairs.is_whole else ByEigenpairs(operator, pairs, why)
    chosen: Any = "streamed" if method == "streamed" else "auto"
    inverse = system or find_inverse(operator, budget, method=chosen, allowed=("cholesky",), **how)
    question = Question(train.rhs, train.width, num_probes, 0 if system else num_probes, seed)
    decides = {"ridges": shifts.tolist(), "num_probes": num_probes, "tol": tol, "seed": seed, "method": inverse.method}
    kept = None if system else checkpoint
    stages = CountedStages(kept, operator, train, function="generalisation", **decides)
    fits = dict(stages.fits(inverse, question, shifts, _measures))
    found = [fits[place] for place in range(len(shifts))]
    losses: dict[str, Any] = {name: np.array([one["measures"][name] for one in found]) for name in found[0]["measures"]}
    losses |= _of_population(system, train.rhs, shifts) | _measured([one["coefficients"] for one in found], test)
    floor, least = operator.storage_floor(), shifts + (float(system.values[-1]) if system else np.inf)
    trusted = _judge(losses, least, [one["status"] for one in found], floor, tolerance)
    del losses["left_out_spread"]
    status: Status = "converged"
    message, worst = "exact, from all eigenpairs in float64", max(one["residual"] for one in found)
    if system is None:
        message = f"systems are solved to {worst:.2g}; an error beside a number is of random probes"
    if worst > tol:
        status = "not converged"
        message = f"systems are solved to {worst:.2g} only, not to {tol:g}; raise the smallest ridge, or tol"
    return Generalisation(
        status=status,
        message=message if test is None else message + test.targets.note,
        work=stages.work,
        seconds=stages.seconds,
        options=options,
        method="streamed" if inverse.method == "streamed" else "exact",
        why=inverse.why,
        num_rows=operator.num_rows,
        num_outputs=train.rhs.shape[1],
        ridges=shifts,
        floor=floor,
        **train.targets.fields,
        **losses,
        **trusted,
    )


def _measures(fit: Fit) -> dict[str, float]:
    """Numbers of one ridge, by the names of the result, and the standard error of leave-one-out over samples."""
    (trace, trace_error), (squared, squared_error), n = fit.trace, fit.squared_trace, len(fit.complement)
    each = squares(fit.left_out, fit.samples)
    coefficient, part = n * squared / trace**2, trace_error / abs(trace)
    is_limit = fit.weight != fit.ridge  # of a singular kernel without a ridge
    spread = float(coefficient * np.hypot(squared_error / squared, 2 * part))
    estimates = {
        "kare": fit.generalised_cross_validation,
        "leave_one_out_loss": fit.leave_one_out_loss,
        "kappa": WithError(0.0) if is_limit else WithError(1.0 / trace, part / abs(trace)),
        "overfitting_coefficient": WithError(coefficient, spread),
        "effective_dimension": fit.effective_dimension,
    }
    return {
        **as_fields(estimates),
        "train_loss": fit.train_loss,
        "generalised_cross_validation": fit.generalised_cross_validation.value,
        "left_out_spread": float(each.std(ddof=1)) / (n // (len(fit.left_out) // len(each))) ** 0.5,
    }


def _of_population(system: ByEigenpairs | None, rows: FloatArray, ridges: FloatArray) -> dict[str, FloatArray]:
    """Eigenlearning and Canatar, where the train kernel's own eigensystem stands for the population's."""
    if system is None:
        names = ("eigenlearning", "canatar", "eigenlearning_kappa", "target_learnability")
        unknown = dict.fromkeys(names, np.full(len(ridges), np.nan))
        return {**unknown, "learnabilities": np.zeros((len(ridges), 0))}
    fields, learnabilities = predicted(system.values, system.vectors, rows, [len(rows)], ridges)
    found = {name: of_sizes[0] for name, of_sizes in fields.items()}
    return {"eigenlearning_kappa": found.pop("kappa"), "learnabilities": learnabilities[0], **found}


def _measured(coefficients: Sequence[FloatArray], test: HeldOut | None) -> dict[str, FloatArray]:
    """Test losses; the standard error is that of a mean over samples."""
    if test is None:
        return dict.fromkeys(("test_loss", "test_loss_error"), np.full(len(coefficients), np.nan))
    outputs = test.predict(coefficients)
    losses = np.stack([((one - test.targets.matrix) ** 2).mean(axis=1) for one in outputs])
    count = losses.shape[1]
    spread = losses.std(axis=1, ddof=1) if count > 1 else np.full(len(losses), np.nan)
    return {"test_loss": losses.mean(axis=1), "test_loss_error": spread / count**0.5}


def _judge(
    losses: dict[str, Any], least: FloatArray, statuses: Sequence[Status], floor: float, tolerance: float
) -> dict[str, Any]:
    """Ratios to the measured loss; and which estimates to trust, by leave-one-out, storage, and what was measured.

    ``least`` are the smallest eigenvalues of K + λI, as far as they are known.
    """
    sources = {name: name for name in ("kare", "eigenlearning", "canatar")} | {"leave_one_out": "leave_one_out_loss"}
    found = []
    for index, status in enumerate(statuses):
        at = {name: float(values[index]) for name, values in losses.items() if np.ndim(values) == 1}
        unknown = ""
        if status == INDEFINITE or not np.isfinite(at["kappa"]):
            unknown = "K + λI is not positive definite; raise λ"
        elif least[index] < _FLOORS * floor:
            unknown = f"K + λI has an eigenvalue of {least[index]:.2g}, and the storage floor is {floor:.2g}; raise λ"
        found.append((False, False, unknown) if unknown else _judge_ridge(at, tolerance))
    kare, theory, reasons = zip(*found, strict=True)
    return {
        **{f"{name}_ratio": losses[key] / losses["test_loss"] for name, key in sources.items()},
        "kare_is_trusted": kare,
        "eigenlearning_is_trusted": theory,
        "reasons": reasons,
    }


def _judge_ridge(at: dict[str, float], tolerance: float) -> tuple[bool, bool, str]:
    """Whether KARE and eigenlearning can be trusted at one ridge, and why."""
    loss, test = at["leave_one_out_loss"], at["test_loss"]
    if not np.isfinite(loss) or loss <= 0:
        return False, False, "leave-one-out is not known"
    apart = loss / test - 1 if test > 0 else np.nan
    if abs(apart) > tolerance and abs(loss - test) > _SIGMAS * np.hypot(at["test_loss_error"], at["left_out_spread"]):
        why = "train and test samples are not alike to this kernel, as after training on the former"
        return False, False, f"leave-one-out itself is {apart:+.1%} off the test loss: {why}"
    gaps = {name: at[name] / loss - 1 for name in ("kare", "eigenlearning")}
    # The error of leave-one-out counts against the estimate; a comparison with NaN is no trust.
    kare, theory = (abs(gap) + at["leave_one_out_loss_error"] / loss <= tolerance for gap in gaps.values())
    of_theory = "" if np.isnan(gaps["eigenlearning"]) else f", eigenlearning by {gaps['eigenlearning']:+.1%}"
    return kare, theory, f"KARE is off leave-one-out by {gaps['kare']:+.1%}{of_theory}"
