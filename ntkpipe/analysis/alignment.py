"""How well a kernel fits its targets: power of the targets along eigendirections, and alignments."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import Budget, MemoryLimit, check_number
from ntkpipe.base.operator import Operator, Work
from ntkpipe.base.tables import TableRows
from ntkpipe.base.targets import Task
from ntkpipe.learning.regression.sources import train_targets
from ntkpipe.solvers.eigenpairs import Eigenpairs
from ntkpipe.solvers.inverse.choice import AnalysisMethod, all_eigenpairs, are_all_cheaper
from ntkpipe.solvers.memory import bytes_of_eigsh
from ntkpipe.solvers.result import Monitor, OfTargets, Status, ignore, recorded
from ntkpipe.solvers.spectral.lanczos import eigsh
from ntkpipe.store.results import Checkpoint

_SHARES = (0.5, 0.9, 0.99)
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, kw_only=True)
class Alignment(OfTargets):
    """How well a kernel fits its targets."""

    method: str  # `exact` with all eigenpairs, or `streamed` with the leading ones; alignments are exact in both
    why: str
    num_rows: int  # n
    num_outputs: int  # outputs that share the kernel; a full NTK has one, and a row for each output of a sample
    eigenvalues: FloatArray = field(repr=False)  # eigenvalues of the directions, descending, shape (k,)
    powers: FloatArray = field(repr=False)  # (u_iᵀ y)² of each direction and output, shape (k, c)
    cumulative_power: FloatArray = field(repr=False)  # C(i), the share of it in the first i directions, shape (k,)
    cumulative_power_error: FloatArray = field(repr=False)  # what C(i) is off by at most, by residuals; zero if exact
    # How many directions hold 50, 90 and 99 % of the power; none where the leading ones do not
    num_directions: tuple[int | None, int | None, int | None]
    alignment: float  # kernel-target alignment
    centred_alignment: float  # the same of centred kernel and targets

    def _rows(self) -> TableRows:
        known = len(self.cumulative_power)
        shown = [count for count in (1, 10, 100, 1000) if count <= known]
        said = [
            f"{share:.0%} in {f'more than {known:,}' if count is None else f'{count:,}'}"
            for share, count in zip(_SHARES, self.num_directions, strict=True)
        ]
        rows = [
            ("method", f"{self.method}: {self.why}"),
            ("kernel-target alignment", f"{self.alignment:.4f}, centred {self.centred_alignment:.4f}"),
            ("power of targets", ", ".join(f"{self.cumulative_power[i - 1]:.1%} in the first {i:,}" for i in shown)),
            ("directions", f"{', '.join(said)} of {self.num_rows:,}"),
        ]
        if self.cumulative_power_error.any():
            rows.append(("error of the power", f"{float(self.cumulative_power_error.max()):.1g} at most"))
        return rows


@recorded()
def alignment(
    kernel: Any,
    targets: ArrayLike,
    *,
    eigenpairs: Eigenpairs | None = None,
    method: AnalysisMethod = "auto",
    task: Task = "auto",
    k: int = 100,
    tol: float = 1e-8,
    memory_limit: MemoryLimit = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    monitor: Monitor = ignore,
) -> Alignment:
    """Task-model alignment, kernel-target alignment and centred kernel alignment of a kernel with its targets.

    Cumulative power (Canatar, Bordelon, Pehlevan 2021, there C(ρ)): with eigenpairs (λ_i, u_i) of K, descending,
    ``C(k) = Σ_{i≤k} |u_iᵀ Y|² / |Y|²``: how much of the targets, all columns together, lies in the first k directions.
    They define it by eigenfunctions of the population; here it is that of the sample, and nothing is centred. Where C
    rises fast, few samples suffice.

    Kernel-target alignment (Cristianini, Shawe-Taylor, Elisseeff, Kandola 2001, Definition 1), with YYᵀ as the ideal
    kernel: ``A = <K, YYᵀ> / (|K|_F |YYᵀ|_F) = tr(Yᵀ K Y) / (|K|_F |YᵀY|_F)``. Centred alignment (Cortes, Mohri,
    Rostamizadeh 2012, JMLR 13): the same of H K H and H Y, with H = I - 11ᵀ/n.

    For a full NTK, rows are pairs of sample and output, and y is one column of N·O rows: the ideal kernel is y yᵀ, and
    H takes the mean over samples off each output by itself, ``H = (I - 11ᵀ/N) ⊗ I``. That is another number than the
    alignment of the mean over outputs (kind ``trace``) with YYᵀ.

    Cost: one pass with ``c + 1`` columns (c + O for a full NTK) and one for the Frobenius norm, which is both
    alignments exactly; then all eigenpairs, or 13 to 20 passes for the leading k. Memory: that of :func:`ntkpipe.eigh`,
    or ``11 k n`` float64.

    Parameters
    ----------
    eigenpairs
        Eigenpairs of K that are known. All n of them make it exact; fewer are used as they are where it is streamed.
    method
        How directions are found: ``exact`` with all eigenpairs, ``streamed`` with the leading k, ``auto``: with all
        where they are given, or take fewer operations and fit the memory.
    k
        Number of directions where it is streamed.
    tol
        Relative residual of these directions.

    Raises
    ------
    ResourceError, TileError
        If ``exact`` was asked for and does not fit; if a tile of a stored kernel is missing or damaged.
    """
    operator: Operator = kernel
    budget = Budget.of(memory_limit)
    n = operator.num_rows
    train = train_targets(operator, targets, None, task)
    check_number("k", k, low=1)
    plain, centred = alignments(operator, train.rhs, train.width)
    how = method
    if method == "auto" and eigenpairs is None and not are_all_cheaper(operator, min(k + 1, n)):
        how = "streamed"
    system, why = all_eigenpairs(operator, eigenpairs, budget, how, monitor)
    if how != method:
        why = f"leading pairs take fewer operations than all {n:,}"
    status: Status = "converged"
    message = "all directions"
    work = Work()
    if system is None:
        # One more than asked for: its eigenvalue is the gap behind the last.
        count = min(k + 1, n)
        before, room = operator.work, budget.at_least(bytes_of_eigsh(n, count))
        options: dict[str, Any] = {"tol": tol, "seed": seed, "checkpoint": checkpoint, "monitor": monitor}
        found = eigsh(operator, count, memory_limit=room, **options)
        work = found.work - (operator.work - before)  # of an earlier process
        system, status, message = found, found.status, found.message
    powers = (system.vectors.T @ train.rhs) ** 2
    cumulative = np.cumsum(powers.sum(axis=1)) / max(float((train.rhs**2).sum()), np.finfo(np.float64).tiny)
    most = k if eigenpairs is None and not system.is_whole else None
    errors = np.zeros(len(cumulative)) if system.is_whole else _errors(operator, system)
    counts = (np.searchsorted(cumulative[:most], _SHARES) + 1).tolist()
    half, most_of_it, nearly_all = (count if count <= len(cumulative[:most]) else None for count in counts)
    return Alignment(
        status=status,
        message=message,
        work=work,
        method="exact" if system.is_whole else "streamed",
        why=why,
        num_rows=n,
        num_outputs=train.rhs.shape[1],
        eigenvalues=np.array(system.eigenvalues[:most]),
        powers=powers[:most],
        cumulative_power=cumulative[:most],
        cumulative_power_error=errors[:most],
        num_directions=(half, most_of_it, nearly_all),
        alignment=plain,
        centred_alignment=centred,
        **train.targets.fields,
    )


def alignments(operator: Operator, rows: FloatArray, width: int = 1) -> tuple[float, float]:
    """Kernel-target alignment, plain and centred, by one pass and that of the Frobenius norm.

    With Q the orthonormal basis of what centring takes off, ``|H K H|² = |K|² - 2 |K Q|² + |Qᵀ K Q|²`` in Frobenius
    norms: no centred matrix is formed.
    """
    n, columns = rows.shape
    basis = np.tile(np.eye(width), (n // width, 1)) * (width / n) ** 0.5
    product = operator.matmat(np.concatenate([rows, basis], axis=1))
    of_rows, of_basis = product[:, :columns], product[:, columns:]
    norm = operator.frobenius()
    plain = _cosine(float((rows * of_rows).sum()), norm, rows)
    inner = basis.T @ rows
    centred_rows = rows - basis @ inner
    # H K H Y = H K (H Y), and H Y = Y - Q QᵀY.
    of_centred = of_rows - of_basis @ inner
    squared = norm**2 - 2 * float((of_basis**2).sum()) + float(((basis.T @ of_basis) ** 2).sum())
    # Centring leaves nothing but rounding of a constant kernel.
    rest = np.sqrt(squared) if squared > 64 * _EPS * norm**2 else 0.0
    return plain, _cosine(float((centred_rows * of_centred).sum()), float(rest), centred_rows)


def _cosine(inner: float, norm: float, rows: FloatArray) -> float:
    norms = norm * float(np.linalg.norm(rows.T @ rows))
    return inner / norms if norms else 0.0


def _errors(operator: Operator, system: Eigenpairs) -> FloatArray:
    """How far off each C(i) may be: twice the sine of the angle between the spaces of the first i directions.

    It is at most the norm of the residuals over the gap behind the i-th eigenvalue (Davis and Kahan), and unknown for
    the last one, whose gap is not known.
    """
    residuals = operator.matmat(system.vectors) - system.vectors * system.eigenvalues
    norms = np.sqrt(np.cumsum((residuals**2).sum(axis=0)))
    gaps = np.append(system.eigenvalues[:-1] - system.eigenvalues[1:], 0.0)
    with np.errstate(divide="ignore"):
        sines = np.where(gaps > 0, norms / np.where(gaps > 0, gaps, 1.0), np.inf)
    return np.asarray(np.minimum(1.0, 2 * sines))
