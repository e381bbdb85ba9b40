"""For tests of operators and solvers, here and in what others build on them: matrices whose spectrum is known."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray


def matrix_with_spectrum(eigenvalues: ArrayLike, *, seed: int = 0) -> NDArray[np.float64]:
    """A symmetric matrix of these eigenvalues and of random eigenvectors, exactly symmetric.

    Parameters
    ----------
    eigenvalues
        Shape (n,). Memory is three matrices of n rows.
    seed
        Of the eigenvectors, which are uniformly distributed (the Q of a Gaussian matrix, its signs made random).
    """
    values = np.asarray(eigenvalues, np.float64)
    rng = np.random.default_rng(seed)
    vectors, upper = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    vectors *= np.sign(np.diagonal(upper))
    matrix = (vectors * values) @ vectors.T
    return np.asarray((matrix + matrix.T) / 2, np.float64)


def power_law(num_rows: int, *, condition: float, largest: float = 1e4) -> NDArray[np.float64]:
    """Eigenvalues ``largest * i^-p`` with p such that the last is ``largest / condition``, descending."""
    exponent = np.log(condition) / np.log(num_rows)
    return np.asarray(largest * np.arange(1, num_rows + 1) ** -exponent, np.float64)


def spectra(num_rows: int) -> Mapping[str, NDArray[np.float64]]:
    """Spectra that solvers must cope with, by name, each in descending order.

    Power laws as neural tangent kernels have them, at conditions of 1e4 to 1e10; clusters of equal eigenvalues; a few
    large ones over a floor; a singular one, of rank 3n/4; and one that rounding made indefinite, as float32 storage
    does to a small spectrum.
    """
    n = num_rows
    found = {f"power_law_1e{digits}": power_law(n, condition=10.0**digits) for digits in (4, 6, 8, 10)}
    found["clustered"] = np.sort(np.repeat([1e3, 1e2, 10.0, 1.0], -(-n // 4))[:n])[::-1]
    found["spiked"] = np.concatenate([np.geomspace(1e5, 1e3, min(10, n)), np.ones(max(0, n - 10))])
    found["singular"] = np.concatenate([power_law(3 * n // 4, condition=1e4), np.zeros(n - 3 * n // 4)])
    rounded = power_law(n, condition=1e8)
    negative = -1e-4 * np.arange(1, n // 10 + 1) / max(1, n // 10)
    found["indefinite"] = np.concatenate([rounded[: n - len(negative)], negative])
    return found
