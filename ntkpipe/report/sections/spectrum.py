"""The sections on eigenvalues, and on how well targets lie along eigenvectors."""

import math
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from ntkpipe.analysis.alignment import Alignment
from ntkpipe.analysis.spectrum import KernelSpectrum
from ntkpipe.base.arrays import FloatArray
from ntkpipe.report.gather import Chapter, Gathered
from ntkpipe.report.parts import Part, Plot, in_numbers, number, share
from ntkpipe.report.theme import COLOURS, label, line, linear, logarithmic, percent, thinned

_OF_SPECTRUM = (
    "Under gradient flow a component of the residual along the kth eigenvector decays like exp(−ηλₖt), and ridge "
    "regression fits it to the part λₖ / (λₖ + λ): the spectrum says what is learnt first, and what is hardly learnt "
    "at all.",
)


def _show_spectrum(found: KernelSpectrum, _: Gathered) -> tuple[tuple[Part, ...], None]:
    """Eigenvalues by rank and by size, and what is said of them in numbers."""
    return (_by_rank(found), _by_size(found), in_numbers("The spectrum", found)), None


SPECTRUM = Chapter("spectrum", "Spectrum and density", _OF_SPECTRUM, _show_spectrum)


def _by_rank(found: KernelSpectrum) -> Plot:
    first = 100 * found.largest / found.trace
    reading = [
        "Both axes are logarithmic, so a power law is a straight line. An isolated first eigenvalue is mostly the mean "
        f"of the kernel's entries, along the constant function; here it holds {first:.0f}% of the trace.",
    ]
    if found.tail_exponent is not None:
        of_halves = (found.tail_exponent_of_first_half, found.tail_exponent_of_second_half)
        halves = " and ".join("–" if one is None else f"{one:.2f}" for one in of_halves)
        reading.append(
            f"Ranks {found.tail_first_rank} to {found.tail_last_rank} fall like k^−{found.tail_exponent:.2f} "
            f"(± {found.tail_exponent_error:.2f} by jackknife). Its two halves alone have exponents {halves}; where "
            "these differ by much more than the error, the line bends, and no single exponent describes it."
        )
    reading.append(
        f"The storage floor ({found.floor:.2g}) is what rounding to the stored dtype moves eigenvalues by; below it "
        "nothing is known."
    )
    return Plot(
        "eigenvalues",
        "Eigenvalues by rank",
        partial(eigenvalues, found=found),
        f"Line of {len(found.eigenvalues):,} of {found.num_rows:,} eigenvalues by rank, on logarithmic axes, from "
        f"{number(found.largest)} down to {number(float(found.eigenvalues[-1]))}.",
        tuple(reading),
    )


def _by_size(found: KernelSpectrum) -> Plot:
    places, heights = found.density_grid, found.density
    peak = float(places[int(np.argmax(heights))]) if len(places) else math.nan
    is_exact = found.method == "exact"
    how = "It is from all eigenvalues" if is_exact else "It was estimated by stochastic Lanczos quadrature"
    return Plot(
        "density",
        "Density of eigenvalues",
        partial(density, found=found),
        f"Curve of the number of eigenvalues per decade over their size; the most are near {number(peak, 2)}.",
        (
            "The area below the curve between two sizes is the number of eigenvalues between them; a decade is a "
            f"factor of ten. Most of them are near {number(peak, 2)}.",
            "The bulk on the left are the many directions that a ridge of that size gives up; the few on the right are "
            "what the kernel learns with ease.",
            f"{how}, each smoothed by a bell of 0.1 decades.",
        ),
    )


def eigenvalues(axes: Axes, found: KernelSpectrum) -> None:
    """Eigenvalues by rank, as known; the power law of their tail and the storage floor."""
    positive = np.flatnonzero(found.eigenvalues > 0)
    shown = positive[thinned(len(positive))]
    axes.plot(shown + 1, found.eigenvalues[shown], label="eigenvalues of K", **line("kernel", len(shown)))
    if found.tail_exponent is not None and found.tail_prefactor is not None:
        ranks = np.array([found.tail_first_rank, found.tail_last_rank], np.float64)
        style = line("reference", color=COLOURS["red"], linewidth=2.2)
        said = f"power law, exponent {found.tail_exponent:.2f} ± {found.tail_exponent_error:.2f}"
        axes.plot(ranks, found.tail_prefactor * ranks**-found.tail_exponent, label=said, **style)
    if found.floor > 0:
        axes.axhline(found.floor, label="storage floor", **line("reference", linestyle=":"))
    axes.set_xlim(0.9, found.num_rows * 1.1)
    logarithmic(axes, "xy")
    label(axes, "rank k of the eigenvalue [number]", "eigenvalue λₖ [kernel units]")


