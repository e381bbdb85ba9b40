"""Eigenpairs of a symmetric matrix, all or the leading ones, however they were found; and a test of given ones."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.given import as_real
from ntkpipe.base.operator import Operator
from ntkpipe.base.tables import TableRows
from ntkpipe.solvers.result import Result

# Products of given eigenpairs must agree with the matrix to this part of its norm.
_TOLERANCE = 1e-5
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Eigenpairs(Result):
    """Eigenpairs of a symmetric matrix: the leading k, or all n."""

    # Descending, float64, shape (k,). Of `eigsh` they are Rayleigh quotients of the vectors. Of LAPACK errors, also of
    # small ones, are at most about `n eps λ_1`, mostly a few `eps λ_1`
    eigenvalues: FloatArray = field(repr=False)
    eigenvectors: FloatArray | None = field(repr=False)  # orthonormal columns in this order, (n, k); none by `eigvalsh`
    # Effect of rounding to the storage dtype on K in the spectral norm, as :meth:`Operator.storage_floor`; of `eigsh`
    # with the Frobenius norm of the Ritz values, which saves a pass. Eigenvalues below it are not known
    floor: float
    # `max |VᵀV - I|` of `eigsh`; of `eigh` `|VᵀV X - X|_F / |X|_F` for random X; none without eigenvectors
    orthogonality: float | None
    # By `eigsh`: `|K v - λ v| / max(|λ|, floor)` of each pair, from a product with K, shape (k,). For a residual norm
    # `r` some eigenvalue of K lies within `r` of λ; the error of λ itself is about `r² / gap`.
    residuals: FloatArray = field(default_factory=lambda: np.zeros(0), repr=False)
    # By `eigsh`: largest residual of the k pairs after each pass, shape (passes, 2): relative to the largest
    # eigenvalue, and each relative to its own as in `residuals`; NaN while the space has fewer than k dimensions. These
    # come from the recurrence and cost nothing.
    history: FloatArray = field(default_factory=lambda: np.zeros((0, 2)), repr=False)
    # By LAPACK: `|Σλ - tr K| / |K|_F` and `|Σλ² - |K|_F²| / |K|_F²`
    trace_error: float | None = None
    frobenius_error: float | None = None
    residual: float | None = None  # by `eigh`: `|K X - V Λ VᵀX|_F / (|K|_F |X|_F / sqrt(n))` for random X

    @property
    def is_whole(self) -> bool:
        """Whether these are all n, with eigenvectors."""
        vectors = self.eigenvectors
        return vectors is not None and vectors.shape[0] == vectors.shape[1] == len(self.eigenvalues)

    @property
    def vectors(self) -> FloatArray:
        """The eigenvectors, which must be there."""
        if self.eigenvectors is None:
            raise ConfigError("eigenpairs without eigenvectors; needed both, as ntkpipe.eigh or ntkpipe.eigsh return")
        return self.eigenvectors

    @property
    def why(self) -> str:
        """Where those of a caller come from, in words."""
        return f"{len(self.eigenvalues):,} eigenpairs were given"

    def _rows(self) -> TableRows:
        values = self.eigenvalues
        below, count = int((np.abs(values) < self.floor).sum()), len(values)
        which = f"{count} leading" if len(self.residuals) else f"all {count}"
        rows = [
            ("eigenvalues", f"{which}, {values[0]:.6g} to {values[-1]:.6g}"),
            ("storage floor", f"{self.floor:.2g}, {below} of {count} eigenvalues below"),
        ]
        if len(self.residuals):
            rows.append(("residuals", f"at most {self.residuals.max():.2g} of each eigenvalue"))
        if self.trace_error is not None:
            rows.append(("trace, Frobenius", f"agree to {self.trace_error:.2g}, {self.frobenius_error:.2g}"))
        if self.orthogonality is not None:
            of_vectors = "" if self.residual is None else f"residual {self.residual:.2g}, "
            rows.append(("eigenvectors", f"{of_vectors}orthogonality {self.orthogonality:.2g}"))
        return rows


def pairs_of(name: str, given: Any, num_rows: int) -> tuple[FloatArray, FloatArray]:
    """Eigenvalues (k,) and eigenvectors (n, k) of what a caller gives as eigenpairs, in float64."""
    names = ("eigenvalues", "eigenvectors")
    if any(getattr(given, part, None) is None for part in names):
        what = f"{name} without eigenvectors" if hasattr(given, names[0]) else f"{name}={type(given).__name__}"
        raise ConfigError(f"{what}; needed both, as ntkpipe.eigh or ntkpipe.eigsh return")
    values, vectors = (as_real(f"{part} of {name}", getattr(given, part)).astype(np.float64) for part in names)
    if values.ndim != 1 or vectors.shape != (num_rows, len(values)) or not len(values):
        found = f"{name} of {values.shape} values and vectors of shape {vectors.shape}"
        raise ConfigError(f"{found}; needed eigenvalues (k,) and eigenvectors ({num_rows}, k)")
    return values, vectors


def check_eigenpairs(operator: Operator, given: Any) -> Eigenpairs:
    """Eigenpairs of a caller in float64, tested by a random combination: orthonormal, and those of the matrix."""
    values, vectors = pairs_of("eigenpairs", given, operator.num_rows)
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
    about: dict[str, Any] = {"status": "converged", "message": "given", "floor": operator.storage_floor()}
    return Eigenpairs(eigenvalues=values, eigenvectors=vectors, orthogonality=gap, **about)
