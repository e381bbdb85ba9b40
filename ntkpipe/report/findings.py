"""What a page says of analyses beside their own results: those that are missing, and the ridge that a path chooses."""

from dataclasses import dataclass

import numpy as np

from ntkpipe.learning.gaussian.calibration import Calibration
from ntkpipe.learning.gaussian.process import Posterior
from ntkpipe.learning.regression.ridge_path import RidgePath

HOW_TO_TEST = "compute the kernel with test_inputs and test_targets (`ntkpipe run FILE --grow` adds them)."


@dataclass(frozen=True)
class Missing:
    """An analysis that was not done."""

    why: str  # one sentence: what is missing, and how to get it


@dataclass(frozen=True)
class Judged:
    """A posterior, and whether its variances can be believed."""

    posterior: Posterior
    scaled: Calibration  # scaled, plain: with variances multiplied with s², and as they are
    plain: Calibration


@dataclass(frozen=True)
class Chosen:
    """The ridge that training data alone would choose, and how it does on the test set."""

    index: int  # among the ridges
    ridge: float  # λ
    criterion: str  # what it was chosen by, in words
    test_loss: float  # test_loss, test_accuracy: NaN where not known
    test_accuracy: float


def choose(path: RidgePath) -> Chosen:
    """By leave-one-out loss, or where that is not known by cross-validation; of equal ones the largest ridge."""
    is_left_out = bool(np.isfinite(path.leave_one_out_loss).any())
    losses = path.leave_one_out_loss if is_left_out else path.generalised_cross_validation
    losses = np.where(np.isfinite(losses), losses, np.inf)
    solved = np.array([status == "converged" for status in path.statuses])
    if (solved & np.isfinite(losses)).any():
        losses = np.where(solved, losses, np.inf)
    index = min(range(len(path.ridges)), key=lambda place: (losses[place], -path.ridges[place]))
    criterion = "leave-one-out loss" if is_left_out else "generalised cross-validation"
    loss, accuracy = float(path.test_loss[index]), float(path.test_accuracy[index])
    return Chosen(index, float(path.ridges[index]), criterion, loss, accuracy)
