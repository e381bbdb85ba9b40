"""All eigenpairs of a kernel where they fit in memory, or those that a caller already has."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.budget import Budget
from ntkpipe.base.errors import ConfigError, ResourceError
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import format_bytes
from ntkpipe.solvers.direct.eigh import Spectrum, eigh
from ntkpipe.solvers.result import Monitor
from ntkpipe.solvers.spectral.lanczos import Eigenpairs

# `exact` has all eigenvalues in memory, `streamed` makes passes of the operator, `auto` is the former where it fits.
AnalysisMethod = Literal["auto", "exact", "streamed"]
# Products of given eigenpairs must agree with the matrix to this part of its norm.
_TOLERANCE = 1e-5
_SEED = 0


@dataclass(frozen=True)
class Eigensystem:
    """Eigenpairs in descending order."""

    eigenvalues: FloatArray  # shape (k,)
    eigenvectors: FloatArray  # shape (n, k)

    @property
    def why(self) -> str:
        """Where those of a caller come from, in words."""
        return f"{len(self.eigenvalues):,} eigenpairs were given"

    @property
    def is_whole(self) -> bool:
        """Whether these are all n."""
        return bool(self.eigenvectors.shape[0] == self.eigenvectors.shape[1])


KnownEigenpairs = Spectrum | Eigenpairs | Eigensystem  # of a symmetric matrix, however they were found


def where_it_fits(
    compute: Callable[[], Spectrum], num_rows: int, budget: Budget, method: AnalysisMethod
) -> tuple[Spectrum | None, str]:
    """All eigenvalues by LAPACK, unless streamed was asked for or they do not fit; and why, in words."""
    if method == "streamed":
        return None, "streamed was asked for"
    try:
        return compute(), "they fit in memory"
    except ResourceError:
        if method == "exact":
            raise
        room = max(0, budget.room(share=1.0))
        return None, f"all eigenvalues of {num_rows:,} rows do not fit the {format_bytes(room)} that are left"


def find_eigensystem(
    operator: Operator, given: KnownEigenpairs | None, budget: Budget, method: AnalysisMethod, monitor: Monitor
) -> tuple[Eigensystem | None, str]:
    """All eigenpairs, given or computed where they fit; else those that were given, if any. And why, in words."""
    system = None if given is None else check_eigenpairs(operator, given)
    if system is not None and system.is_whole:
        return system, system.why
    compute = partial(eigh, operator, memory_limit=budget, monitor=monitor)
    found, why = where_it_fits(compute, operator.num_rows, budget, method)
    if found is None:
        return system, f"{system.why}, and {why}" if system is not None and method == "streamed" else why
    assert found.eigenvectors is not None
    return Eigensystem(found.eigenvalues, found.eigenvectors), why


def check_eigenpairs(operator: Operator, given: KnownEigenpairs) -> Eigensystem:
    """A caller's eigenpairs, tested by a random combination: they must be orthonormal and fit the matrix."""
    vectors, n = given.eigenvectors, operator.num_rows
    if vectors is None:
        raise ConfigError("eigenpairs without eigenvectors; needed both, as ntkpipe.eigh or ntkpipe.eigsh return")
    values, vectors = np.asarray(given.eigenvalues, np.float64), np.asarray(vectors, np.float64)
    if values.ndim != 1 or vectors.shape != (n, len(values)) or not len(values):
        raise ConfigError(f"eigenvectors of shape {vectors.shape} and {values.shape} values; needed ({n}, k) and (k,)")
    if (np.diff(values) > 0).any():
        raise ConfigError("eigenvalues are not in descending order, as ntkpipe.eigh and ntkpipe.eigsh return them")
    probe = np.random.default_rng(_SEED).standard_normal(len(values))
    combined = vectors @ probe
    gap = float(np.abs(vectors.T @ combined - probe).max())
    error = float(np.linalg.norm(operator.matmat(combined) - vectors @ (values * probe)))
    scale = float(np.abs(values).max()) * len(values) ** 0.5
    if not gap <= _TOLERANCE or not error <= _TOLERANCE * scale:
        raise ConfigError(
            f"eigenpairs that are not of this matrix: orthonormal to {gap:.2g}, products differ by {error:.2g} of "
            f"{scale:.3g}; needed {_TOLERANCE:g}. Compute them from the same kernel, by ntkpipe.eigh or ntkpipe.eigsh"
        )
    return Eigensystem(values, vectors)
