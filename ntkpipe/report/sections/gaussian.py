"""The section on the Gaussian process: how sure it is, and how rightly."""

import math

import numpy as np

from ntkpipe.report.figures.regression import coverage, reliability
from ntkpipe.report.findings import Findings, Missing
from ntkpipe.report.parts import PageTable, Part, Plot, Section
from ntkpipe.report.sections.words import method_in_words, number, share, warnings, with_error
from ntkpipe.report.theme import render

_TITLE = "Gaussian process and its calibration"
_INTRO = (
    "With the kernel as covariance and the ridge λ as variance of the noise, regression is the mean of a Gaussian "
    "process, which also says how sure it is (Rasmussen and Williams 2006, Eqs. 2.25 to 2.30). An NTK has no scale "
    "that fits the targets, so variances are shown as they are and multiplied with s², the factor that makes the "
    "training targets most likely; means do not change. Targets of classes are one-hot columns here, with a Gaussian "
    "likelihood.",
)


def gaussian_section(found: Findings | Missing) -> Section:
    """Coverage of intervals, and of classes their confidence against how often they are right."""
    if isinstance(found, Missing):
        return Section("gaussian-process", _TITLE, _INTRO, (), found.why)
    parts: list[Part] = [_coverage(found)]
    if len(found.array("counts")):
        parts.append(_reliability(found))
    parts.append(_numbers(found))
    parts += warnings(found)
    return Section("gaussian-process", _TITLE, _INTRO, tuple(parts))


def _coverage(found: Findings) -> Plot:
    levels, scaled, plain = found.arrays("levels", "coverage", "unscaled_coverage")
    place = int(np.argmin(np.abs(levels - 0.9)))
    said = (
        f"Of intervals that should hold {share(levels[place], 0)} of the test targets, those of the scaled posterior "
        f"hold {share(scaled[place])}, unscaled {share(plain[place])}."
    )
    return Plot(
        "coverage",
        "Calibration of the posterior",
        render(coverage(levels, scaled, plain), height=0.6),
        f"Line of the share of test targets in intervals over the probability of these. {said}",
        (
            "For each probability, the interval around the mean that should hold a target with it. On the dashed "
            "diagonal the posterior is calibrated; above it intervals are too wide, below it too narrow.",
            said,
            "Of one-hot columns most entries are zeros that are predicted well, so errors have heavier tails than a "
            "normal distribution: the line is then above the diagonal except near 100%.",
        ),
    )


def _reliability(found: Findings) -> Plot:
    confidence, accuracy, counts = found.arrays("confidence", "accuracy", "counts")
    sure, right = found.number("mean_confidence"), found.number("mean_accuracy")
    said = f"On average the process is {share(sure)} sure of its class and right in {share(right)} of the test samples"
    return Plot(
        "reliability",
        "Confidence in the predicted class",
        render(reliability(confidence, accuracy, counts), height=0.6),
        f"Points of the share of test samples that are right over the confidence in their class. {said}.",
        (
            "Test samples in bins of the probability that the predicted class has the largest output, with s² as "
            "above. Points below the diagonal are overconfident, points above it are too modest. Bars are one standard "
            "error.",
            f"{said}; the expected calibration error (Guo et al. 2017, arXiv 1706.04599) is "
            f"{share(found.number('expected_calibration_error'))}.",
        ),
    )


def _numbers(found: Findings) -> PageTable:
    likelihood = with_error(found.number("log_marginal_likelihood"), found.number("log_marginal_likelihood_error"))
    scale = found.number("scale")
    factor = math.sqrt(scale) if scale >= 0 else math.nan
    rows = [
        ("noise variance λ", number(float(found.mapping("options")["ridge"]), 3)),
        ("log marginal likelihood, s² = 1", likelihood),
        ("its data fit and complexity", f"{number(found.number('data_fit'))} and {number(found.number('complexity'))}"),
        ("scale of variances s²", f"{number(scale)}; standard deviations are multiplied with {number(factor)}"),
        ("mean standard deviation of the function", f"{number(found.number('mean_deviation'))}, scaled"),
        ("mean of (y − f)² / v", _both(found, "squared_residual") + "; one is right"),
        ("mean log predictive density", _both(found, "log_density")),
        ("computed", method_in_words(found)),
    ]
    return PageTable("The posterior in numbers", (), tuple(rows))


def _both(found: Findings, name: str) -> str:
    return f"{number(found.number(name))} scaled, {number(found.number(f'unscaled_{name}'))} as it is"
