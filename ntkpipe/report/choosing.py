"""Which ridge the page speaks of: the one that training data alone would choose."""

from dataclasses import dataclass

import numpy as np

from ntkpipe.report.findings import Findings


@dataclass(frozen=True)
class Chosen:
    """The ridge that training data alone would choose, and how it does on the test set."""

    index: int  # among the ridges
    ridge: float  # λ
    criterion: str  # what it was chosen by, in words
    test_loss: float  # test_loss, test_accuracy: naN where not known
    test_accuracy: float


def choose(found: Findings) -> Chosen:
    """By leave-one-out loss, or where that is not known by cross-validation; of equal ones the largest ridge."""
    ridges, left_out, crossed = found.arrays("ridges", "leave_one_out_loss", "generalised_cross_validation")
    is_left_out = bool(np.isfinite(left_out).any())
    losses = np.where(np.isfinite(losses := left_out if is_left_out else crossed), losses, np.inf)
    solved = np.array([status == "converged" for status in found.texts("statuses")])
    if len(solved) == len(losses) and (solved & np.isfinite(losses)).any():
        losses = np.where(solved, losses, np.inf)
    index = min(range(len(ridges)), key=lambda place: (losses[place], -ridges[place]))
    loss, accuracy = (float(found.array(name)[index]) for name in ("test_loss", "test_accuracy"))
    criterion = "leave-one-out loss" if is_left_out else "generalised cross-validation"
    return Chosen(index, float(ridges[index]), criterion, loss, accuracy)
