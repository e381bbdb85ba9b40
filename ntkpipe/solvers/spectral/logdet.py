"""Log determinants: exact by a factor, or estimated."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ntkpipe.base.budget import MemoryLimit
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator, Work
from ntkpipe.base.ridge import RidgeScale
from ntkpipe.base.tables import TableRows
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.linear.preconditioner import Preconditioner
from ntkpipe.solvers.recording import recorded
from ntkpipe.solvers.result import Monitor, Result, ignore
from ntkpipe.solvers.spectral.slq_logdet import LogDeterminantEstimate, slq_logdet
from ntkpipe.store.results import Checkpoint

_MOST_ERROR = 0.01  # as a fraction of n: one per cent of the geometric mean of the eigenvalues


@dataclass(frozen=True, kw_only=True)
class LogDeterminant(Result):
    """``log det(K + ridge I)`` by a Cholesky factor: exact for the stored entries but for rounding in float64."""

    value: float  # log det(K + (ridge + jitter) I)
    ridge: float  # ridge, jitter: what was added to the diagonal; a jitter only where it was allowed and needed
    jitter: float
    num_rows: int  # n
    smallest_pivot: float  # smallest_pivot, largest_pivot: of the factor, squared
    largest_pivot: float
    floor: float  # eigenvalues below it are not known, because entries were rounded when they were stored
    # About what that did to the value, see `CholeskyFactor.logdet_error`. Above n / 100 the status is `indefinite at
    # storage precision`.
    storage_error: float

    def _rows(self) -> TableRows:
        added = f"{self.ridge:.6g}" + (f", and a jitter of {self.jitter:.6g}" if self.jitter else "")
        return [
            ("log det", f"{self.value:.12g} ± {self.storage_error:.2g} (rounding of stored entries)"),
            ("per row", f"{self.value / self.num_rows:.6g}"),
            ("ridge", added),
            ("pivots", f"{self.smallest_pivot:.4g} to {self.largest_pivot:.4g}; storage floor {self.floor:.2g}"),
        ]


@recorded(keep_tiles=lambda given: given["method"] == "slq")
def logdet(
    matrix: Any,
    *,
    ridge: float = 0.0,
    ridge_scale: RidgeScale = None,
    method: Literal["cholesky", "slq"] = "cholesky",
    jitter: Literal["auto"] | None = None,
    path: str | Path | None = None,
    preconditioner: Literal["rpcholesky", "nystrom"] | Preconditioner | None = None,
    rank: int | None = None,
    num_probes: int | None = None,
    num_steps: int | None = None,
    tol: float | None = None,
    max_passes: int | None = None,
    seed: int | None = None,
    memory_limit: MemoryLimit = None,
    monitor: Monitor = ignore,
    checkpoint: Checkpoint | None = None,
) -> LogDeterminant | LogDeterminantEstimate:
    """``log det(K + ridge I)``.

    Parameters
    ----------
    method
        ``cholesky``: exact, n³/3 multiplications and additions, one pass for the factor and one for the storage floor,
        and two reads of the factor for what storage did to the value; see :func:`ntkpipe.cholesky`.
        ``slq``: an estimate with its errors in some tens of passes; see :func:`ntkpipe.slq_logdet`.
    jitter
        Whether ``cholesky`` may raise the diagonal: ``auto``, or none.
    path
        Folder for a factor of ``cholesky`` that does not fit in memory.
    preconditioner
        How the preconditioner of ``slq`` is made, or one that was made before; default ``rpcholesky``.
    num_probes
        Number of random vectors of ``slq``; default 16.
    num_steps
        Lanczos steps of ``slq``; default as many as are needed.
    tol
        Largest error of ``slq`` that is called converged, as a fraction of n; default 0.01.
    max_passes
        Most Lanczos steps of ``slq``; default 200.
    checkpoint
        Where steps of ``slq`` are saved; a factor in ``path`` is its own.

    Returns
    -------
    The result; either has a ``value``.

    Raises
    ------
    IndefiniteError
        If a pivot is not positive; the message says where, and which ridge helps.
    """
    operator: Operator = matrix
    sampling: dict[str, Any] = {"preconditioner": preconditioner, "rank": rank, "num_probes": num_probes}
    sampling |= {"num_steps": num_steps, "tol": tol, "max_passes": max_passes, "seed": seed}
    given = {name: value for name, value in sampling.items() if value is not None}
    others = [name for name, value in {"jitter": jitter, "path": path}.items() if value is not None]
    if wrong := others if method == "slq" else list(given):
        raise ConfigError(f"{', '.join(wrong)}: no option{'s'[: len(wrong) > 1]} of method={method!r}")
    common: dict[str, Any] = {"ridge": ridge, "ridge_scale": ridge_scale, "memory_limit": memory_limit}
    if method == "slq":
        found = slq_logdet(operator, **common, **given, monitor=monitor, checkpoint=checkpoint)
        options = {name: value for name, value in found.options.items() if name != "memory_limit"}
        return replace(found, work=Work(), seconds=0.0, options=options)  # the rest is recorded around this call
    factor = cholesky(operator, **common, jitter=jitter, path=path, monitor=monitor)
    error, status, message = factor.logdet_error(), factor.status, factor.message
    if error > _MOST_ERROR * operator.num_rows:
        status = "indefinite at storage precision"
        message += "; but rounding of the stored entries leaves the determinant open: give a larger ridge"
    return LogDeterminant(
        status=status,
        message=message,
        options={name: factor.options[name] for name in ("panel_width", "threads")},
        value=factor.logdet,
        ridge=factor.ridge,
        jitter=factor.jitter,
        num_rows=factor.num_rows,
        smallest_pivot=factor.smallest_pivot,
        largest_pivot=factor.largest_pivot,
        floor=factor.storage_floor(),
        storage_error=error,
    )
