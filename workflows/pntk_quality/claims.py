"""What the paper says of pNTKs as networks get wider, and whether a table shows it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]
Quantity = Callable[[Row], float | None]

# A power of the width that is called 1 / sqrt(width), for a few seeds and widths; of which network. Convolutions of so
# few channels are not yet where a rate can be read off.
_ROOT, _OF_RATE = (-0.75, -0.35), "mlp"
# Share of test samples by which accuracies may differ at any width, which so few samples do not tell from none.
_EQUAL = 0.04


@dataclass(frozen=True)
class Curve:
    """A quantity against the width, over seeds.

    Attributes
    ----------
    widths
        Ascending, shape (w,).
    values
        Of each seed, shape (w, s).
    """

    widths: NDArray[np.float64]
    values: NDArray[np.float64]

    @property
    def means(self) -> NDArray[np.float64]:
        """Over seeds."""
        return np.asarray(self.values.mean(axis=1))

    @property
    def falls(self) -> bool:
        """Whether the mean gets smaller with each width."""
        return bool((np.diff(self.means) < 0).all())

    @property
    def slope(self) -> float:
        """Power of the width: of the least-squares line through logarithms of the means."""
        return float(np.polyfit(np.log(self.widths), np.log(self.means), 1)[0])


def curve_of(rows: Sequence[Row], network: str, state: str, quantity: Quantity) -> Curve:
    """A quantity of one network; widths for which it is not known of every seed are left out."""
    held: dict[int, list[float | None]] = {}
    for row in rows:
        if (row["network"], row["state"]) == (network, state):
            held.setdefault(row["width"], []).append(quantity(row))
    known = {
        width: [v for v in values if v is not None] for width, values in sorted(held.items()) if None not in values
    }
    return Curve(np.array(list(known), float), np.array(list(known.values()), float))


def away_from_one(name: str) -> Quantity:
    """|log ratio|: how far a ratio is from one, in either direction."""
    return lambda row: None if row[name] is None else abs(float(np.log(row[name])))


def plain(name: str) -> Quantity:
    """The entry of that name."""
    return lambda row: row[name]


def accuracy_gap(suffix: str) -> Quantity:
    """By how much the test accuracies of both kernels differ."""
    return lambda row: abs(row[f"test_accuracy_pntk{suffix}"] - row[f"test_accuracy_ntk{suffix}"])


@dataclass(frozen=True)
class Verdict:
    """One claim about one network.

    Attributes
    ----------
    claim, network
        What, and of which.
    found
        Numbers.
    is_shown
        Whether they show it.
    """

    claim: str
    network: str
    found: str
    is_shown: bool


# Claims that something gets smaller with the width.
FALLING: dict[str, Quantity] = {
    "relative Frobenius difference falls": plain("relative_difference"),
    "λ_max ratio tends to 1": away_from_one("largest_eigenvalue_ratio"),
    "λ_min ratio tends to 1": away_from_one("smallest_eigenvalue_ratio"),
    "condition number ratio tends to 1": away_from_one("condition_number_ratio"),
    "predictions approach each other, λ = 0": plain("prediction_difference"),
    "predictions approach each other, with ridge": plain("prediction_difference_ridge"),
}


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every claim about every network of a table, at initialisation and, where there is that, after training."""
    found = []
    for network in dict.fromkeys(row["network"] for row in rows):
        for state in dict.fromkeys(row["state"] for row in rows if row["network"] == network):
            found += _of_network(rows, network, state)
    return found


def _of_network(rows: Sequence[Row], network: str, state: str) -> list[Verdict]:
    verdicts = []
    for claim, quantity in FALLING.items():
        curve = curve_of(rows, network, state, quantity)
        if len(curve.widths) < 2:
            verdicts.append(Verdict(f"{state}: {claim}", network, "not known: at the storage floor", is_shown=False))
            continue
        ends = f"{curve.means[0]:.3g} → {curve.means[-1]:.3g}, width^{curve.slope:.2f}"
        verdicts.append(Verdict(f"{state}: {claim}", network, ends, curve.falls))
    if state == "init" and network == _OF_RATE:
        curve = curve_of(rows, network, state, plain("relative_difference"))
        is_root = _ROOT[0] <= curve.slope <= _ROOT[1]
        verdicts.append(Verdict("init: it falls about as 1 / √width", network, f"width^{curve.slope:.2f}", is_root))
    for suffix, name in (("", "λ = 0"), ("_ridge", "with ridge")):
        gap = curve_of(rows, network, state, accuracy_gap(suffix)).means
        words = f"{gap[0]:.1%} → {gap[-1]:.1%} of test samples"
        is_shown = bool(gap[-1] < gap[0] or gap.max() <= _EQUAL)
        verdicts.append(Verdict(f"{state}: test accuracies approach each other, {name}", network, words, is_shown))
    return verdicts
