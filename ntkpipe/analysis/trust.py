"""Where estimates of the test loss can be trusted: by leave-one-out, by storage, by what was measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.solvers.inverse.contract import INDEFINITE
from ntkpipe.solvers.inverse.eigenpairs import ByEigenpairs
from ntkpipe.solvers.result import Status

# The smallest eigenvalue of K + λI must be this many storage floors for its inverse to be known.
_FLOORS = 10.0
# Standard errors by which leave-one-out and test loss differ for another reason than chance. True errors are a bit
# larger, since left-out errors are not independent.
_SIGMAS = 3.0


def judge(
    losses: dict[str, Any],
    ridges: FloatArray,
    statuses: Sequence[Status],
    spreads: FloatArray,
    system: ByEigenpairs | None,
    floor: float,
    tolerance: float,
) -> dict[str, Any]:
    """Ratios to the measured loss, and which estimates can be trusted."""
    sources = {name: name for name in ("kare", "eigenlearning", "canatar")} | {"leave_one_out": "leave_one_out_loss"}
    found = []
    for index, (ridge, status) in enumerate(zip(ridges, statuses, strict=True)):
        at = {name: float(values[index]) for name, values in losses.items() if np.ndim(values) == 1}
        is_definite = status != INDEFINITE and np.isfinite(at["kappa"])
        unknown = _unknown(float(ridge), system, floor) if is_definite else "K + λI is not positive definite; raise λ"
        found.append((False, False, unknown) if unknown else _judge_ridge(at, float(spreads[index]), tolerance))
    kare, theory, reasons = zip(*found, strict=True)
    return {
        **{f"{name}_ratio": losses[key] / losses["test_loss"] for name, key in sources.items()},
        "kare_is_trusted": kare,
        "eigenlearning_is_trusted": theory,
        "reasons": reasons,
    }


def _judge_ridge(at: dict[str, float], spread: float, tolerance: float) -> tuple[bool, bool, str]:
    """Whether KARE and eigenlearning can be trusted at one ridge, and why."""
    loss, test = at["leave_one_out_loss"], at["test_loss"]
    if not np.isfinite(loss) or loss <= 0:
        return False, False, "leave-one-out is not known"
    apart = loss / test - 1 if test > 0 else np.nan
    if abs(apart) > tolerance and abs(loss - test) > _SIGMAS * np.hypot(at["test_loss_error"], spread):
        why = "train and test samples are not alike to this kernel, as after training on the former"
        return False, False, f"leave-one-out itself is {apart:+.1%} off the test loss: {why}"
    gaps = {name: at[name] / loss - 1 for name in ("kare", "eigenlearning")}
    # The error of leave-one-out counts against the estimate; a comparison with NaN is no trust.
    kare, theory = (abs(gap) + at["leave_one_out_loss_error"] / loss <= tolerance for gap in gaps.values())
    of_theory = "" if np.isnan(gaps["eigenlearning"]) else f", eigenlearning by {gaps['eigenlearning']:+.1%}"
    return kare, theory, f"KARE is off leave-one-out by {gaps['kare']:+.1%}{of_theory}"


def _unknown(ridge: float, system: ByEigenpairs | None, floor: float) -> str:
    """Why (K + λI)^-1 is not known; empty if it is."""
    least = np.inf if system is None else ridge + float(system.values[-1])
    if least < _FLOORS * floor:
        return f"K + λI has an eigenvalue of {least:.2g}, and the storage floor is {floor:.2g}; raise λ"
    return ""
