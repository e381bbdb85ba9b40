"""The section on how well the kernel fits the targets."""

from functools import partial

from ntkpipe.analysis.alignment import Alignment
from ntkpipe.base.arrays import FloatArray
from ntkpipe.report.figures.spectrum import cumulative
from ntkpipe.report.gather import Chapter, Gathered
from ntkpipe.report.parts import Part, Plot
from ntkpipe.report.sections.words import in_numbers, share

_INTRO = (
    "A kernel learns quickly what lies along its leading eigenvectors. The cumulative power C(k) is the share of the "
    "targets' squared length in the first k of them (Canatar et al. 2021, arXiv 2006.13198); alignments say the same "
    "in one number, the cosine between K and Y Yᵀ as matrices.",
)
_SHARES = ("50%", "90%", "99%")


def _show(found: Alignment, gathered: Gathered) -> tuple[tuple[Part, ...], None]:
    """Cumulative power and alignments."""
    spectrum = gathered.results.get("spectrum")
    held = found.eigenvalues.cumsum() / spectrum.trace if spectrum is not None and spectrum.trace > 0 else None
    return (_plot(found, held), in_numbers("Alignment", found)), None


ALIGNMENT = Chapter("alignment", "Alignment of kernel and targets", _INTRO, _show)


def _plot(found: Alignment, held: FloatArray | None) -> Plot:
    power, counts = found.cumulative_power, _directions(found)
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


def _directions(found: Alignment) -> list[str]:
    return ["more than are known" if count is None else f"{count:,}" for count in found.num_directions]
