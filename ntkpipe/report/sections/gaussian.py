"""The section on the Gaussian process: how sure it is, and how rightly."""

from functools import partial

import numpy as np
from matplotlib.axes import Axes

from ntkpipe.base.arrays import FloatArray
from ntkpipe.learning.gaussian.calibration import Calibration
from ntkpipe.learning.gaussian.process import Posterior
from ntkpipe.report.gather import Chapter, Gathered
from ntkpipe.report.parts import Part, Plot, in_numbers, share
from ntkpipe.report.theme import COLOURS, label, line, percent

_INTRO = (
    "With the kernel as covariance and the ridge λ as variance of the noise, regression is the mean of a Gaussian "
    "process, which also says how sure it is (Rasmussen and Williams 2006, Eqs. 2.25 to 2.30). An NTK has no scale "
    "that fits the targets, so variances are shown as they are and multiplied with s², the factor that makes the "
    "training targets most likely; means do not change. For classes the likelihood is Gaussian, too.",
)


def _show(found: Posterior, gathered: Gathered) -> tuple[list[Part], None]:
    """Coverage of intervals, and of classes their confidence against how often they are right."""
    scaled, plain = gathered.calibrations
    kinds = (("times s²", scaled), ("as they are", plain))
    parts: list[Part] = [_coverage(scaled.levels, scaled.coverage, plain.coverage)]
    if len(scaled.counts):
        parts.append(_reliability(scaled))
    parts.append(in_numbers("The posterior", found))
    parts += [in_numbers(f"Its calibration, variances {said},", one) for said, one in kinds]
    return parts, None


GAUSSIAN = Chapter("gaussian_process", "Gaussian process and its calibration", _INTRO, _show)


def _coverage(levels: FloatArray, scaled: FloatArray, plain: FloatArray) -> Plot:
    place = int(np.argmin(np.abs(levels - 0.9)))
    said = (
        f"Of intervals that should hold {share(levels[place], 0)} of the test targets, those of the scaled posterior "
        f"hold {share(scaled[place])}, unscaled {share(plain[place])}."
    )
    return Plot(
        "coverage",
        "Calibration of the posterior",
        partial(coverage, nominal=levels, scaled=scaled, plain=plain),
        f"Line of the share of test targets in intervals over the probability of these. {said}",
        (
            "For each probability, the interval around the mean that should hold a target with it. On the dashed "
            "diagonal the posterior is calibrated; above it intervals are too wide, below it too narrow.",
            said,
            "Most entries of one-hot columns are zeros that are predicted well, so errors have heavier tails than a "
            "normal distribution: the line is then above the diagonal except near 100%.",
        ),
    )


def _reliability(found: Calibration) -> Plot:
    sure, right = share(found.mean_confidence), share(found.mean_accuracy)
    said = f"On average the process is {sure} sure of its class and right in {right} of the test samples"
    counts = found.counts.astype(np.float64)
    draw = partial(reliability, confidence=found.confidence, accuracy=found.accuracy, counts=counts)
    return Plot(
        "reliability",
        "Confidence in the predicted class",
        draw,
        f"Points of the share of test samples that are right over the confidence in their class. {said}.",
        (
            "Test samples in bins of the probability that the predicted class has the largest output, with s² as "
            "above. Points below the diagonal are overconfident, points above it are too modest. Bars are one standard "
            "error.",
            f"{said}; the expected calibration error (Guo et al. 2017, arXiv 1706.04599) is "
            f"{share(found.expected_calibration_error)}.",
        ),
    )


def coverage(axes: Axes, nominal: FloatArray, scaled: FloatArray, plain: FloatArray) -> None:
    """How many targets lie in intervals that should hold a given share of them; variances scaled, and as they are."""
    axes.plot([0, 100], [0, 100], label="calibrated", **line("reference"))
    axes.plot(100 * nominal, 100 * scaled, label="variances times s²", **line("test", len(nominal)))
    axes.plot(100 * nominal, 100 * plain, label="as they are", **line("unscaled", len(nominal)))
    percent(axes, "xy")
    label(axes, "probability of the interval [%]", "test targets inside [%]")


def reliability(axes: Axes, confidence: FloatArray, accuracy: FloatArray, counts: FloatArray) -> None:
    """How many of the samples are right that have a given confidence, in bins; empty ones are left out."""
    axes.plot([0, 100], [0, 100], label="calibrated", **line("reference"))
    kept = counts > 0
    # With a right and a wrong one added: bins of few samples are not sure because these agree.
    smoothed = (accuracy * counts + 1) / (counts + 2)
    errors = np.sqrt(np.maximum(smoothed * (1 - smoothed), 0) / (counts + 2))[kept]
    axes.errorbar(
        100 * confidence[kept],
        100 * accuracy[kept],
        yerr=100 * errors,
        label="test samples in bins",
        ecolor=COLOURS["grey"],
        capsize=3,
        **line("test"),
    )
    percent(axes, "xy")
    label(axes, "confidence in the predicted class [%]", "test samples right [%]")
