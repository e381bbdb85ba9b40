"""What every inverse ``G = (K + λI)^-1`` answers: products, forms, log determinants, and fits with leave-one-out.

A fit is kernel ridge regression at one ridge. With H = K G its errors are ``(I - H) Y``; ``I - H = w M``, where M = G
and w = λ, or, in the limit λ → 0 of a singular kernel, M is the projection onto the null space and w = 1.

Leave-one-out is exact from one fit. With coefficients A = G Y, the fit without sample i misses it by ``(G_ii)^-1 A_i``,
where i stands for all rows of the sample: one, or the O rows of a full NTK, which share an input and must go together.
For one row see Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, equation 5.12, and Allen 1974,
PRESS; with the rows of i last, elimination gives the same for blocks, ``A_i = G_ii (y_i - K_i,-i (K_-i + λI)^-1
y_-i)``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray, rows_of, runs
from ntkpipe.base.operator import Operator
from ntkpipe.solvers.result import Status

# By all eigenpairs, by a Cholesky factor for each ridge, or by conjugate gradients, which are passes over the matrix.
InverseMethod = Literal["eigh", "cholesky", "streamed"]
INDEFINITE: Status = "indefinite at storage precision"


class WithError(NamedTuple):
    """A number and its standard error, zero where it is exact."""

    value: float
    error: float = 0.0


UNKNOWN = WithError(np.nan)


def as_fields(estimates: Mapping[str, WithError]) -> dict[str, float]:
    """Numbers by the names of a result, which ends those of their errors with ``_error``."""
    errors = {f"{name}_error": error for name, (_, error) in estimates.items()}
    return {name: value for name, (value, _) in estimates.items()} | errors


def squares(left_out: FloatArray, samples: NDArray[np.int64]) -> FloatArray:
    """Mean squared residual of each sample."""
    return np.asarray(np.mean(left_out.reshape(len(samples), -1) ** 2, axis=1))


def residuals(blocks: FloatArray, coefficients: FloatArray) -> FloatArray:
    """``(G_ii)^-1 A_i`` of each sample."""
    count, width, _ = blocks.shape
    if width == 1:
        return coefficients / blocks[:, 0]
    found = np.linalg.solve(blocks, coefficients.reshape(count, width, -1))
    return np.asarray(found, np.float64).reshape(coefficients.shape)


@dataclass
class Verdict:
    """How far several answers can be trusted, all together. Checkpoints hold its fields by their names."""

    status: Status = "converged"  # that of the first that did not converge
    worst: float = 0.0  # the largest relative residual
    messages: list[str] = field(default_factory=list)  # those of answers that did not converge

    @property
    def message(self) -> str:
        """Why the first did not converge; empty if all did."""
        return self.messages[0] if self.messages else ""

    def add(self, status: Status, residual: float, message: str) -> None:
        """Take one more answer into account."""
        self.worst = max(self.worst, residual)
        if status != "converged":
            if self.status == "converged":
                self.status = status
            self.messages.append(message)


@dataclass(frozen=True)
class Fit:
    """Kernel ridge regression at one ridge, in the rows of the kernel. Numbers are NaN where there is no fit."""

    ridge: float
    solution: FloatArray  # A = G Y, shape (n, c), and G Z of random signs Z beside it: where the next fit may start
    verdict: Verdict
    complement: FloatArray  # M Y
    weight: float  # w
    trace: WithError  # tr M
    squared_trace: WithError  # tr M²
    samples: NDArray[np.int64]  # that were left out: all or some
    left_out: FloatArray  # residuals of these samples, rows as in the kernel
    proxies: FloatArray | None = None  # of all samples, by the mean block of the inverse, where only some are left out

    @property
    def coefficients(self) -> FloatArray:
        """``A``."""
        return self.solution[:, : self.complement.shape[1]]

    @property
    def train_residuals(self) -> FloatArray:
        """``Y - K A``."""
        return self.weight * self.complement

    @property
    def train_loss(self) -> float:
        """Mean square of these."""
        return float(np.mean(self.train_residuals**2))

    @property
    def effective_dimension(self) -> WithError:
        """``tr H``, the degrees of freedom of the fit."""
        return WithError(len(self.complement) - self.weight * self.trace.value, self.weight * self.trace.error)

    @property
    def generalised_cross_validation(self) -> WithError:
        """``(|(I - H) Y|² / n) / (tr(I - H) / n)²`` (Golub, Heath, Wahba 1979, Technometrics 21, p. 215)."""
        value = float(np.mean(self.complement**2)) / (self.trace.value / len(self.complement)) ** 2
        return WithError(value, 2.0 * value * self.trace.error / abs(self.trace.value))

    @property
    def leave_one_out_loss(self) -> WithError:
        """Mean squared error of samples that are left out."""
        return self.mean_left_out(squares)

    def mean_left_out(self, value: Callable[[FloatArray, NDArray[np.int64]], FloatArray]) -> WithError:
        """The mean over all samples of a function of residuals and samples, one value a sample.

        Where only some samples were left out this is the difference estimator of sampling theory: the mean over all of
        the values for proxies, and the mean over the sample of what these are off by, with its standard error for a
        simple random sample without replacement (Cochran 1977, Sampling Techniques, sections 2.6 and 7.1).
        """
        exact = value(self.left_out, self.samples)
        if self.proxies is None:
            return WithError(float(exact.mean()))
        count = len(self.samples)
        total = len(self.proxies) * count // len(self.left_out)
        proxies = value(self.proxies, np.arange(total))
        gaps = exact - proxies[self.samples]
        finite = (1.0 - count / total) ** 0.5
        # Gaps that are all the same, such as those of accuracies, do not say that there are no others.
        spread = max(float(gaps.std(ddof=1)), float(np.abs(gaps).max(initial=0.0)) / count)
        return WithError(float(proxies.mean() + gaps.mean()), finite * spread / count**0.5)


@dataclass(frozen=True)
class Question:
    """What is fitted, and what is asked of each fit."""

    rhs: FloatArray  # Y, in the rows of the kernel
    width: int = 1  # rows a sample, which are left out together
    num_left_out: int = 64  # least number of samples to leave out; where that is cheap, all are
    num_probes: int = 0  # random signs for traces, where they are not exact
    seed: int = 0

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.rhs) // self.width

    def some_samples(self) -> NDArray[np.int64]:
        """Samples at random, in order."""
        chosen = np.random.default_rng(self.seed).permutation(self.num_samples)
        return np.sort(chosen[: min(self.num_left_out, self.num_samples)])

    def signs(self) -> FloatArray:
        """Z, shape (n, p)."""
        rng = np.random.default_rng([self.seed, self.num_probes])
        return rng.choice(np.array([-1.0, 1.0]), (len(self.rhs), self.num_probes))

    def fit(
        self,
        ridge: float,
        solution: FloatArray,
        blocks: FloatArray,
        verdict: Verdict,
        *,
        samples: NDArray[np.int64] | None = None,
        trace: WithError | None = None,
        squared_trace: WithError = UNKNOWN,
        left_out: FloatArray | None = None,
    ) -> Fit:
        """The fit from A, beside which there may be more, and diagonal blocks of G: of all samples or of some."""
        coefficients, proxies = solution[:, : self.rhs.shape[1]], None
        if samples is None:
            samples = np.arange(self.num_samples)
        if len(samples) < self.num_samples:
            mean = np.broadcast_to(blocks.mean(axis=0), (self.num_samples, *blocks.shape[1:]))
            proxies = residuals(mean, coefficients)
        return Fit(
            ridge=ridge,
            solution=solution,
            verdict=verdict,
            complement=coefficients,
            weight=ridge,
            trace=trace or WithError(float(np.trace(blocks, axis1=1, axis2=2).sum())),
            squared_trace=squared_trace,
            samples=samples,
            left_out=residuals(blocks, coefficients[rows_of(samples, self.width)]) if left_out is None else left_out,
            proxies=proxies,
        )

    def traces(self, probed: FloatArray) -> tuple[WithError, WithError]:
        """``tr G`` and ``tr G²`` from G Z, by ``E z'Gz`` and ``E |Gz|²`` (Hutchinson 1990), with standard errors."""
        return _mean(np.einsum("ij,ij->j", self.signs(), probed)), _mean(np.einsum("ij,ij->j", probed, probed))


