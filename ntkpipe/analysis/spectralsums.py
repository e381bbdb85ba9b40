"""Sums of a function over all eigenvalues: exact, or estimated from a spectral density with what is known of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ntkpipe.solvers.density import Density

Function = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Sum:
    """Σ f(λ_i), and what it may be off by: zero if exact.

    Attributes
    ----------
    value, standard_error, truncation_error
        The last two of other probes, and of more Lanczos steps.
    """

    value: float
    standard_error: float
    truncation_error: float

    @property
    def error(self) -> float:
        """Both together."""
        return self.standard_error + self.truncation_error


def sum_of_values(values: NDArray[np.float64], function: Function) -> Sum:
    """Exact, from all eigenvalues."""
    return Sum(float(function(values).sum()), 0.0, 0.0)


def sum_of_density(density: Density, function: Function, trace: float, squares: float) -> Sum:
    """Estimated, with trace and squared Frobenius norm as control variates.

    Eigenvalues that were spliced in count exactly. For the rest, f is fitted by a + b λ + c λ² in the measure of all
    probes; the sum of that is known, and only what f differs from it is estimated, so the scatter of the probes counts
    for that alone. What more steps could change is told by thinning: the rule with every two neighbouring nodes merged
    in their centre stands for one of half as many nodes.

    Parameters
    ----------
    density
        With the leading eigenpairs spliced in.
    function
        f.
    trace, squares
        Σ λ_i and Σ λ_i² of all eigenvalues.
    """
    exact = density.eigenvalues
    rest = density.num_rows - len(exact)
    if rest == 0:
        return sum_of_values(exact, function)
    nodes, weights = density.nodes, density.weights
    moments = np.array([rest, trace - exact.sum(), squares - (exact**2).sum()])
    scale = max(float(np.abs(nodes).max()), np.finfo(np.float64).tiny)

    def powers(values: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled = values / scale
        return np.stack([np.ones_like(scaled), scaled, scaled**2], axis=-1)

    root = np.sqrt(weights.reshape(-1))
    fit, *_ = np.linalg.lstsq(root[:, None] * powers(nodes.reshape(-1)), root * function(nodes).reshape(-1), rcond=None)

    def beyond(values: NDArray[np.float64], mass: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((mass * (function(values) - powers(values) @ fit)).sum(axis=1))

    samples = beyond(nodes, weights)
    known = float(function(exact).sum() + fit @ (moments / np.array([1.0, scale, scale**2])))
    thinned = beyond(*_thinned(nodes, weights))
    return Sum(
        known + float(samples.mean()),
        float(samples.std(ddof=1) / len(samples) ** 0.5),
        abs(float(thinned.mean() - samples.mean())),
    )


def _thinned(
    nodes: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Every two neighbouring nodes of each rule merged: their weight, in their centre."""
    num_pairs = nodes.shape[1] // 2
    paired = (slice(None), slice(0, 2 * num_pairs))
    shape = (len(nodes), num_pairs, 2)
    mass = weights[paired].reshape(shape).sum(axis=2)
    centre = (weights[paired] * nodes[paired]).reshape(shape).sum(axis=2) / np.where(mass > 0, mass, 1.0)
    left = (slice(None), slice(2 * num_pairs, None))
    return np.concatenate([centre, nodes[left]], axis=1), np.concatenate([mass, weights[left]], axis=1)
