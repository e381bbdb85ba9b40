"""Risk of kernel ridge regression that theory predicts from the eigensystem of a population."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError

# Bisection of log κ from any bracket to the last bit takes fewer.
_MOST_STEPS = 200
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Prediction:
    """What theory says of kernel ridge regression on n samples."""

    kappa: float  # κ, the effective ridge (regularisation) of Simon et al., in units of population eigenvalues
    # L_i = λ_i / (λ_i + κ), shape (m,): which part of mode i is learnt. With ridge 0 they add up to n.
    learnabilities: FloatArray
    # E_0 = n / (n - Σ L_i²) ≥ 1, by which noise and modes that are not learnt are amplified
    overfitting_coefficient: float
    # Expected squared error on a new sample whose target has the noise, too; of each output, shape (c,)
    test_loss: FloatArray
    train_loss: FloatArray  # expected squared error on the train samples, shape (c,)


def effective_ridge(eigenvalues: ArrayLike, num_samples: float, ridge: float) -> float:
    """κ, the solution of ``Σ λ_i / (λ_i + κ) + δ / κ = n``.

    Zero where there is none above zero: without ridge and with n positive eigenvalues at most, which are then all
    learnt.
    """
    values = _population(eigenvalues)
    check_number("num_samples", num_samples, low=1e-300)
    check_number("ridge", ridge, low=0.0, high=1e300)
    positive = values[values > 0]
    if ridge == 0 and len(positive) <= num_samples:
        return 0.0
    # With x = log κ the left side falls; at κ = (Σλ + δ)/n it is below n, since λ/(λ + κ) < λ/κ.
    high = float(np.log((positive.sum() + ridge) / num_samples))
    low = high
    while _excess(positive, num_samples, ridge, low) < 0:
        low -= 8.0
    for _ in range(_MOST_STEPS):
        middle = (low + high) / 2
        if high - low <= 4 * _EPS * max(1.0, abs(middle)):
            break
        if _excess(positive, num_samples, ridge, middle) > 0:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def eigenlearning(
    eigenvalues: ArrayLike, powers: ArrayLike, num_samples: float, ridge: float, *, noise: float = 0.0
) -> Prediction:
    """Predicted risk of kernel ridge regression: the eigenlearning equations of Simon, Dickens, Karkada and DeWeese.

    With κ from ``Σ L_i + δ/κ = n`` and ``L_i = λ_i / (λ_i + κ)``,

    ``E_0 = n / (n - Σ L_i²)``, ``E_test = E_0 (Σ (1 - L_i)² v_i² + σ²)``, ``E_train = (δ / (n κ))² E_test``.

    The theory takes features to be as if Gaussian and n large; it is exact in neither case alone. Cost is O(m).

    Simon, Dickens, Karkada, DeWeese 2023, The Eigenlearning Framework: A Conservation Law Perspective on Kernel
    Regression and Wide Neural Networks, TMLR, arXiv 2110.03922, section "The eigenlearning equations".
    """
    values, weights = _population(eigenvalues), _powers(powers, eigenvalues)
    check_number("noise", noise, low=0.0)
    kappa = effective_ridge(values, num_samples, ridge)
    learnt = (values > 0).astype(np.float64) if kappa == 0 else values / (values + kappa)
    missing = num_samples - float((learnt**2).sum())
    if missing <= 0:
        # All n eigenvalues are learnt: κ → 0, where E_0 diverges as 1/κ and what is not learnt vanishes as κ².
        coefficient = np.inf
        test = np.where(weights[values <= 0].sum(axis=0) + noise > 0, np.inf, 0.0)
    else:
        coefficient = num_samples / missing
        test = coefficient * ((((1 - learnt) ** 2) @ weights) + noise)
    shrink = (ridge / (num_samples * kappa)) ** 2 if kappa > 0 else 0.0
    return Prediction(
        kappa=kappa,
        learnabilities=learnt,
        overfitting_coefficient=float(coefficient),
        test_loss=test,
        train_loss=shrink * test if shrink else np.zeros_like(test),
    )


def canatar(
    eigenvalues: ArrayLike, powers: ArrayLike, num_samples: float, ridge: float, *, noise: float = 0.0
) -> FloatArray:
    """Predicted generalisation error by Canatar, Bordelon and Pehlevan, Eq. 4; of each output, shape (c,).

    With η_ρ the eigenvalues, P samples, ridge λ and target ``Σ w_ρ sqrt(η_ρ) φ_ρ``, in their letters:

    ``κ = λ + Σ κ η_ρ / (κ + P η_ρ)``, ``γ = Σ P η_ρ² / (κ + P η_ρ)²``,
    ``E_g = 1 / (1 - γ) Σ η_ρ / (κ + P η_ρ)² (κ² w_ρ² + σ² P η_ρ)``.

    E_g is the error against the target without noise. Their κ is n times that of eigenlearning, and with
    ``v_ρ² = η_ρ w_ρ²`` it is ``E_g = E_test - σ²``: one theory in two forms, so without noise both numbers are equal.
    Found here from their equations alone, as a check.

    Canatar, Bordelon, Pehlevan 2021, Spectral bias and task-model alignment explain generalization in kernel
    regression and infinitely wide neural networks, Nature Communications 12, arXiv 2006.13198.
    """
    values, weights = _population(eigenvalues), _powers(powers, eigenvalues)
    check_number("noise", noise, low=0.0)
    kappa = num_samples * effective_ridge(values, num_samples, ridge)
    if kappa == 0:
        return np.where(weights[values <= 0].sum(axis=0) + noise > 0, np.inf, 0.0)
    denominators = (kappa + num_samples * values) ** 2
    gamma = float((num_samples * values**2 / denominators).sum())
    # 1 - γ by the first equation over κ, since γ is one to rounding where the ridge is small.
    rest = ridge / kappa + kappa * float((values / denominators).sum())
    signal = (kappa**2 / denominators) @ weights
    return np.asarray((signal + noise * gamma) / rest, np.float64)


def predicted(
    eigenvalues: FloatArray, vectors: FloatArray, rows: FloatArray, sizes: Sequence[int], ridges: FloatArray
) -> tuple[dict[str, Any], FloatArray]:
    """Predictions of both for each size and ridge, by the fields of results, (s, r); and learnabilities, (s, r, n).

    The eigensystem of a kernel of n rows, and its targets, stand for the population's. What rounding made negative is
    zero.
    """
    values, powers = np.maximum(eigenvalues, 0.0) / len(rows), (vectors.T @ rows) ** 2 / len(rows)
    found = [[eigenlearning(values, powers, size, ridge) for ridge in ridges] for size in sizes]
    by_mode, total = powers.sum(axis=1), float(powers.sum())

    def each(function: Callable[[Prediction], float]) -> FloatArray:
        return np.array([[float(function(one)) for one in of_size] for of_size in found])

    fields = {
        "eigenlearning": each(lambda one: one.test_loss.mean()),
        "canatar": np.array([[canatar(values, powers, size, ridge).mean() for ridge in ridges] for size in sizes]),
        "kappa": each(lambda one: one.kappa),
        "target_learnability": each(lambda one: one.learnabilities @ by_mode / (total or 1.0)),
    }
    return fields, np.array([[one.learnabilities for one in of_size] for of_size in found])


def _excess(values: FloatArray, num_samples: float, ridge: float, log_kappa: float) -> float:
    kappa = np.exp(log_kappa)
    return float((values / (values + kappa)).sum() + ridge / kappa - num_samples)


def _population(eigenvalues: ArrayLike) -> FloatArray:
    values = np.asarray(eigenvalues, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or values.min() < 0:
        raise ConfigError(
            f"population eigenvalues of shape {values.shape}; needed (m,), finite and not negative. Set those below "
            "zero, which rounding makes, to zero"
        )
    return values


def _powers(powers: ArrayLike, eigenvalues: ArrayLike) -> FloatArray:
    weights = np.asarray(powers, np.float64)
    weights = weights[:, None] if weights.ndim == 1 else weights
    count = len(np.asarray(eigenvalues))
    if weights.ndim != 2 or len(weights) != count or not np.isfinite(weights).all() or weights.min(initial=0.0) < 0:
        raise ConfigError(f"powers of shape {weights.shape}; needed ({count},) or ({count}, c), not negative")
    return weights
