"""Eigenvalues of the kernels of a network on the sphere, by degree: which frequencies are learnt how fast."""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.given import plain_value
from ntkpipe.base.tables import as_table
from ntkpipe.infinite.networks import Network, as_network

_NODES = 40  # of a panel
_HALVINGS = 40  # of panels towards t = 1 and t = -1, where kernels have square roots
_MOST = 10_000  # dimensions, degrees
_COLUMNS = 1024  # points of the sphere at a time
_SHOWN = 12


@dataclass(frozen=True)
class SphereSpectrum:
    """Eigenvalues of NNGP and NTK on the sphere with its uniform distribution."""

    dimension: int  # d: points are in R^d
    radius: float
    degrees: tuple[int, ...]  # k of the spherical harmonics
    multiplicity: FloatArray = field(repr=False)  # N(d, k): eigenfunctions of each degree; infinite beyond float64
    nngp: FloatArray = field(repr=False)  # μ_k of each degree
    ntk: FloatArray = field(repr=False)
    trace: tuple[float, float]  # κ(1) of NNGP and NTK: the sum of all N(d, k) μ_k

    def __str__(self) -> str:
        def row(place: int) -> tuple[str, str]:
            values = f"{self.nngp[place]:.6g} of the NNGP, {self.ntk[place]:.6g} of the NTK"
            return f"degree {self.degrees[place]}", f"{values}, {self.multiplicity[place]:.6g} times"

        shown = [row(place) for place in range(min(len(self.degrees), _SHOWN))]
        left_out = len(self.degrees) - len(shown)
        sphere = [("points", f"of norm {self.radius:.6g} in {self.dimension} dimensions")]
        traces = f"{self.trace[0]:.6g} of the NNGP, {self.trace[1]:.6g} of the NTK"
        more = [("", f"and {left_out} degrees more")] if left_out else []
        return as_table([*sphere, ("sum of all eigenvalues", traces), *shown, *more])


def sphere_spectrum(
    net: Network, dimension: int, degrees: int | ArrayLike = 24, *, radius: float = 1.0
) -> SphereSpectrum:
    """Find the eigenvalues of NNGP and NTK on the sphere, by the degree of their eigenfunctions.

    A kernel κ(x·y) on the sphere in R^d has the spherical harmonics as eigenfunctions. By Funk's and Hecke's formula
    those of degree k have ``μ_k = ∫ κ(t) P_k(t) dν(t)`` with the Gegenbauer polynomials of P_k(1) = 1, and
    dν ∝ (1 - t²)^((d - 3)/2) dt (Bach 2017, JMLR 18; Bietti, Mairal 2019, arXiv 1905.12173). Gradient flow learns a
    function of degree k in a time ∝ 1/μ_k, so the decay of μ_k is the spectral bias: of ReLU networks like k^-d for the
    NTK and k^-(d + 2) for the NNGP, at any depth (Bietti, Bach 2021, arXiv 2009.14397), of erf faster than any power.
    Without biases and with one hidden layer of ReLU, μ_k = 0 for odd k ≥ 3.

    The integral is over the angle, by 40 Gauss-Legendre nodes in each of panels that are halved 40 times towards both
    ends, where kernels have square roots. It is exact to rounding, about 1e-15 κ(1) beside the errors of the kernel
    itself, which is absolute: small eigenvalues of high degree have fewer digits.

    Memory: ``8 d`` bytes for each of 1,024 nodes at a time; cost: one row of the kernel at 3,200 nodes and more, which
    grow with the largest degree and √d.

    Parameters
    ----------
    net
        A network on vectors, such as :class:`ntkpipe.infinite.FullyConnected`.
    dimension
        d of the sphere in R^d, from 2.
    degrees
        Which degrees k ≥ 0, or how many from 0 on.
    radius
        Norm of the inputs. With ``first_layer="mean"`` inputs of norm √d have a mean square of one.

    Returns
    -------
    Eigenvalues of the integral operator ``f ↦ ∫ κ(x·y) f(y) dy``, dy uniform with mass one, so that those of an n × n
    kernel matrix of uniform points are about n μ_k, N(d, k) times each.

    Raises
    ------
    ConfigError
        If the network is not one on vectors or leaves the range of float64, or a number is out of range: d and k go up
        to 10,000.
    """
    net, given = as_network(net), plain_value(degrees)
    wanted = tuple(given if isinstance(given, list | tuple) else range(_count("degrees", given)))
    for degree in wanted:
        _count("a degree", degree)
    dimension = _count("dimension", dimension)
    if not wanted or dimension < 2:
        raise ConfigError(f"degrees={given!r}, dimension={dimension}; needed at least one degree, and 2 dimensions")
    check_number("radius", radius, low=2.0**-200, high=2.0**200)
    angle, mass = _nodes(dimension, max(wanted))
    one, parts = net.prepare(_points(np.zeros(1), dimension, radius)), []
    for start in range(0, len(angle), _COLUMNS):
        columns = net.prepare(_points(angle[start : start + _COLUMNS], dimension, radius))
        parts.append(np.concatenate(net.tile(one, columns)))
    values = np.concatenate(parts, axis=1)  # NNGP, NTK; nodes
    by_degree = _projections(dimension, max(wanted), np.cos(angle), mass * values)
    nngp, ntk = np.ascontiguousarray(by_degree[list(wanted)].T)
    at_one = [float(kernel[0]) for kernel in net.diagonal(one)]
    multiplicity = np.array([_multiplicity(dimension, degree) for degree in wanted])
    return SphereSpectrum(dimension, float(radius), wanted, multiplicity, nngp, ntk, (at_one[0], at_one[1]))


