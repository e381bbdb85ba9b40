"""Whether variances and probabilities of a Gaussian process can be believed, judged by test targets."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_ndtr, ndtr, ndtri

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.tables import TableRows
from ntkpipe.base.targets import Targets, Task, as_values, encode_test
from ntkpipe.learning.gaussian.process import Posterior
from ntkpipe.solvers.result import OfTargets, recorded

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_NODES = 64
# Size of a temporary array of probabilities.
_BYTES_AT_ONCE = 2**24
_SHOWN_LEVELS = (0.5, 0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class Calibration(OfTargets):
    """How often test targets are where a Gaussian process says. L levels, B bins."""

    levels: FloatArray  # probabilities, shape (L,)
    # Share of targets inside of the central interval of each: equal to it if the variances are right on the average
    coverage: FloatArray
    mean_standardized_squared_residual: float  # `mean((y - f)² / v)`: 1 is right, more if variances are too small
    # `mean(½ log 2πv + ½ (y - f)² / v)` (Rasmussen and Williams 2006, Eq. 2.34)
    negative_log_predictive_density: float
    scale: float  # the factor that variances were multiplied with
    includes_noise: bool  # whether the noise is part of v
    # For classes, in bins of the probability of the predicted one, shape (B,); empty for real targets
    confidence: FloatArray = field(default_factory=lambda: np.zeros(0), repr=False)  # mean probability, NaN if empty
    accuracy: FloatArray = field(default_factory=lambda: np.zeros(0), repr=False)  # share that is right, NaN if empty
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)  # test samples
    edges: FloatArray = field(repr=False)  # edges of the bins, shape (B + 1,)
    # `Σ counts |accuracy - confidence| / M` (Guo, Pleiss, Sun, Weinberger 2017, arXiv 1706.04599); NaN for real targets
    expected_calibration_error: float = np.nan
    mean_confidence: float = np.nan  # mean_confidence, mean_accuracy: over all test samples; NaN for real targets
    mean_accuracy: float = np.nan

    def _rows(self) -> TableRows:
        shown = [i for i, level in enumerate(self.levels) if level in _SHOWN_LEVELS] or range(len(self.levels))
        covered = ", ".join(f"{self.coverage[i]:.1%} in {self.levels[i]:.0%} intervals" for i in shown)
        noise = "with noise" if self.includes_noise else "without noise"
        rows = [
            ("coverage", covered),
            ("standardized residual²", f"{self.mean_standardized_squared_residual:.4g} on the average; 1 is right"),
            ("log predictive density", f"{-self.negative_log_predictive_density:.4g} on the average"),
            ("variances", f"times {self.scale:.4g}, {noise}"),
        ]
        if len(self.counts):
            means = f"{self.mean_confidence:.1%} confident, {self.mean_accuracy:.1%} right"
            rows.append(("classes", f"{means}; expected calibration error {self.expected_calibration_error:.3g}"))
        return rows


@recorded()
def calibration(
    posterior: Posterior,
    test_targets: ArrayLike,
    *,
    classes: ArrayLike | None = None,
    scale: float | Literal["likelihood"] = 1.0,
    include_noise: bool = True,
    levels: Sequence[float] = LEVELS,
    bins: int = 10,
    task: Task = "auto",
    num_draws: int = 2000,
    seed: int = 0,
) -> Calibration:
    """Compare a posterior with the targets of its test samples.

    Every output of every test sample counts as one number with a normal distribution of mean f and variance v. For
    classes the targets are one-hot there, and besides, the probability of a class is that of its output being the
    largest: with independent outputs by Gauss-Hermite quadrature, with the correlated ones of a full NTK by draws.
    Memory is some temporaries of 16 MiB, and M · O numbers.

    Parameters
    ----------
    posterior
        A posterior with test samples. Its fit has decided what targets are.
    test_targets
        Labels of classes (M,), or real targets (M,) or (M, O). A class that training does not have counts as wrong.
    classes
        Labels in the order of the outputs, for a posterior that does not know them: of one-hot columns that were given
        as real targets, or of an older version. Default those of the posterior.
    scale
        Factor of all variances: 1 takes the kernel as it is; ``"likelihood"`` is ``posterior.scale``, since NTKs are
        not scaled for targets.
    include_noise
        Whether v is the variance of targets, or of the function alone.
    levels
        Probabilities of central intervals, between 0 and 1.
    bins
        Number of equal bins for the probability of the predicted class.
    num_draws
        Number of draws for probabilities with a full NTK.
    seed
        Seed of the draws.

    Raises
    ------
    ConfigError
        If shapes do not fit, a variance is zero, or an option is out of range.
    """
    if not len(posterior.mean):
        raise ConfigError("the posterior has no test samples; give gaussian_process a test_kernel and test_diagonal")
    factor = posterior.scale if scale == "likelihood" else float(check_number("scale", scale, low=0.0))
    check_number("bins", bins, low=1, high=10**6)
    check_number("num_draws", num_draws, low=1, high=10**8)
    for level in levels:
        check_number("levels", level, low=0.0, high=1.0)
    targets = _encoded(posterior, test_targets, classes, task)
    noise = posterior.noise if include_noise else 0.0
    variance = factor * (posterior.variance + noise)
    if not (variance > 0.0).all():
        raise ConfigError(
            f"a variance is zero (scale={factor:.3g}), so nothing can be compared with it; give a ridge, or "
            "include_noise=True"
        )
    squares = (targets.matrix - posterior.mean) ** 2 / variance
    halves = ndtri(0.5 + np.asarray(levels, np.float64) / 2)
    coverage = np.array([float(np.mean(squares <= half**2)) for half in halves])
    density = 0.5 * np.log(2 * np.pi * variance) + 0.5 * squares
    table: dict[str, Any] = {}
    if targets.codes is not None:
        probabilities = _probabilities(posterior, factor, noise, targets.is_binary, num_draws, seed)
        table = _reliability(probabilities, targets, targets.predicted(posterior.mean), bins)
    size = f"{targets.matrix.size:,} numbers of {len(targets.matrix):,} test samples"
    return Calibration(
        status="converged",
        options={"task": posterior.options.get("task", task)},
        message=size + targets.note,
        matrix=posterior.matrix,
        levels=np.asarray(levels, np.float64),
        coverage=coverage,
        mean_standardized_squared_residual=float(squares.mean()),
        negative_log_predictive_density=float(density.mean()),
        scale=factor,
        includes_noise=include_noise,
        edges=np.linspace(0.0, 1.0, bins + 1),
        **targets.fields,
        **table,
    )


def _encoded(posterior: Posterior, test_targets: ArrayLike, classes: ArrayLike | None, task: Task) -> Targets:
    """Test targets, as those of the fit were encoded: they may lack classes, so that nothing is read from them."""
    columns = posterior.mean.shape[1]
    named: Any = posterior.classes if classes is None else classes
    labels = None if named is None else as_values(named, "classes")
    is_binary = columns == 1 and labels is not None and labels.shape == (2,)
    if labels is not None and not (labels.shape == ((2,) if is_binary else (columns,)) == np.unique(labels).shape):
        raise ConfigError(f"classes={labels.tolist()!r} for {columns} outputs; needed another label for each")
    if labels is None and columns > 1 and np.ndim(test_targets) == 1:
        raise ConfigError(
            f"labels as test targets for {columns} outputs without names: train targets were real, or the posterior "
            "is one of an older version; give the labels in the order of the outputs as classes="
        )
    taken = "regression" if labels is None else "binary" if is_binary else "classification"
    if task not in {"auto", taken}:
        how = "it is decided at the fit, gaussian_process(task=)"
        raise ConfigError(f"task={task!r} for a posterior of {posterior.targets or taken}; {how}")
    targets = encode_test(test_targets, Targets(np.zeros((0, columns)), labels, None, False, is_binary))
    if targets.matrix.shape != posterior.mean.shape:
        raise ConfigError(f"test targets of shape {np.shape(test_targets)} for predictions {posterior.mean.shape}")
    return targets


def _reliability(
    probabilities: FloatArray, targets: Targets, predicted: NDArray[np.int64], bins: int
) -> dict[str, Any]:
    """Confidence against accuracy, in bins."""
    confidence = probabilities[np.arange(len(predicted)), predicted]
    right = (predicted == targets.codes).astype(np.float64)
    places = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    counts = np.bincount(places, minlength=bins)
    sums = (np.bincount(places, values, minlength=bins) for values in (confidence, right))
    confident, accurate = (np.divide(total, counts, out=np.full(bins, np.nan), where=counts > 0) for total in sums)
    gaps = np.abs(accurate - confident)[counts > 0]
    return {
        "confidence": confident,
        "accuracy": accurate,
        "counts": counts.astype(np.int64),
        "expected_calibration_error": float(gaps @ counts[counts > 0]) / len(predicted),
        "mean_confidence": float(confidence.mean()),
        "mean_accuracy": float(right.mean()),
    }


def _probabilities(
    posterior: Posterior, factor: float, noise: float, is_binary: bool, num_draws: int, seed: int
) -> FloatArray:
    """Probabilities of classes, shape (M, C): that an output is the largest, or that a shared one has this sign."""
    width = posterior.covariance.shape[1]
    if is_binary:
        ratios = posterior.mean[:, 0] / np.sqrt(factor * (posterior.variance[:, 0] + noise))
        return np.stack([ndtr(-ratios), ndtr(ratios)], axis=1)
    if width == 1:
        return largest_of_independent(posterior.mean, factor * (posterior.variance[:, 0] + noise))
    rng = np.random.default_rng(seed)
    draws = rng.standard_normal((num_draws, width))
    found = np.empty_like(posterior.mean)
    for sample, (mean, block) in enumerate(zip(posterior.mean, posterior.covariance, strict=True)):
        values, vectors = np.linalg.eigh(factor * (block + noise * np.eye(width)))
        outcomes = mean + draws @ (vectors * np.sqrt(np.maximum(values, 0.0))).T
        found[sample] = np.bincount(outcomes.argmax(axis=1), minlength=width) / num_draws
    return found


def largest_of_independent(mean: FloatArray, variance: FloatArray) -> FloatArray:
    """The probability that each of O independent normal numbers of equal variance is the largest, shape (M, O).

    ``P(c) = ∫ φ(t) Π_{j≠c} Φ(t + (m_c - m_j) / s) dt``, by Gauss-Hermite quadrature with 64 nodes.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    weights = weights / np.sqrt(2 * np.pi)
    found = np.empty_like(mean)
    outputs = mean.shape[1]
    for some in runs(len(mean), max(1, _BYTES_AT_ONCE // (8 * _NODES * outputs**2))):
        gaps = (mean[some, :, None] - mean[some, None, :]) / np.sqrt(variance[some])[:, None, None]
        logs = log_ndtr(nodes + gaps[..., None])
        logs[:, range(outputs), range(outputs)] = 0.0
        found[some] = np.exp(logs.sum(axis=2)) @ weights
    return found