def _mean(samples: FloatArray) -> WithError:
    return WithError(float(samples.mean()), float(samples.std(ddof=1)) / len(samples) ** 0.5)


class Inverse(ABC):
    """``G = (K + λI)^-1`` of one matrix, prepared once, for any ridge and any number of columns."""

    method: InverseMethod
    why: str  # why it is this one, in words
    columns_at_once: int  # of a block: more are done in runs

    def __init__(self, operator: Operator) -> None:
        self.operator = operator

    @abstractmethod
    def times(self, block: FloatArray, ridge: float, verdict: Verdict) -> FloatArray:
        """``G B``, shape (n, c)."""

    @abstractmethod
    def forms(self, block: FloatArray, ridge: float, width: int, verdict: Verdict) -> FloatArray:
        """``B_i' G B_i`` for each run of ``width`` columns, shape (c / width, width, width)."""

    def data_fit(self, block: FloatArray, solution: FloatArray, ridge: float) -> float:
        """``tr B' G B``, given ``G B``."""
        return float(np.sum(block * solution))

    @abstractmethod
    def logdet(self, ridge: float, verdict: Verdict) -> WithError:
        """``log det(K + λI)``."""

    @abstractmethod
    def fit(self, question: Question, ridge: float, start: FloatArray | None = None) -> Fit:
        """Kernel ridge regression at a ridge; an iteration begins with the ``solution`` of another fit."""

    def blocks(
        self, samples: NDArray[np.int64], width: int, most: int, form: Callable[[FloatArray], FloatArray]
    ) -> FloatArray:
        """Diagonal blocks of G at samples, from its ``form`` of unit vectors, about ``most`` at a time."""
        found = np.empty((len(samples), width, width))
        for some in runs(len(samples), max(1, most // width)):
            rows = rows_of(samples[some], width)
            unit = np.zeros((self.operator.num_rows, len(rows)))
            unit[rows, np.arange(len(rows))] = 1.0
            found[some] = form(unit)
        return found
