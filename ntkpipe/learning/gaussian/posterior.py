"""What a Gaussian process says after training: means, variances, and how likely the targets were."""

from dataclasses import dataclass, field

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.solvers.result import Result, Rows


@dataclass(frozen=True, kw_only=True)
class Posterior(Result):
    """The posterior of a Gaussian process. M test samples, O outputs, S rows a sample.

    Attributes
    ----------
    mean
        Shape (M, O).
    covariance
        Of the function itself, without noise: a block for each test sample, shape (M, S, S). With one row a sample,
        S = 1, it is that of every output, and outputs are independent: the prior is ``K ⊗ I_O``. Of a full NTK S = O.
    variance
        Its diagonals, shape (M, S), which is (M, 1) or (M, O): it broadcasts with the mean.
    noise
        The variance of the noise of targets: the ridge λ, absolute.
    log_marginal_likelihood, log_marginal_likelihood_error
        ``log p(Y | X)``, summed over outputs; the error is zero by a factor, and that of the log determinant else.
    data_fit, complexity
        Its parts ``-½ tr Y'(K + λI)^-1 Y`` and ``-½ log det(K + λI)`` times the number of columns; the rest is
        ``-½ n c log 2π``.
    scale
        The factor s² of kernel and noise together that makes the targets most likely,
        ``tr Y'(K + λI)^-1 Y / (n c)``: with the prior s² K and noise s² λ the mean stays, and variances are s² times
        as large. NTKs are not scaled for targets, so compare it with 1 before variances are read as such.
    mean_diagonal
        Of K.
    num_rows, num_columns
        n and c, of the targets as right-hand sides.
    method, why
        ``cholesky`` or ``streamed``, and why.
    residual
        Largest relative true residual of the systems.
    num_clipped
        Variances that rounding made negative; they are zero now.
    floor
        Size of what rounding to the storage dtype did to K.
    """

    mean: FloatArray = field(repr=False)
    covariance: FloatArray = field(repr=False)
    variance: FloatArray = field(repr=False)
    noise: float
    log_marginal_likelihood: float
    log_marginal_likelihood_error: float
    data_fit: float
    complexity: float
    scale: float
    mean_diagonal: float
    num_rows: int
    num_columns: int
    method: str
    why: str
    residual: float
    num_clipped: int
    floor: float

    @property
    def predictive_variance(self) -> FloatArray:
        """Of targets: ``variance + noise``, shape (M, S)."""
        return self.variance + self.noise

    def _rows(self) -> Rows:
        error = f" ± {self.log_marginal_likelihood_error:.2g}" if self.log_marginal_likelihood_error else ""
        parts = f"data fit {self.data_fit:.6g}, complexity {self.complexity:.6g}"
        relative = self.noise / self.mean_diagonal if self.mean_diagonal else np.nan
        rows = [
            ("method", f"{self.method}: {self.why}"),
            ("noise λ", f"{self.noise:.4g}, {relative:.2g} mean diagonals; storage floor {self.floor:.2g}"),
            ("log marginal likelihood", f"{self.log_marginal_likelihood:.8g}{error}; {parts}"),
            ("scale", f"s² = {self.scale:.4g} would make the targets most likely"),
            ("residual", f"{self.residual:.2g}, the largest"),
        ]
        if len(self.mean):
            size = np.sqrt(self.variance)
            clipped = f"; {self.num_clipped} that rounding made negative are zero" if self.num_clipped else ""
            rows.append(
                (
                    "test samples",
                    f"{len(self.mean):,}; standard deviations {size.min():.4g} to {size.max():.4g}, mean "
                    f"{size.mean():.4g}{clipped}",
                )
            )
        return rows
