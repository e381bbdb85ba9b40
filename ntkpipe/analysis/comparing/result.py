"""What a comparison of two kernels returns, in numbers and in words."""

import math
from dataclasses import dataclass, field

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.tables import TableRows
from ntkpipe.solvers.result import OfTargets

_DTYPES = frozenset({"compute_dtype", "accumulate_dtype", "store_dtype"})


@dataclass(frozen=True, kw_only=True)
class Comparison(OfTargets):
    """Kernel A beside kernel B, which is the reference: relative numbers are parts of what B has, ratios are A over B.

    Where one has a row for each output and the other one row a sample, K, the latter stands for ``K ⊗ I_O``.
    """

    a: str  # a, b: what was compared: paths, or what they were called
    b: str
    reference: str  # identity of B; `matrix` is that of A
    kinds: tuple[str | None, str | None]  # kinds of stored kernels; none of others
    differs: tuple[str, ...] | None  # fields in which the manifests differ; none where one has no manifest
    num_samples: int
    num_rows: int  # rows that were compared
    num_outputs: int  # rows for each sample
    outer: str | None  # `"a"` or `"b"` where that is taken as `K ⊗ I_O`
    frobenius_a: float  # frobenius_a, frobenius_b: Frobenius norms
    frobenius_b: float
    relative_difference: float  # `|A - B|_F / |B|_F`
    # Of full NTKs its parts, whose squares add up: blocks of different outputs, blocks of equal outputs around their
    # mean over outputs, and that mean. Of networks against their limit all three fall like 1/√width.
    difference_by_outputs: tuple[float, float, float] | None = None
    scale: float | None  # c that makes `|c A - B|_F` smallest; none if A is zero
    scaled_difference: float  # `|c A - B|_F / |B|_F`
    alignment: float | None  # `<A, B>_F / (|A|_F |B|_F)`; none if A is zero
    # The same of `(H ⊗ I) A (H ⊗ I)` and `(H ⊗ I) B (H ⊗ I)`, H = I - 11'/N: centred kernel alignment (Cortes, Mohri,
    # Rostamizadeh 2012, JMLR 13, Eq. 4), each output centred over samples; none where nothing is left.
    centred_alignment: float | None
    largest_entry_difference: float  # largest `|A_ij - B_ij| / sqrt(B_ii B_jj)`
    largest_entry: tuple[int, int] | None  # its row and column
    num_zero_rows: int  # rows of B with a diagonal that is not positive, whose entries are left out of it
    method: str  # how spectra and predictions were found, and why
    eigenvalues_a: FloatArray = field(repr=False)  # the leading ones, descending, shape (k,): of `K ⊗ I_O` each O times
    eigenvalues_b: FloatArray = field(repr=False)
    largest_eigenvalue_ratio: float  # λ_max of A over that of B
    smallest_eigenvalue_a: float | None  # λ_min of what is stored; none where it was not asked for
    smallest_eigenvalue_b: float | None
    # Bounds of these by the errors of solvers; a lower end that is not known is none
    smallest_eigenvalue_bounds_a: tuple[float | None, float | None] | None
    smallest_eigenvalue_bounds_b: tuple[float | None, float | None] | None
    # λ_min of A over that of B; none where one is not known from zero, by its error and its storage floor
    smallest_eigenvalue_ratio: float | None = None
    # For the kernels before they were rounded to be stored
    smallest_eigenvalue_ratio_bounds: tuple[float, float] | None = None
    smallest_eigenvalue_note: str  # what is known of the ratio, or why nothing is, in words
    condition_number_a: float | None = None  # λ_max / λ_min, in the same sense
    condition_number_b: float | None = None
    condition_number_ratio: float | None = None  # of A over B
    condition_number_ratio_bounds: tuple[float, float] | None = None
    floor_a: float  # floor_a, floor_b: what rounding of entries did to eigenvalues: below it they are not known
    floor_b: float
    # Between the spaces of as many leading eigenvectors of both as there are eigenvalues, ascending, in radians
    principal_angles: FloatArray = field(repr=False)
    angle_error: float  # how far the largest one can be off, in radians, for the residuals and gaps of the eigenvalues
    overlap: float  # mean squared cosine of them, 1 for equal spaces
    log_determinant_a: float | None  # with the ridge added; none if that is indefinite or the spectrum is not whole
    log_determinant_b: float | None
    ridge_a: float | None  # ridge_a, ridge_b: λ of the regressions, absolute; none without targets
    ridge_b: float | None
    # Of test samples, (M, c), given targets and test kernels; as all below none without predictions
    predictions_a: FloatArray | None = field(default=None, repr=False)
    predictions_b: FloatArray | None = field(default=None, repr=False)
    prediction_difference: float | None = None  # `|F_a - F_b|_F / |F_b|_F`
    disagreement: float | None = None  # share of test samples for which the largest prediction is of another column
    test_loss_a: float | None = None  # test_loss_a, test_loss_b: mean squared error of the predictions
    test_loss_b: float | None = None
    test_accuracy_a: float | None = None  # test_accuracy_a, test_accuracy_b: share of classes that they predict
    test_accuracy_b: float | None = None
    prediction_note: str  # why there are no predictions, or what is to be known of them

    @property
    def is_of_dtypes(self) -> bool:
        """Whether both are the same kernel in different dtypes."""
        return bool(self.differs) and set(self.differs or ()) <= _DTYPES

    def purposes(self) -> dict[str, str]:
        """What it costs to use A in place of B, by purpose, in words with numbers."""
        a, b = self.eigenvalues_a, self.eigenvalues_b
        worst = float(np.abs(a / b - 1).max()) if (b > 0).all() else math.inf
        angle = _degrees(float(self.principal_angles[-1]))
        determinant = "not compared: needs all eigenvalues, and λ that makes both positive definite; see ntkpipe.logdet"
        if self.log_determinant_a is not None and self.log_determinant_b is not None:
            apart = abs(self.log_determinant_a - self.log_determinant_b)
            both = f"{self.log_determinant_a:.8g} and {self.log_determinant_b:.8g}"
            determinant = f"{both}, apart by {apart:.2g}, {apart / self.num_rows:.2g} a row"
        found = {
            "leading eigenpairs": f"{len(a)} eigenvalues to {worst:.2g} of each, their space to {angle}",
            "smallest eigenvalues": self.smallest_eigenvalue_note,
            "log-determinant": determinant,
        }
        if self.prediction_difference is None:
            return found | {"regression": self.prediction_note}
        flips = "" if self.disagreement is None else f", {self.disagreement:.2%} of test samples change column"
        words = f"predictions differ by {self.prediction_difference:.2g}{flips}"
        return found | {f"regression, λ = {self.ridge_b:.3g}": words}

    def _rows(self) -> TableRows:
        size = f"{self.num_rows:,} of {self.num_samples:,} samples"
        if self.outer is not None:
            size += f"; {self.outer.upper()} = K ⊗ I_{self.num_outputs}, never expanded"
        tops = f"{self.eigenvalues_a[0]:.6g} / {self.eigenvalues_b[0]:.6g}"
        scaled = "A is zero" if self.scale is None else f"{self.scaled_difference:.6g}, A times {self.scale:.6g}"
        left_out = f"; {self.num_zero_rows} rows without a diagonal left out" if self.num_zero_rows else ""
        largest = "not known"
        if self.largest_entry is not None:
            largest = "row {}, column {}".format(*self.largest_entry)
            largest = f"differs by {self.largest_entry_difference:.4g} of √(B_ii B_jj), {largest}"
        rows = [("a", self.a), ("b, the reference", self.b), ("rows", size)]
        if self.differs is not None:
            rows.append(("manifests differ in", ", ".join(self.differs) or "nothing"))
        rows.append(("‖A − B‖ / ‖B‖", f"{self.relative_difference:.6g} (Frobenius)"))
        if self.difference_by_outputs is not None:
            between, around, mean = (f"{part:.4g}" for part in self.difference_by_outputs)
            words = f"{between} between outputs, {around} of single ones around their mean, {mean} of that mean"
            rows.append(("by outputs", words))
        rows += [
            ("after the best scale", scaled),
            ("alignment", f"{_number(self.alignment)}, centred {_number(self.centred_alignment)}"),
            ("largest entry", f"{largest}{left_out}"),
            ("spectra", self.method),
            ("λ_max, A / B", f"{tops} = {self.largest_eigenvalue_ratio:.6g}"),
            ("λ_min, A / B", self.smallest_eigenvalue_note),
        ]
        if self.condition_number_ratio is not None and self.condition_number_ratio_bounds is not None:
            low, high = self.condition_number_ratio_bounds
            both = f"{self.condition_number_a:.5g} / {self.condition_number_b:.5g}"
            words = f"{both} = {self.condition_number_ratio:.6g}, in [{low:.6g}, {high:.6g}]"
            rows.append(("condition number, A / B", words))
        rows.append(("storage floors", f"{self.floor_a:.2g} and {self.floor_b:.2g}"))
        known = "not known: no gap" if self.angle_error >= math.pi / 2 else f"± {_degrees(self.angle_error)}"
        words = f"{len(self.principal_angles)} dimensions, angles to {_degrees(float(self.principal_angles[-1]))}"
        rows.append(("leading eigenspaces", f"{words} ({known}), overlap {self.overlap:.6g}"))
        rows += self._prediction_rows()
        if self.is_of_dtypes:
            rows += [(f"dtype, for {purpose}", words) for purpose, words in self.purposes().items()]
        return rows

    def _prediction_rows(self) -> TableRows:
        if self.prediction_difference is None:
            return [("regression", self.prediction_note)]
        ridges = f"λ = {self.ridge_a:.4g} and {self.ridge_b:.4g}"
        change = "" if self.disagreement is None else f", another column for {self.disagreement:.2%} of test samples"
        note = f"; {self.prediction_note}" if self.prediction_note else ""
        difference = f"‖F_a − F_b‖ / ‖F_b‖ = {self.prediction_difference:.4g}"
        rows = [("regression", f"{ridges}: {difference}{change}{note}")]
        if self.test_accuracy_a is not None:
            rows.append(("test accuracy", f"{self.test_accuracy_a:.2%} and {self.test_accuracy_b:.2%}"))
        if self.test_loss_a is not None:
            rows.append(("test loss", f"{self.test_loss_a:.6g} and {self.test_loss_b:.6g}"))
        return rows


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.6f}"


def _degrees(radians: float) -> str:
    return f"{math.degrees(radians):.3g}°"
