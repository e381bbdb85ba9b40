"""The section that shows the kernel."""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from ntkpipe.report.blocks import Arrangement
from ntkpipe.report.figures.kernel import MOST_NAMES, class_means, picture
from ntkpipe.report.parts import Note, PageTable, Part, Plot, Section

_SQUARE = 1.16  # height of a matrix with its colour bar


def kernel_section(means: list[NDArray[np.float64]], arrangement: Arrangement, num_samples: int) -> Section:
    """The kernel as a picture, and means over pairs of classes where there are classes."""
    each = num_samples / arrangement.num_bins
    pixel = "a pair of samples" if each <= 1 else f"the mean over about {each:.0f} × {each:.0f} pairs of samples"
    is_by_class = arrangement.classes is not None
    order, names, bounds = arrangement.order, arrangement.names, arrangement.bounds
    reading = [
        f"Both axes are the {num_samples:,} training samples, {order}; each pixel is {pixel}, entries of a "
        "sample with itself left out. Yellow is large, blue is small; the colours leave out the most extreme 0.5% at "
        "either end.",
    ]
    if is_by_class:
        reading.append(
            "Bright squares along the diagonal mean that the kernel knows the classes: samples of one class have "
            "gradients that point the same way. Bright or dark stripes are samples whose gradients are long or short "
            "altogether; such a common factor helps no classification."
        )
    name = "Kernel, samples sorted by class" if is_by_class else f"Kernel, samples {order}"
    draw = partial(picture, means=means[0], num_samples=num_samples, bounds=bounds, names=names, order=order)
    alt = f"Heat map of the kernel of {num_samples:,} samples."
    whole = Plot("picture", name, draw, alt, tuple(reading), _SQUARE)
    no_classes = Note("The targets are no labels of classes, so there is no picture by class.")
    by_class = _by_class(means[1], names) if is_by_class else (no_classes,)
    return Section("kernel", "The kernel", (), (whole, *by_class))


def _by_class(means: NDArray[np.float64], names: tuple[str, ...]) -> tuple[Part, ...]:
    same = float(np.mean(means.diagonal()))
    off = means[~np.eye(len(means), dtype=bool)]
    other = float(off.mean()) if off.size else float("nan")
    ratio = f", a ratio of {same / other:.3g}" if off.size and other > 0 else ""
    said = f"On average it is {same:.4g} within a class and {other:.4g} between classes{ratio}."
    title = "Mean kernel entry of each pair of classes"
    plot = Plot(
        "class-means",
        title,
        partial(class_means, means=means, names=names),
        f"Heat map of {len(means)} × {len(means)} class means. {said}",
        (
            f"The mean of K(x, x′) over x of one class and x′ of another, a sample with itself left out. {said}",
            "A square off the diagonal that is as bright as those of its two classes on the diagonal is a pair that "
            "the kernel hardly tells apart.",
        ),
        _SQUARE,
    )
    if len(names) > MOST_NAMES:
        return (plot,)
    rows = tuple((name, *(f"{mean:.3g}" for mean in row)) for name, row in zip(names, means, strict=True))
    return plot, PageTable(f"{title}, in numbers", ("class", *names), rows, is_folded=True)