def _count(name: str, value: int) -> int:
    if int(check_number(name, value, low=0, high=_MOST)) != value:
        raise ConfigError(f"{name}={value!r}; needed an integer")
    return int(value)


def _points(angle: FloatArray, dimension: int, radius: float) -> FloatArray:
    """Points of the sphere at angles from the first one."""
    found = np.zeros((len(angle), dimension))
    found[:, 0], found[:, 1] = radius * np.cos(angle), radius * np.sin(angle)
    return found


def _nodes(dimension: int, degree: int) -> tuple[FloatArray, FloatArray]:
    """Angles and weights of the uniform distribution, fine enough for polynomials of so high a degree."""
    ends = np.pi * 0.5 ** np.arange(_HALVINGS, 0, -1)
    edges = np.concatenate([[0.0], ends, np.pi - ends[-2::-1], [np.pi]])
    widest = min(20 / max(degree, 1), 4 / math.sqrt(dimension))
    counts = np.ceil(np.diff(edges) / widest).astype(int)
    pieces = zip(edges, edges[1:], counts, strict=False)
    starts = np.concatenate([np.linspace(low, high, count, endpoint=False) for low, high, count in pieces])
    half = np.diff(starts, append=np.pi)[:, None] / 2
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    angle = (starts[:, None] + half + half * nodes).ravel()
    mass = (half * weights).ravel() * np.sin(angle) ** (dimension - 2)
    return angle, mass / mass.sum()


def _projections(dimension: int, degree: int, t: FloatArray, values: FloatArray) -> FloatArray:
    """Sums of values times P_k(t), (degree + 1, …), with P_k(1) = 1: Chebyshev's for d = 2, Legendre's for d = 3."""
    found, before, now = [], np.ones_like(t), t
    for k in range(1, degree + 2):
        found.append(values @ before)
        before, now = now, ((2 * k + dimension - 2) * t * now - k * before) / (k + dimension - 2)
    return np.array(found)


def _multiplicity(dimension: int, degree: int) -> float:
    """N(d, k), the harmonic polynomials of degree k in d variables: all homogeneous ones but multiples of |x|²."""
    lower = math.comb(degree + dimension - 3, dimension - 1) if degree > 1 else 0
    try:
        return float(math.comb(degree + dimension - 1, dimension - 1) - lower)
    except OverflowError:
        return math.inf
