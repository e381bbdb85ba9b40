"""Log determinants: exact by a factor, or estimated."""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from ntkpipe.base.errors import ConfigError
from ntkpipe.base.tables import TableRows
from ntkpipe.operators.opening import as_operator
from ntkpipe.solvers.direct.cholesky import cholesky
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


def logdet(
    matrix: Any,
    *,
    ridge: float = 0.0,
    method: Literal["cholesky", "slq"] = "cholesky",
    jitter: Literal["auto"] | None = None,
    path: str | Path | None = None,
    memory_limit: int | None = None,
    monitor: Monitor = ignore,
    checkpoint: Checkpoint | None = None,
    **sampling: Any,
) -> LogDeterminant | LogDeterminantEstimate:
    """``log det(K + ridge I)``.

    Parameters
    ----------
    matrix
        K: what :func:`ntkpipe.as_operator` takes.
    ridge
        λ ≥ 0, absolute, added to the diagonal.
    method
        ``cholesky``: exact, n³/3 multiplications and additions, one pass for the factor and one for the storage floor,
        and two reads of the factor for what storage did to the value; see :func:`ntkpipe.cholesky`.
        ``slq``: an estimate with its errors in some tens of passes; see :func:`ntkpipe.slq_logdet`.
    jitter, path
        Of ``cholesky``: whether the diagonal may be raised, and where the factor goes that does not fit in memory.
    memory_limit, monitor
        As of the two.
    checkpoint
        Of ``slq``; the factor in ``path`` is its own.
    **sampling
        Further options of ``slq``: ``num_probes``, ``num_steps``, ``tol``, ``rank``, ``preconditioner``,
        ``max_passes``, ``seed``.

    Returns
    -------
    The result; either has a ``value``.

    Raises
    ------
    ConfigError
        If an option is wrong, or of the other method.
    IndefiniteError
        If a pivot is not positive; the message says where, and which ridge helps.
    ResourceError
        If the factor does not fit in memory and no path is given.
    """
    if method == "slq":
        if jitter is not None or path is not None:
            raise ConfigError("jitter and path are options of method='cholesky'")
        return slq_logdet(
            matrix, ridge=ridge, memory_limit=memory_limit, monitor=monitor, checkpoint=checkpoint, **sampling
        )
    if method != "cholesky":
        raise ConfigError(f"method={method!r}; needed 'cholesky' or 'slq'")
    if sampling:
        raise ConfigError(f"{', '.join(sampling)}: no options of method='cholesky', which is exact")
    start, operator = perf_counter(), as_operator(matrix, memory_limit=memory_limit, keep_tiles=False)
    work = operator.work
    factor = cholesky(operator, ridge=ridge, jitter=jitter, path=path, memory_limit=memory_limit, monitor=monitor)
    error, status, message = factor.logdet_error(), factor.status, factor.message
    if error > _MOST_ERROR * operator.num_rows:
        status = "indefinite at storage precision"
        message += "; but rounding of the stored entries leaves the determinant open: give a larger ridge"
    return LogDeterminant(
        status=status,
        message=message,
        work=operator.work - work,
        seconds=perf_counter() - start,
        options={**factor.options, "method": method},
        matrix=factor.matrix,
        value=factor.logdet,
        ridge=factor.ridge,
        jitter=factor.jitter,
        num_rows=factor.num_rows,
        smallest_pivot=factor.smallest_pivot,
        largest_pivot=factor.largest_pivot,
        floor=factor.storage_floor(),
        storage_error=error,
    )
