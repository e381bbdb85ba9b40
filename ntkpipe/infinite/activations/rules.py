"""One-dimensional rules for functions under a Gaussian: trapezoidal where they are analytic, panels between kinks."""

import math
from functools import cache

import numpy as np

from ntkpipe.base.arrays import FloatArray

REACH = 14.08  # standard deviations: 704 steps of the finest rule, a number that halves six times
_NODES = 20  # of a Gauss–Legendre panel


def density(u: FloatArray) -> FloatArray:
    """Density of the standard normal distribution."""
    return np.asarray(np.exp(-0.5 * u * u) / math.sqrt(2.0 * math.pi))


@cache
def trapezoid(step: float) -> tuple[FloatArray, FloatArray]:
    """Nodes and weights, the density included; exponentially exact for analytic functions."""
    count = round(REACH / step)
    nodes = np.asarray(step * np.arange(-count, count + 1), np.float64)
    return nodes, step * density(nodes)


def panels(edges: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Gauss–Legendre nodes and weights between edges along the last axis, the density included."""
    at, weights = _legendre()
    half = 0.5 * np.diff(edges)[..., None]
    nodes = edges[..., :-1, None] + half * (1.0 + at)
    return nodes.reshape(*edges.shape[:-1], -1), (half * weights * density(nodes)).reshape(*edges.shape[:-1], -1)


@cache
def _legendre() -> tuple[FloatArray, FloatArray]:
    return np.polynomial.legendre.leggauss(_NODES)


def cut(width: float, cuts: FloatArray) -> FloatArray:
    """Edges of panels of at most a width, with more edges at the cuts."""
    count = round(2 * REACH / width)
    return np.union1d(np.linspace(-REACH, REACH, count + 1), cuts[np.abs(cuts) < REACH])


def hermite(u: FloatArray, terms: int) -> FloatArray:
    """Orthonormal Hermite polynomials h_0, h_1, … at nodes, (terms, nodes)."""
    found = np.empty((terms, len(u)))
    found[0], found[1] = 1.0, u
    for k in range(1, terms - 1):
        found[k + 1] = (u * found[k] - math.sqrt(k) * found[k - 1]) / math.sqrt(k + 1)
    return found
