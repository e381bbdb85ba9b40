"""Gauss and Gauss-Radau rules of the measures that Lanczos coefficients define, and bounds of counts."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ntkpipe.base.arrays import FloatArray

_EPS = float(np.finfo(np.float64).eps)
_SETTLED = 1e-2  # a node is an eigenvalue if its Ritz residual is this small against the distance that matters


@dataclass(frozen=True)
class QuadratureRule:
    """One rule for each of p measures."""

    nodes: FloatArray  # Ritz values, shape (p, m), ascending
    weights: FloatArray  # shape (p, m), not negative; their sum is the probe's squared norm
    residuals: FloatArray  # distances within which eigenvalues lie, rounding included, shape (p, m)

    def integrate(self, function: Callable[[FloatArray], FloatArray]) -> FloatArray:
        """Integral of a function of the nodes, shape (p,)."""
        return np.asarray((self.weights * function(self.nodes)).sum(axis=1))

    def mass_above(self, thresholds: FloatArray) -> FloatArray:
        """Weight of the nodes above each of L thresholds, shape (p, L)."""
        found = np.zeros((len(self.nodes), len(thresholds)))
        for row, nodes, weights in zip(found, self.nodes, self.weights, strict=True):
            tails = np.append(np.cumsum(weights[::-1])[::-1], 0.0)
            row[:] = tails[np.searchsorted(nodes, thresholds, "right")]
        return found

    def unsettled(self, thresholds: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Weight of the nodes next to each of L thresholds that may lie on the other side: (above, below), each (p, L).

        By the separation theorem of Chebyshev, Markov and Stieltjes (Szegö, Orthogonal Polynomials, section 3.41) what
        a measure has above λ differs from its rule by no more than the weights of the two nodes around λ. Nodes that
        have converged to an eigenvalue are on their side, to 1e-4 of their weight.
        """
        above, below = np.zeros((2, len(self.nodes), len(thresholds)))
        for index in range(len(self.nodes)):
            kept = self.weights[index] > 0
            nodes, weights, residuals = self.nodes[index, kept], self.weights[index, kept], self.residuals[index, kept]
            places = np.searchsorted(nodes, thresholds, "right")
            for found, has, at in ((above, places < len(nodes), places), (below, places > 0, places - 1)):
                at = at[has]
                open_ = residuals[at] > _SETTLED * np.abs(nodes[at] - thresholds[has])
                found[index, has] = np.where(open_, weights[at], 0.0)
        return above, below


def gauss_rule(alphas: FloatArray, betas: FloatArray, masses: FloatArray) -> QuadratureRule:
    """The Gauss rules of p tridiagonal matrices (Golub and Welsch 1969)."""
    nodes, vectors = np.linalg.eigh(_tridiagonal(alphas, betas))
    rounding = 4 * _EPS * np.abs(nodes).max(axis=1, keepdims=True)
    weights = masses[:, None] * vectors[:, 0] ** 2
    return QuadratureRule(nodes, weights, np.abs(vectors[:, -1] * betas[:, -1:]) + rounding)


def radau_rule(alphas: FloatArray, betas: FloatArray, masses: FloatArray, end: float) -> QuadratureRule:
    """The Gauss-Radau rules, of m + 1 nodes, with one node at ``end``, below all eigenvalues (Golub 1973)."""
    num_steps = alphas.shape[1]
    shifted = _tridiagonal(alphas, betas) - end * np.eye(num_steps)
    right = np.zeros((*alphas.shape, 1))
    right[:, -1, 0] = betas[:, -1] ** 2
    last = end + np.linalg.solve(shifted, right)[:, -1, 0]
    # A space that has ended is not coupled: any node within the spectrum will do, since it gets no weight.
    last = np.where(betas[:, -1] > 0, last, alphas[:, 0])
    longer = np.concatenate([betas, np.zeros_like(last)[:, None]], axis=1)
    return gauss_rule(np.concatenate([alphas, last[:, None]], axis=1), longer, masses)


def _tridiagonal(alphas: FloatArray, betas: FloatArray) -> FloatArray:
    num_probes, size = alphas.shape
    found = np.zeros((num_probes, size, size))
    index = np.arange(size)
    found[:, index, index] = alphas
    found[:, index[1:], index[:-1]] = found[:, index[:-1], index[1:]] = betas[:, : size - 1]
    return found
