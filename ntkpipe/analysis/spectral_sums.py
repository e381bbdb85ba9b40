"""Sums of a function over all eigenvalues: exact, or estimated from a spectral density with what is known of them."""

from collections.abc import Callable

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.solvers.inverse.contract import WithError
from ntkpipe.solvers.spectral.density import Density

_EPS = float(np.finfo(np.float64).eps)

Function = Callable[[FloatArray], FloatArray]


def sum_of_values(values: FloatArray, function: Function) -> WithError:
    """Exact, from all eigenvalues."""
    return WithError(float(function(values).sum()), 0.0)


def sum_of_density(density: Density, function: Function, trace: float, squares: float) -> WithError:
    """Estimated, with trace and squared Frobenius norm as control variates, and with both errors.

    Eigenvalues that were spliced in count exactly. For the rest, f is fitted by a + b λ + c λ² in the measure of all
    probes; the sum of that is known, and only what f differs from it is estimated, so the scatter of the probes counts
    for that alone.

    What more Lanczos steps could change is bracketed: where derivatives of f alternate in sign from the third on, as
    those of λ / (λ + ridge) and -λ log λ do, the integral over a probe's measure lies between its Gauss rule and the
    Gauss-Radau rule with a node at the lower end of the spectrum, zero (Golub and Meurant 2010, Matrices, Moments and
    Quadrature with Applications, chapter 6). The middle is taken, and half of the width is the truncation error.
    """
    exact = density.eigenvalues
    rest = density.num_rows - len(exact)
    if rest == 0:
        return sum_of_values(exact, function)
    nodes, weights = density.nodes, density.weights
    moments = np.array([rest, trace - exact.sum(), squares - (exact**2).sum()])
    scale = max(float(np.abs(nodes).max()), np.finfo(np.float64).tiny)

    def powers(values: FloatArray) -> FloatArray:
        scaled = values / scale
        return np.stack([np.ones_like(scaled), scaled, scaled**2], axis=-1)

    root = np.sqrt(weights.reshape(-1))
    fit, *_ = np.linalg.lstsq(root[:, None] * powers(nodes.reshape(-1)), root * function(nodes).reshape(-1), rcond=None)

    def beyond(values: FloatArray, mass: FloatArray) -> FloatArray:
        return np.asarray((mass * (function(values) - powers(values) @ fit)).sum(axis=1))

    known = float(function(exact).sum() + fit @ (moments / np.array([1.0, scale, scale**2])))
    gauss, radau = beyond(nodes, weights), beyond(*_radau(density))
    samples = (gauss + radau) / 2
    standard_error = float(samples.std(ddof=1) / len(samples) ** 0.5)
    return WithError(known + float(samples.mean()), standard_error + float(np.abs(gauss - radau).mean() / 2))


def _radau(density: Density) -> tuple[FloatArray, FloatArray]:
    """Nodes and weights of the Gauss-Radau rules, of one node more, with a node at zero.

    In the eigenvectors of a probe's tridiagonal matrix T the longer one is diagonal but for its last row, which holds
    their last entries times the coupling that leads out of the space: the residuals of the nodes, whose signs
    alternate where first entries are positive (Golub 1973).
    """
    nodes, weights, residuals = density.nodes, density.weights, density.node_residuals
    count = nodes.shape[1]
    # Below all nodes, also where rounding of the storage made eigenvalues negative.
    ends = np.minimum(0.0, nodes.min(axis=1) - _EPS * np.abs(nodes).max(axis=1))
    gaps = nodes - ends[:, None]
    border = residuals * (-1.0) ** np.arange(count - 1, -1, -1)
    arrow = np.zeros((len(nodes), count + 1, count + 1))
    index = np.arange(count)
    arrow[:, index, index] = nodes
    arrow[:, index, count] = arrow[:, count, index] = border
    arrow[:, count, count] = ends + (residuals**2 / np.where(gaps > 0, gaps, 1.0)).sum(axis=1)
    values, vectors = np.linalg.eigh(arrow)
    first = np.einsum("pj,pjk->pk", np.sqrt(weights), vectors[:, :count])
    return values, first**2
