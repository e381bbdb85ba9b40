"""Ratios of smallest eigenvalues and of condition numbers with bounds, or words for why there are none."""

from dataclasses import dataclass

from ntkpipe.analysis.comparing.spectra import Ends

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Ratios:
    """λ_min and λ_max / λ_min of A over those of B.

    Values are of the stored kernels. Bounds are for the kernels before they were rounded to be stored: each λ_min may
    be off by its error and its storage floor.
    """

    # smallest, smallest_bounds: λ_min of A over that of B; none where one of them is not known from zero
    smallest: float | None
    smallest_bounds: Bounds | None
    note: str  # the same in words, or why there is none
    # condition_a, condition_b: λ_max / λ_min of each; none where λ_min is not known from zero
    condition_a: float | None
    condition_b: float | None
    condition: float | None  # condition, condition_bounds: their ratio; none without both
    condition_bounds: Bounds | None


def ratios_of(a: Ends, b: Ends) -> Ratios:
    """What is known of the ratios."""
    if a.smallest is None or b.smallest is None:
        return Ratios(None, None, "not asked for", None, None, None, None)
    bounds_a, bounds_b = _before_rounding(a), _before_rounding(b)
    condition_a, condition_b = _condition(a, bounds_a), _condition(b, bounds_b)
    if bounds_a is None or bounds_b is None or condition_a is None or condition_b is None:
        words = [_why(name, ends) for name, ends, bounds in (("A", a, bounds_a), ("B", b, bounds_b)) if bounds is None]
        return Ratios(None, None, "; ".join(words), condition_a, condition_b, None, None)
    ratio, bounds = a.smallest / b.smallest, (bounds_a[0] / bounds_b[1], bounds_a[1] / bounds_b[0])
    top = float(a.eigenvalues[0]) / float(b.eigenvalues[0])
    note = f"{a.smallest:.6g} / {b.smallest:.6g} = {ratio:.6g}, in [{bounds[0]:.6g}, {bounds[1]:.6g}]"
    of_conditions = top / bounds[1], top / bounds[0]
    return Ratios(ratio, bounds, note, condition_a, condition_b, condition_a / condition_b, of_conditions)


def _before_rounding(ends: Ends) -> Bounds | None:
    """Bounds of λ_min with the floor added; none if zero is between them."""
    assert ends.high is not None
    if ends.low is None or ends.low - ends.floor <= 0:
        return None
    return ends.low - ends.floor, ends.high + ends.floor


def _condition(ends: Ends, bounds: Bounds | None) -> float | None:
    assert ends.smallest is not None
    return None if bounds is None else float(ends.eigenvalues[0]) / ends.smallest


def _why(name: str, ends: Ends) -> str:
    assert ends.smallest is not None
    value, floor = f"{ends.smallest:.3g}", f"storage floor {ends.floor:.2g}"
    if abs(ends.smallest) < ends.floor:
        return f"λ_min of {name}, {value}, is below its {floor}: noise"
    if ends.high is not None and ends.high < 0:
        return f"λ_min of {name} is {value}: not positive definite"
    least = "?" if ends.low is None else f"{ends.low:.3g}"
    return f"λ_min of {name} is {value}, at least {least}, {floor}: not known from zero"
