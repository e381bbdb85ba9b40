"""A Gaussian process at one ridge, and whether its variances can be believed, before and after they are scaled."""

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.learning.gaussian.calibration import calibration
from ntkpipe.learning.gaussian.process import gaussian_process
from ntkpipe.solvers.on_store import StoreRequest
from ntkpipe.solvers.result import Result

# What is taken over as it is.
_OF_POSTERIOR: tuple[str, ...] = ("status", "message", "work", "matrix", "method", "why", "data_fit", "complexity")
_OF_POSTERIOR += ("scale", "log_marginal_likelihood", "log_marginal_likelihood_error")
_OF_CALIBRATION: tuple[str, ...] = ("levels", "coverage", "confidence", "accuracy", "counts")
_OF_CALIBRATION += ("expected_calibration_error", "mean_confidence", "mean_accuracy")


@dataclass(frozen=True, kw_only=True)
class JudgedPosterior(Result):
    """A posterior and its calibration; options hold the ridge."""

    method: str  # method, why: how it was found
    why: str
    # log_marginal_likelihood, log_marginal_likelihood_error, data_fit, complexity, scale: of
    # :class:`ntkpipe.learning.gaussian.process.Posterior`
    log_marginal_likelihood: float
    log_marginal_likelihood_error: float
    data_fit: float
    complexity: float
    scale: float
    mean_deviation: float  # mean standard deviation of the function at test samples, scaled
    # levels, coverage, unscaled_coverage: of :class:`ntkpipe.learning.gaussian.calibration.Calibration`, with
    # variances scaled, and as they are
    levels: FloatArray
    coverage: FloatArray
    unscaled_coverage: FloatArray
    # confidence, accuracy, counts, expected_calibration_error, mean_confidence, mean_accuracy: of it, scaled
    confidence: FloatArray = field(repr=False)
    accuracy: FloatArray = field(repr=False)
    counts: NDArray[np.int64] = field(repr=False)
    expected_calibration_error: float
    mean_confidence: float
    mean_accuracy: float
    # squared_residual, unscaled_squared_residual, log_density, unscaled_log_density: its mean standardized squared
    # residual, and log predictive density
    squared_residual: float
    unscaled_squared_residual: float
    log_density: float
    unscaled_log_density: float


def judge_posterior(
    request: StoreRequest,
    targets: ArrayLike,
    test_kernel: Any,
    test_diagonal: ArrayLike,
    test_targets: ArrayLike,
    ridge: float,
) -> JudgedPosterior:
    """Condition on the targets, and compare with the test targets."""
    begin = perf_counter()
    posterior = gaussian_process(
        request.operator,
        targets,
        ridge=ridge,
        test_kernel=test_kernel,
        test_diagonal=test_diagonal,
        memory_limit=request.memory_limit,
        monitor=request.monitor,
    )
    classes = np.unique(np.asarray(targets)) if np.ndim(targets) == 1 and posterior.mean.shape[1] > 1 else None
    if classes is not None and len(classes) != posterior.mean.shape[1]:
        classes = None  # a full NTK has outputs of classes that do not occur
    plain = calibration(posterior, test_targets, classes=classes)
    scaled = calibration(posterior, test_targets, classes=classes, scale="likelihood")
    return JudgedPosterior(
        **{name: getattr(posterior, name) for name in _OF_POSTERIOR},
        seconds=perf_counter() - begin,
        options={"ridge": ridge},
        mean_deviation=float(np.sqrt(posterior.scale * posterior.variance).mean()),
        **{name: getattr(scaled, name) for name in _OF_CALIBRATION},
        unscaled_coverage=plain.coverage,
        squared_residual=scaled.mean_standardized_squared_residual,
        unscaled_squared_residual=plain.mean_standardized_squared_residual,
        log_density=-scaled.negative_log_predictive_density,
        unscaled_log_density=-plain.negative_log_predictive_density,
    )