def density(axes: Axes, found: KernelSpectrum) -> None:
    """Eigenvalues per decade over λ."""
    said = "all eigenvalues" if found.method == "exact" else "stochastic Lanczos quadrature"
    (drawn,) = axes.plot(found.density_grid, found.density, label=said, **line("kernel", marker=""))
    axes.fill_between(found.density_grid, found.density, color=drawn.get_color(), alpha=0.25, linewidth=0)
    logarithmic(axes, "x")
    if found.floor > 0:
        axes.axvline(found.floor, label="storage floor", **line("reference", linestyle=":"))
    linear(axes, "y")
    axes.set_ylim(bottom=0)
    label(axes, "eigenvalue λ [kernel units]", "density [eigenvalues per decade]")


_OF_ALIGNMENT = (
    "A kernel learns quickly what lies along its leading eigenvectors. The cumulative power C(k) is the share of the "
    "targets' squared length in the first k of them (Canatar et al. 2021, arXiv 2006.13198); alignments say the same "
    "in one number, the cosine between K and Y Yᵀ as matrices.",
)
_SHARES = ("50%", "90%", "99%")


def _show_alignment(found: Alignment, gathered: Gathered) -> tuple[tuple[Part, ...], None]:
    """Cumulative power and alignments."""
    spectrum = gathered.results.get("spectrum")
    held = found.eigenvalues.cumsum() / spectrum.trace if spectrum is not None and spectrum.trace > 0 else None
    return (_power(found, held), in_numbers("Alignment", found)), None


ALIGNMENT = Chapter("alignment", "Alignment of kernel and targets", _OF_ALIGNMENT, _show_alignment)


def _power(found: Alignment, held: FloatArray | None) -> Plot:
    power = found.cumulative_power
    counts = ("more than are known" if count is None else f"{count:,}" for count in found.num_directions)
    error = float(found.cumulative_power_error.max(initial=0.0))
    said = "; ".join(f"{part} of it in {count}" for part, count in zip(_SHARES, counts, strict=True))
    reading = [
        "Circles are the power of the targets in the first k eigenvectors; the sooner they rise, the fewer samples "
        f"this task needs with this kernel. Here: {said}. Dashed lines are at 50% and 90%.",
        "Squares are the share of the kernel's trace in the same eigenvectors. Where the circles are below them, "
        "the kernel spends more of its size on these directions than the targets have there.",
    ]
    if error > 0:
        reading.append(f"The leading eigenvectors are known to their residuals only: C(k) may be off by {error:.1g}.")
    if len(power) < found.num_rows:
        reading.append(f"Only the {len(power):,} leading of {found.num_rows:,} eigenvectors are known.")
    return Plot(
        "power",
        "Cumulative power of the targets",
        partial(cumulative, power=power, share=held),
        f"Line of the targets' power in the leading eigenvectors: {share(float(power[0]))} in the first, "
        f"{share(float(power[min(9, len(power) - 1)]))} in the first ten, {share(float(power[-1]))} in all that are "
        "known.",
        tuple(reading),
    )


def cumulative(axes: Axes, power: FloatArray, share: FloatArray | None) -> None:
    """Power of the targets along the k leading eigenvectors, and what of the trace these hold."""
    shown = thinned(len(power))
    axes.plot(shown + 1, 100 * power[shown], label="power of the targets", **line("test", len(shown)))
    if share is not None:
        shown = thinned(len(share))
        axes.plot(shown + 1, 100 * share[shown], label="trace of K", **line("kernel", len(shown)))
    for level in (0.5, 0.9):
        axes.axhline(100 * level, **line("reference", linewidth=0.9))
    logarithmic(axes, "x")
    percent(axes, "y")
    label(axes, "leading eigenvectors k [number]", "cumulative share [%]")
