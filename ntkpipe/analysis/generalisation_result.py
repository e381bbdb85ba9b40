"""What an analysis of generalisation returns."""

from dataclasses import dataclass, field

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.solvers.result import Result, Rows


@dataclass(frozen=True, kw_only=True)
class Generalisation(Result):
    """Estimates of the test loss of kernel ridge regression. Arrays have an entry a ridge unless said otherwise.

    Losses are mean squared errors over samples and outputs. An ``_error`` is one standard deviation of what was
    estimated, zero where a number is exact; that of ``test_loss`` is of the choice of test samples.

    Attributes
    ----------
    method, why
        ``exact`` or ``streamed``, and why.
    num_rows, num_outputs
        n, and outputs that share the kernel; a full NTK has one, and a row for each output of a sample.
    ridges
        λ, absolute, shape (r,).
    test_loss, test_loss_error
        Measured; NaN without test data.
    train_loss
        Of the same predictor on its own samples.
    kare, kare_error
        The kernel alignment risk estimator.
    generalised_cross_validation
        The same number, from train loss and effective dimension.
    leave_one_out_loss, leave_one_out_loss_error
        What trust is judged by: each sample predicted from all others. NaN where it is not known.
    eigenlearning, canatar
        Predicted from the train kernel's own eigensystem; NaN if streamed.
    eigenlearning_kappa
        κ of that, in population eigenvalues; NaN if streamed.
    learnabilities
        L_i = λ_i / (λ_i + κ) of that, shape (r, n); of shape (r, 0) if streamed.
    target_learnability
        Share of the targets' power that is learnt, ``Σ L_i v_i² / Σ v_i²``; NaN if streamed.
    kappa, kappa_error
        The signal capture threshold as the train kernel alone tells it, 1 / tr (K + λI)^-1; κ of eigenlearning
        without its bias.
    overfitting_coefficient, overfitting_coefficient_error
        E_0 = n ∂κ/∂λ of that κ: n tr G² / (tr G)².
    effective_dimension, effective_dimension_error
        tr K (K + λI)^-1.
    kare_ratio, eigenlearning_ratio, canatar_ratio, leave_one_out_ratio
        Each over ``test_loss``.
    kare_is_trusted, eigenlearning_is_trusted
        Whether the estimate can be trusted; of GCV as of KARE, of Canatar as of eigenlearning.
    reasons
        Why or why not, in words.
    floor
        What rounding to the storage dtype did to K in the spectral norm.
    """

    method: str
    why: str
    num_rows: int
    num_outputs: int
    ridges: FloatArray
    test_loss: FloatArray
    test_loss_error: FloatArray
    train_loss: FloatArray
    kare: FloatArray
    kare_error: FloatArray
    generalised_cross_validation: FloatArray
    leave_one_out_loss: FloatArray
    leave_one_out_loss_error: FloatArray
    eigenlearning: FloatArray
    canatar: FloatArray
    eigenlearning_kappa: FloatArray
    learnabilities: FloatArray = field(repr=False)
    target_learnability: FloatArray
    kappa: FloatArray
    kappa_error: FloatArray
    overfitting_coefficient: FloatArray
    overfitting_coefficient_error: FloatArray
    effective_dimension: FloatArray
    effective_dimension_error: FloatArray
    kare_ratio: FloatArray
    eigenlearning_ratio: FloatArray
    canatar_ratio: FloatArray
    leave_one_out_ratio: FloatArray
    kare_is_trusted: tuple[bool, ...]
    eigenlearning_is_trusted: tuple[bool, ...]
    reasons: tuple[str, ...]
    floor: float

    def _rows(self) -> Rows:
        is_measured = bool(np.isfinite(self.test_loss).any())
        rows = [("method", f"{self.method}: {self.why}")]
        for index, ridge in enumerate(self.ridges):
            if is_measured:
                numbers = (self.kare_ratio, self.eigenlearning_ratio, self.leave_one_out_ratio)
                said = f"test loss {self.test_loss[index]:.4g} ± {self.test_loss_error[index]:.1g}; of it"
            else:
                numbers = (self.kare, self.eigenlearning, self.leave_one_out_loss)
                said = "no test data; losses by"
            kare, theory, left_out = (f"{number[index]:.3g}" for number in numbers)
            estimates = f"KARE = GCV {kare}, eigenlearning = Canatar {theory}, leave-one-out {left_out}"
            rows.append((f"λ = {ridge:.4g}", f"{said} {estimates}; {self._trust(index)}"))
        return rows

    def _trust(self, index: int) -> str:
        trusted = {"KARE": self.kare_is_trusted, "eigenlearning": self.eigenlearning_is_trusted}
        return f"trust {' and '.join(name for name, of in trusted.items() if of[index]) or 'none'}"
