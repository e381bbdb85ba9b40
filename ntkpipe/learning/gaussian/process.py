"""Gaussian processes with a stored kernel as covariance: posterior, marginal likelihood, exact or streamed.

With G = (K + λI)^-1, following Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006: the posterior
mean ``K_* G Y`` (Eq. 2.25), the covariance ``K_** - K_* G K_*'`` of the function without noise (Eq. 2.26), and the
log marginal likelihood ``-½ y'G y - ½ log det(K + λI) - ½ n log 2π`` (Eq. 2.30). Cost: n³/3 and ``n² M S``
multiplications and additions; streamed, some tens of passes for each run of test rows that fits memory, 256 at most.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from ntkpipe.base.arrays import FloatArray, require_bounded
from ntkpipe.base.config import Budget, MemoryLimit, RidgeScale, absolute_ridge, check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.given import as_real
from ntkpipe.base.operator import Operator, digest_of
from ntkpipe.base.tables import TableRows
from ntkpipe.base.targets import Task
from ntkpipe.learning.regression.sources import CountedStages, CrossKernel, train_targets
from ntkpipe.solvers.inverse.choice import find_inverse
from ntkpipe.solvers.inverse.contract import Verdict
from ntkpipe.solvers.result import Monitor, OfTargets, ignore, recorded
from ntkpipe.store.results import Checkpoint

ProcessMethod = Literal["auto", "cholesky", "streamed"]
_MESSAGES = {
    "cholesky": "exact, by a Cholesky factor in float64",
    "streamed": "systems are solved; the log determinant is an estimate with its error",
}


@dataclass(frozen=True, kw_only=True)
class Posterior(OfTargets):
    """The posterior of a Gaussian process. M test samples, O outputs, S rows a sample."""

    mean: FloatArray = field(repr=False)  # shape (M, O)
    # Covariance of the function itself, without noise: a block for each test sample, shape (M, S, S). With one row a
    # sample, S = 1, it is that of every output, and outputs are independent: the prior is `K ⊗ I_O`. A full NTK has
    # S = O.
    covariance: FloatArray = field(repr=False)
    variance: FloatArray = field(repr=False)  # diagonals of it, (M, S), so (M, 1) or (M, O): broadcasts with the mean
    noise: float  # the variance of the noise of targets: the ridge λ, absolute
    log_marginal_likelihood: float  # `log p(Y | X)`, summed over outputs: both parts below and `-½ n c log 2π`
    log_marginal_likelihood_error: float  # zero by a factor, else that of the log determinant
    data_fit: float  # `-½ tr Y'(K + λI)^-1 Y`
    complexity: float  # `-½ log det(K + λI)` times the number of columns
    # The factor s² of kernel and noise together that makes the targets most likely, `tr Y'(K + λI)^-1 Y / (n c)`:
    # with the prior s² K and noise s² λ the mean stays, and variances are s² times as large. NTKs are not scaled for
    # targets, so compare it with 1 before variances are read as such.
    scale: float
    mean_diagonal: float  # mean of the diagonal of K
    num_rows: int  # n
    num_columns: int  # c, of the targets as right-hand sides
    method: str  # method, why: `cholesky` or `streamed`, and why
    why: str
    residual: float  # largest relative true residual of the systems
    num_clipped: int  # variances that came out negative; they are zero now
    floor: float  # size of what rounding to the storage dtype did to K

    @property
    def predictive_variance(self) -> FloatArray:
        """Predictive variance of targets, ``variance + noise``, shape (M, S)."""
        return self.variance + self.noise

    def _rows(self) -> TableRows:
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
            clipped = "; {} came out negative, by rounding or since test_diagonal is of other samples, and are zero"
            clipped = clipped.format(self.num_clipped) if self.num_clipped else ""
            sizes = f"{size.min():.4g} to {size.max():.4g}, mean {size.mean():.4g}"
            rows.append(("test samples", f"{len(self.mean):,}; standard deviations {sizes}{clipped}"))
        return rows


@recorded()
def gaussian_process(
    kernel: Any,
    targets: ArrayLike,
    *,
    ridge: float,
    ridge_scale: RidgeScale = None,
    test_kernel: Any = None,
    test_diagonal: ArrayLike | None = None,
    initial_outputs: ArrayLike | None = None,
    test_initial_outputs: ArrayLike | None = None,
    method: ProcessMethod = "auto",
    path: str | Path | None = None,
    task: Task = "auto",
    tol: float = 1e-8,
    memory_limit: MemoryLimit = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    monitor: Monitor = ignore,
) -> Posterior:
    """Condition a Gaussian process of covariance K on targets with Gaussian noise of variance λ.

    Columns of Y are independent processes with the same covariance, and likelihoods multiply. A full NTK is one process
    over all pairs of a sample and an output. The mean is that of :class:`ntkpipe.KernelRegression` with the same ridge.
    Formulas and cost are in :mod:`ntkpipe.learning.gaussian.process`.

    Parameters
    ----------
    targets
        Real targets (N,) or (N, O), or labels of classes (N,), one-hot as in regression: a Gaussian likelihood, not a
        classifier's.
    ridge
        Variance λ of the noise of targets.
    test_kernel
        Test × train kernel (M·S, N·S), array or stored, with ``test_diagonal``.
    test_diagonal
        Blocks of test samples with themselves, (M, S, S), or (M,) with one row a sample.
    method
        How it is conditioned. ``cholesky``: exact, by a factor in memory, ``4 n²`` bytes, or in ``path``.
        ``streamed``: every test row is a column of a system, solved by passes, and the log determinant is estimated
        with its error; takes a tenth of a float32 kernel, or 6 kB a row if that is less. ``auto``: the factor if there
        is a path or it fits the memory.
    path
        Folder or URL for the factor, see :func:`ntkpipe.cholesky`. Default memory.
    tol
        Largest relative true residual of a converged system. Errors of variances are of second order in it.

    Raises
    ------
    IndefiniteError, ResourceError, TileError
        By ``cholesky``, if K + λI is not positive definite (the message says which ridge helps), or the factor does not
        fit; if a tile is missing or damaged.
    """
    if method == "streamed" and path is not None:
        raise ConfigError("path is an option of method='cholesky'")
    if (test_kernel is None) != (test_diagonal is None):
        raise ConfigError("a test kernel without the diagonal of test samples, or this without it; needed both or none")
    check_number("tol", tol, low=0.0)
    operator: Operator = kernel
    budget = Budget.of(memory_limit)
    train = train_targets(operator, targets, initial_outputs, task)
    width, num_outputs = train.width, train.targets.matrix.shape[1]
    noise = absolute_ridge(ridge, ridge_scale, operator.diagonal)
    cross, mean, covariance = None, np.zeros((0, num_outputs)), np.zeros((0, width, width))
    if test_kernel is not None:
        cross = CrossKernel(test_kernel, operator.num_rows, width)
        covariance = _prior_covariance(test_diagonal, (cross.num_samples, width, width))
        offset = train.offset_of_test(test_initial_outputs, cross.num_samples)
    how: dict[str, Any] = {"tol": tol, "seed": seed, "monitor": monitor, "with_blocks": False}
    by = find_inverse(operator, budget, method=method, allowed=("cholesky",), ridges=[noise], path=path, **how)
    kept = checkpoint if by.method == "streamed" else None
    decides = {"function": "gaussian_process", "noise": noise, "tol": tol, "seed": seed}
    stages = CountedStages(kept, operator, train, test=digest_of(covariance), **decides)
    verdict = Verdict()

    def once(name: str, compute: Callable[[Verdict], dict[str, Any]]) -> Mapping[str, Any]:
        """A stage, and how well its systems are solved."""

        def computed() -> dict[str, Any]:
            own = Verdict()
            return {**compute(own), **vars(own)}

        found = stages.once(name, computed)
        for words in found["messages"] or [""]:
            verdict.add(found["status"], found["worst"], words)
        return found

    def solved(own: Verdict) -> dict[str, Any]:
        coefficients = by.times(train.rhs, noise, own)
        return {"coefficients": coefficients, "form": by.data_fit(train.rhs, coefficients, noise)}

    def forms(columns: FloatArray, own: Verdict) -> dict[str, Any]:
        return {"forms": by.forms(columns, noise, width, own)}

    found = once("coefficients", solved)
    if cross is not None:
        mean = cross.outputs(found["coefficients"]) + offset
        explained = np.empty_like(covariance)
        for samples, rows in cross.sample_blocks(by.columns_at_once // width):
            part = f"test-{samples.start}-{samples.stop}"
            explained[samples] = once(part, partial(forms, np.ascontiguousarray(rows.T)))["forms"]
        covariance = covariance - explained
    variance = np.einsum("mss->ms", covariance)  # a view
    num_clipped = int((variance < 0.0).sum())
    np.maximum(variance, 0.0, out=variance)
    logdet = once("logdet", lambda own: by.logdet(noise, own)._asdict())
    num_rows, num_columns = train.rhs.shape
    data_fit, complexity = -0.5 * found["form"], -0.5 * num_columns * logdet["value"]
    return Posterior(
        status=verdict.status,
        message=verdict.message or _MESSAGES[by.method],
        work=stages.work,
        seconds=stages.seconds,
        options={"centred": train.is_centred},
        mean=mean,
        noise=noise,
        mean_diagonal=float(operator.diagonal().mean()),
        log_marginal_likelihood=data_fit + complexity - 0.5 * num_rows * num_columns * math.log(2 * math.pi),
        log_marginal_likelihood_error=0.5 * num_columns * logdet["error"],
        data_fit=data_fit,
        complexity=complexity,
        scale=found["form"] / (num_rows * num_columns),
        num_rows=num_rows,
        num_columns=num_columns,
        method=by.method,
        why=by.why,
        residual=verdict.worst,
        floor=operator.storage_floor(),
        **train.targets.fields,
        covariance=covariance,
        variance=variance.copy(),
        num_clipped=num_clipped,
    )


def _prior_covariance(diagonal: Any, shape: tuple[int, int, int]) -> FloatArray:
    blocks = as_real("test_diagonal", diagonal).astype(np.float64, copy=False)
    if blocks.shape != shape and not (shape[1] == 1 and blocks.shape == shape[:1]):
        raise ConfigError(
            f"test_diagonal of shape {blocks.shape}; needed {shape}, such as store.test_diagonal: the blocks of test "
            "samples with themselves"
        )
    found = require_bounded("test_diagonal", blocks).reshape(shape)
    if (least := float(np.einsum("mss->ms", found).min())) < 0.0:
        raise ConfigError(f"test_diagonal reaches {least:.3g}; needed variances, K(x, x) of the test samples")
    return found
