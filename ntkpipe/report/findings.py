"""The ridge that a page recommends."""

from typing import Any

import numpy as np

from ntkpipe.learning.regression.ridge_path import Best, RidgePath

HOW_TO_TEST = "compute the kernel with test_inputs and test_targets (`ntkpipe run FILE --grow` adds them)."
CRITERIA: dict[Any, str] = {  # of `RidgePath.best_by`, in words
    "leave_one_out_loss": "leave-one-out loss",
    "generalised_cross_validation": "generalised cross-validation",
}


def choose(path: RidgePath) -> Best:
    """The best ridge by what training data alone say; the largest where they say nothing."""
    for criterion in CRITERIA:
        if np.isfinite(getattr(path, criterion)).any():
            return path.best_by(criterion)
    index = int(np.argmax(path.ridges))
    return Best(criterion=criterion, index=index, ridge=float(path.ridges[index]), value=np.nan)
