"""The section that holds theory against the measured risk."""

from functools import partial

import numpy as np

from ntkpipe.analysis.generalisation import Generalisation
from ntkpipe.report.figures.regression import Curve, Curves, known, over_ridges
from ntkpipe.report.gather import HOW_TO_TEST, Chapter, Gathered
from ntkpipe.report.parts import PageTable, Part, Plot
from ntkpipe.report.sections import words
from ntkpipe.report.sections.words import number, with_errors

_INTRO = (
    "Can the test loss be known from the training samples alone? KARE (Jacot et al. 2020, arXiv 2006.09796) and "
    "generalised cross-validation need the training kernel and targets; for λ > 0 they are the same number. "
    "Eigenlearning (Simon et al., arXiv 2110.03922) and Canatar et al. (arXiv 2006.13198) predict the loss from the "
    "spectrum and the targets along eigenvectors; here these are the training kernel's own, which is biased where many "
    "modes are learnt. Leave-one-out is exact for these samples, and so judges the others without test data; only a "
    "kernel that was itself trained on these samples makes it too optimistic.",
)

_MARK = "mean diagonal of K"
_HEIGHT = 0.92  # of figures with long legends


def _show(found: Generalisation, gathered: Gathered) -> tuple[list[Part], str | None]:
    """Estimates across ridges, and what they are worth."""
    mean_diagonal = float(gathered.kernel.diagonal().astype(np.float64).mean())
    curves = known(
        {
            "test": Curve("test loss, measured", found.test_loss, found.test_loss_error),
            "leave-one-out": Curve("leave-one-out", found.leave_one_out_loss, found.leave_one_out_loss_error),
            "gcv": Curve("KARE = cross-validation (GCV)", found.kare, found.kare_error),
            "eigenlearning": Curve("eigenlearning, Canatar et al.", found.eigenlearning),
        }
    )
    is_measured = "test" in curves
    parts: list[Part] = [_losses(found, curves, mean_diagonal)]
    if is_measured:
        compared: Curves = {
            name: Curve(curve.label, curve.values / found.test_loss) for name, curve in curves.items() if name != "test"
        }
        parts.append(_ratios(found, compared, mean_diagonal))
    missing = f"The store has no test set with targets, so nothing is measured here; {HOW_TO_TEST}"
    return [*parts, _table(found)], None if is_measured else missing


GENERALISATION = Chapter("generalisation", "Predicted against measured risk", _INTRO, _show)


def _losses(found: Generalisation, curves: Curves, mean_diagonal: float) -> Plot:
    ridges = found.ridges
    trusted = words.ranges(ridges.tolist(), found.kare_is_trusted)
    also = words.ranges(ridges.tolist(), found.eigenlearning_is_trusted)
    return Plot(
        "estimates",
        "Loss across ridges, predicted and measured",
        partial(over_ridges, ridges=ridges, curves=curves, marked=(_MARK, mean_diagonal)),
        f"Lines of the loss over the ridge: {_in_words(curves)}.",
        (
            "Each line is one way to say what the loss on new samples is. Lines that lie on the measured one (circles) "
            "can replace a test set; one that falls below it for small λ promises too much there.",
            "Judged by leave-one-out, the measured loss where there is one, and the storage floor, KARE can be trusted "
            f"for {trusted or 'none of these ridges'}, eigenlearning for {also or 'none of these ridges'}.",
            f"Shaded: one standard error. Computed: {words.method_in_words(found.method, found.why)}.",
        ),
        _HEIGHT,
    )


def _ratios(found: Generalisation, curves: Curves, mean_diagonal: float) -> Plot:
    ridges, kare = found.ridges, found.kare / found.test_loss
    # In logarithms; zero is far from everything.
    distances = np.abs(np.log(np.maximum(ridges, 1e-300) / max(mean_diagonal, 1e-300)))
    smallest, nearest = int(np.argmin(ridges)), int(np.argmin(distances))
    return Plot(
        "ratios",
        "Estimate over measured test loss",
        partial(over_ridges, ridges=ridges, curves=curves, marked=(_MARK, mean_diagonal), unit="ratio"),
        f"Lines of the ratio of each estimate to the measured test loss over the ridge: {_in_words(curves)}.",
        (
            "One is right; below it an estimate is too optimistic. Inside of the grey band it is right within a factor "
            "of 1.25.",
            f"KARE is {number(kare[smallest], 3)} of the measured loss at λ = {ridges[smallest]:.3g}, and "
            f"{number(kare[nearest], 3)} at λ = {ridges[nearest]:.3g}, the nearest to the mean diagonal of K.",
            "KARE rests on features that look Gaussian to the kernel. Real samples are unlike each other, which shows "
            "most where nothing smooths, at λ → 0.",
        ),
        _HEIGHT,
    )


def _in_words(curves: Curves) -> str:
    """Each curve with its first and its last value."""
    finite = {curve.label: curve.values[np.isfinite(curve.values)] for curve in curves.values()}
    ends = {name: f"{number(v[0], 3)} to {number(v[-1], 3)}" if len(v) else "nothing" for name, v in finite.items()}
    return "; ".join(f"{name} from {said}" for name, said in ends.items())


def _table(found: Generalisation) -> PageTable:
    columns = {
        "test loss": with_errors(found.test_loss, found.test_loss_error),
        "KARE": with_errors(found.kare, found.kare_error),
        "GCV": map(number, found.generalised_cross_validation),
        "leave-one-out": with_errors(found.leave_one_out_loss, found.leave_one_out_loss_error),
        "eigenlearning": map(number, found.eigenlearning),
        "Canatar et al.": map(number, found.canatar),
        "effective dimension": with_errors(found.effective_dimension, found.effective_dimension_error),
    }
    rows = tuple(zip(words.ridges_in_words(found.ridges), *columns.values(), found.reasons, strict=True))
    return PageTable("Numbers behind these figures", ("λ", *columns, "trust"), rows, is_folded=True)
