"""Angles between leading eigenspaces, and how well they are known."""

import math

import numpy as np
from scipy.linalg import subspace_angles

from ntkpipe.analysis.comparing.spectra import Ends
from ntkpipe.base.arrays import FloatArray


def principal_angles(a: FloatArray, b: FloatArray) -> FloatArray:
    """Principal angles between the ranges of two matrices of orthonormal columns, ascending, in radians.

    Their cosines are the singular values of AᵀB (Björck, Golub 1973, Numerical methods for computing angles between
    linear subspaces, Math. Comp. 27, Theorem 1). SciPy takes small ones from sines, which have digits where cosines are
    near one (Knyazev, Argentati 2002, SIAM J. Sci. Comput. 23).
    """
    return np.asarray(subspace_angles(a, b)[::-1], np.float64)


def outer_vectors(vectors: FloatArray, num_outputs: int) -> FloatArray:
    """``V ⊗ I_O``: eigenvectors of ``K ⊗ I_O``, O for each of K, shape (n O, k O)."""
    if num_outputs == 1:
        return vectors
    return np.asarray(np.kron(vectors, np.eye(num_outputs)), np.float64)


def angle_error(a: Ends, b: Ends) -> float:
    """How far the largest angle can be off, in radians: for each space the residual over its gap, and added up.

    That is the sin Θ theorem (Davis, Kahan 1970, SIAM J. Numer. Anal. 7) with the gap of the values found; infinite
    where there is none.
    """
    errors = [0.0 if ends.residual == 0 else ends.residual / ends.gap if ends.gap > 0 else math.inf for ends in (a, b)]
    return float(min(sum(math.asin(min(1.0, error)) for error in errors), math.pi / 2))
