"""The section on eigenvalues: by rank, by size, and in numbers."""

import math

import numpy as np

from ntkpipe.report.figures.spectrum import TailLine, density, eigenvalues
from ntkpipe.report.findings import Findings, Missing
from ntkpipe.report.parts import PageTable, Part, Plot, Section
from ntkpipe.report.sections.words import method_in_words, number, ridges_in_words, warnings, with_error
from ntkpipe.report.theme import render

_TITLE = "Spectrum and density"
_INTRO = (
    "Under gradient flow a component of the residual along the kth eigenvector decays like exp(−ηλₖt), and ridge "
    "regression fits it to the part λₖ / (λₖ + λ): the spectrum says what is learnt first, and what is hardly learnt "
    "at all.",
)


def spectrum_section(found: Findings | Missing) -> Section:
    """Eigenvalues by rank and by size, and what is said of them in numbers."""
    if isinstance(found, Missing):
        return Section("spectrum", _TITLE, _INTRO, (), found.why)
    parts: list[Part] = [_by_rank(found), _by_size(found), _numbers(found)]
    parts += warnings(found)
    ridges, dimension, error = found.arrays("ridges", "effective_dimension", "effective_dimension_error")
    rows = tuple(
        (ridge, with_error(value, wrong))
        for ridge, value, wrong in zip(ridges_in_words(ridges), dimension, error, strict=True)
    )
    parts.append(PageTable("Effective dimension d(λ) = Σ λₖ / (λₖ + λ)", ("λ", "d(λ)"), rows))
    return Section("spectrum", _TITLE, _INTRO, tuple(parts))


def _fit(found: Findings) -> TailLine | None:
    exponent = found.number("tail_exponent")
    if math.isnan(exponent):
        return None
    first, last = (int(found.number(f"tail_{name}_rank")) for name in ("first", "last"))
    return TailLine(exponent, found.number("tail_exponent_error"), found.number("tail_prefactor"), first, last)


def _by_rank(found: Findings) -> Plot:
    values, num_rows, floor = found.array("eigenvalues"), int(found.number("num_rows")), found.number("floor")
    fit, largest = _fit(found), found.number("largest")
    first = largest / found.number("trace")
    reading = [
        "Both axes are logarithmic, so a power law is a straight line. An isolated first eigenvalue is mostly the mean "
        f"of the kernel's entries, along the constant function; here it holds {100 * first:.0f}% of the trace.",
    ]
    if fit is not None:
        halves = [found.number(f"tail_exponent_of_{half}_half") for half in ("first", "second")]
        reading.append(
            f"Ranks {fit.first} to {fit.last} fall like k^−{fit.exponent:.2f} (± {fit.error:.2f} by jackknife). Its "
            f"two halves alone have exponents {halves[0]:.2f} and {halves[1]:.2f}; where these differ by much more "
            "than the error, the line bends, and no single exponent describes it."
        )
    reading.append(
        f"The storage floor ({floor:.2g}) is what rounding to the stored dtype moves eigenvalues by; below it nothing "
        "is known."
    )
    return Plot(
        "eigenvalues",
        "Eigenvalues by rank",
        render(eigenvalues(values, num_rows=num_rows, floor=floor, fit=fit)),
        f"Line of {len(values):,} of {num_rows:,} eigenvalues by rank, on logarithmic axes, from {number(largest)} "
        f"down to {number(float(values[-1]))}.",
        tuple(reading),
    )


def _by_size(found: Findings) -> Plot:
    places, heights = found.arrays("density_grid", "density")
    peak = float(places[int(np.argmax(heights))]) if len(places) else float("nan")
    is_estimate = found.words("method") != "exact"
    how = "It was estimated by stochastic Lanczos quadrature" if is_estimate else "It is from all eigenvalues"
    return Plot(
        "density",
        "Density of eigenvalues",
        render(density(places, heights, floor=found.number("floor"), is_estimate=is_estimate)),
        f"Curve of the number of eigenvalues per decade over their size; the most are near {number(peak, 2)}.",
        (
            "The area below the curve between two sizes is the number of eigenvalues between them; a decade is a "
            f"factor of ten. Most of them are near {number(peak, 2)}.",
            "The bulk on the left are the many directions that a ridge of that size gives up; the few on the right are "
            "what the kernel learns with ease.",
            f"{how}, each smoothed by a bell of 0.1 decades.",
        ),
    )


def _numbers(found: Findings) -> PageTable:
    low, high = found.number("smallest_low"), found.number("smallest_high")
    least, most = found.number("condition_low"), found.number("condition_high")
    smallest = number(low) if low == high else f"{number(low)} to {number(high)}"
    condition = number(least) if least == most else f"at least {number(least)}"
    if least != most and math.isfinite(most):
        condition = f"{number(least)} to {number(most)}"
    below = with_error(found.number("num_below_floor"), found.number("num_below_floor_error"))
    rows = [
        ("rows n", f"{int(found.number('num_rows')):,}"),
        ("largest eigenvalue", number(found.number("largest"))),
        ("smallest eigenvalue", smallest),
        ("condition number, largest / smallest", condition),
        ("storage floor", f"{found.number('floor'):.2g}; {below} eigenvalues are below it"),
        ("trace", number(found.number("trace"))),
        ("Frobenius norm", number(found.number("frobenius"))),
        ("effective rank, trace / largest", number(found.number("effective_rank"))),
        ("participation ratio, (Σ λ)² / Σ λ²", number(found.number("participation_ratio"))),
        (
            "exponential of the spectral entropy",
            with_error(found.number("entropy_rank"), found.number("entropy_rank_error")),
        ),
        ("computed", method_in_words(found)),
    ]
    return PageTable("The spectrum in numbers", (), tuple(rows))
