"""The section on eigenvalues: by rank, by size, and in numbers."""

import math
from functools import partial

import numpy as np

from ntkpipe.analysis.spectrum import KernelSpectrum
from ntkpipe.report.figures.spectrum import TailLine, density, eigenvalues
from ntkpipe.report.gather import Chapter, Gathered
from ntkpipe.report.parts import Part, Plot
from ntkpipe.report.sections.words import in_numbers, number

_INTRO = (
    "Under gradient flow a component of the residual along the kth eigenvector decays like exp(−ηλₖt), and ridge "
    "regression fits it to the part λₖ / (λₖ + λ): the spectrum says what is learnt first, and what is hardly learnt "
    "at all.",
)


def _show(found: KernelSpectrum, _: Gathered) -> tuple[tuple[Part, ...], None]:
    """Eigenvalues by rank and by size, and what is said of them in numbers."""
    return (_by_rank(found), _by_size(found), in_numbers("The spectrum", found)), None


SPECTRUM = Chapter("spectrum", "Spectrum and density", _INTRO, _show)


def _fit(found: KernelSpectrum) -> TailLine | None:
    exponent, error, amplitude = found.tail_exponent, found.tail_exponent_error, found.tail_prefactor
    first, last = found.tail_first_rank, found.tail_last_rank
    if exponent is None or error is None or amplitude is None or first is None or last is None:
        return None
    return TailLine(exponent, error, amplitude, first, last)


def _by_rank(found: KernelSpectrum) -> Plot:
    values, num_rows, floor, fit = found.eigenvalues, found.num_rows, found.floor, _fit(found)
    first = 100 * found.largest / found.trace
    reading = [
        "Both axes are logarithmic, so a power law is a straight line. An isolated first eigenvalue is mostly the mean "
        f"of the kernel's entries, along the constant function; here it holds {first:.0f}% of the trace.",
    ]
    if fit is not None:
        of_halves = (found.tail_exponent_of_first_half, found.tail_exponent_of_second_half)
        halves = " and ".join("–" if one is None else f"{one:.2f}" for one in of_halves)
        reading.append(
            f"Ranks {fit.first} to {fit.last} fall like k^−{fit.exponent:.2f} (± {fit.error:.2f} by jackknife). Its "
            f"two halves alone have exponents {halves}; where these differ by much more than the error, "
            "the line bends, and no single exponent describes it."
        )
    reading.append(
        f"The storage floor ({floor:.2g}) is what rounding to the stored dtype moves eigenvalues by; below it nothing "
        "is known."
    )
    return Plot(
        "eigenvalues",
        "Eigenvalues by rank",
        partial(eigenvalues, values=values, num_rows=num_rows, floor=floor, fit=fit),
        f"Line of {len(values):,} of {num_rows:,} eigenvalues by rank, on logarithmic axes, from "
        f"{number(found.largest)} down to {number(float(values[-1]))}.",
        tuple(reading),
    )


def _by_size(found: KernelSpectrum) -> Plot:
    places, heights = found.density_grid, found.density
    peak = float(places[int(np.argmax(heights))]) if len(places) else math.nan
    is_estimate = found.method != "exact"
    how = "It was estimated by stochastic Lanczos quadrature" if is_estimate else "It is from all eigenvalues"
    return Plot(
        "density",
        "Density of eigenvalues",
        partial(density, places=places, heights=heights, floor=found.floor, is_estimate=is_estimate),
        f"Curve of the number of eigenvalues per decade over their size; the most are near {number(peak, 2)}.",
        (
            "The area below the curve between two sizes is the number of eigenvalues between them; a decade is a "
            f"factor of ten. Most of them are near {number(peak, 2)}.",
            "The bulk on the left are the many directions that a ridge of that size gives up; the few on the right are "
            "what the kernel learns with ease.",
            f"{how}, each smoothed by a bell of 0.1 decades.",
        ),
    )
