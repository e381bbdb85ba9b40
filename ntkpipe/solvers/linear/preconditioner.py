"""Preconditioners of K + λI: a low-rank approximation of K plus a multiple of the identity."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.base.blas import single_threaded_blas
from ntkpipe.base.config import check_number, checked_ridge
from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.base.operator import Operator, Work
from ntkpipe.operators.opening import as_operator
from ntkpipe.solvers.checkpoint import Stages, as_work
from ntkpipe.solvers.probe_lanczos import lowest_eigenvalue
from ntkpipe.store.results import as_number

_MOST_RANK = 1000
_LEAST_COLUMNS_PER_RANK = 10
_CANDIDATES = 2  # for each pivot of a round; they cost memory, not passes
_NOISE = 4.0  # a residual diagonal below this multiple of the rounding of an entry is noise
_ROWS_AT_ONCE = 16384
_MOST_SHIFTS = 20


PreconditionerMethod = Literal["rpcholesky", "nystrom"]


@dataclass(frozen=True, kw_only=True)
class Preconditioner:
    """``P = F F' + μ I`` by the eigenvectors of F F', so that any power of it is two thin products."""

    vectors: FloatArray  # orthonormal, shape (n, rank), float64: its only large array
    values: FloatArray  # eigenvalues of F F', shape (rank,), descending
    tail: float  # mean of the diagonal of K - F F', but not less than the storage floor of K
    method: PreconditionerMethod  # how F was made
    shift: float  # what was added to K to make a Nyström approximation stable and was subtracted again; 0 otherwise
    work: Work  # cost of making it
    seconds: float
    ridge: float = 0.0  # λ

    @property
    def num_rows(self) -> int:
        """n."""
        return len(self.vectors)

    @property
    def rank(self) -> int:
        """Columns of F; fewer than asked for where K has no more that is not rounding."""
        return len(self.values)

    @property
    def mu(self) -> float:
        """``μ = ridge + tail``: so a ridge of zero is well-posed, and small ones gain, too."""
        return self.ridge + self.tail or 1.0

    def for_ridge(self, ridge: float) -> "Preconditioner":
        """Return it for another ridge, without a pass; the memory is shared."""
        return replace(self, ridge=checked_ridge(ridge))

    def solve(self, block: FloatArray) -> FloatArray:
        """``P^-1 @ block``, shape of the block: (n, c) or (n,)."""
        return self._scale(block, 1.0 / (self.values + self.mu), 1.0 / self.mu)

    def inverse_sqrt(self, block: FloatArray) -> FloatArray:
        """``P^-1/2 @ block``, of the symmetric root."""
        return self._scale(block, 1.0 / np.sqrt(self.values + self.mu), self.mu**-0.5)

    def logdet(self) -> float:
        """``log det P``."""
        of_factor = float(np.log(self.values + self.mu).sum())
        return of_factor + (self.num_rows - self.rank) * float(np.log(self.mu))

    def _scale(self, block: FloatArray, of_vectors: FloatArray, rest: float) -> FloatArray:
        """Multiply parts along the vectors by numbers, and the rest by one number."""
        parts = ((self.vectors.T @ block).T * (of_vectors - rest)).T
        scaled: FloatArray = self.vectors @ parts
        scaled += rest * block
        return scaled


def default_rank(num_rows: int) -> int:
    """``min(1000, n/10)``, at least one."""
    return max(1, min(_MOST_RANK, num_rows // _LEAST_COLUMNS_PER_RANK))


# Eigenvectors and eigenvalues of F F', the tail, and the shift.
_Parts = tuple[FloatArray, FloatArray, float, float]


@single_threaded_blas()
def _made(
    method: PreconditionerMethod, matrix: Any, rank: int | None, parts: Callable[[Operator, int], _Parts]
) -> Preconditioner:
    start, operator = perf_counter(), as_operator(matrix)
    operator.require_range()
    before = operator.work
    vectors, values, tail, shift = parts(operator, checked_rank(rank, operator.num_rows))
    found: dict[str, Any] = {"vectors": vectors, "values": values, "tail": tail, "shift": shift, "method": method}
    return Preconditioner(**found, work=operator.work - before, seconds=perf_counter() - start)


def randomly_pivoted_cholesky(
    matrix: Any, rank: int | None = None, *, rounds: int = 5, seed: int = 0
) -> Preconditioner:
    """A preconditioner from columns of K, chosen at random in proportion to what is not yet approximated.

    Randomly pivoted Cholesky (Chen, Epperly, Tropp, Webber, arXiv 2207.06503) in few rounds: each reads its columns
    together, at most one pass. Pivots are chosen among twice as many candidates, drawn in proportion to the residual
    diagonal at the beginning of a round, one after the other with the odds (residual now) / (residual then): the
    rejection sampling of Epperly, Tropp, Webber (arXiv 2410.03969), but rejected candidates are offered again.

    Memory is three blocks of shape (n, rank) in float64 while it is made, one later. 4 n rank² multiplications.
    """
    check_number("rounds", rounds, low=1)
    return _made("rpcholesky", matrix, rank, partial(_by_columns, rounds=rounds, rng=np.random.default_rng(seed)))


def _by_columns(operator: Operator, rank: int, *, rounds: int, rng: np.random.Generator) -> _Parts:
    n, diagonal, storage_floor = operator.num_rows, operator.diagonal(), operator.storage_floor()
    if not np.isfinite(diagonal).all():
        raise NonFiniteError("the diagonal of the matrix holds NaN or infinity")
    residual = np.maximum(diagonal, 0.0)
    eps = float(np.finfo(operator.storage_dtype).eps) + 16 * float(np.finfo(np.float64).eps)
    noise = _NOISE * eps * residual
    factor, done = np.empty((n, rank)), 0
    for number in range(rounds):
        wanted = -(-(rank - done) // (rounds - number))
        odds = np.where(residual > noise, residual, 0.0)
        num_candidates = min(_CANDIDATES * wanted, int(np.count_nonzero(odds)))
        if not wanted or not num_candidates:
            break
        candidates = rng.choice(n, num_candidates, replace=False, p=odds / odds.sum())
        columns = operator.columns(candidates)
        columns -= factor[:, :done] @ factor[candidates, :done].T
        pivots, lower = _pivots_among(columns[candidates], odds[candidates], noise[candidates], wanted, rng)
        if not len(pivots):
            break
        found = factor[:, done : done + len(pivots)]
        for rows in runs(n, _ROWS_AT_ONCE):
            found[rows] = _solve_rows(lower, columns[rows, pivots])
        del columns
        residual -= np.einsum("ij,ij->i", found, found)
        np.maximum(residual, 0.0, out=residual)
        residual[candidates[pivots]] = 0.0
        done += len(pivots)
    if not np.isfinite(residual).all():
        raise NonFiniteError("columns of the matrix hold NaN or infinity")
    vectors, values = _left_singular(factor[:, :done])
    return vectors, values, max(float(residual.mean()), storage_floor), 0.0


def _pivots_among(
    block: FloatArray, odds: FloatArray, noise: FloatArray, wanted: int, rng: np.random.Generator
) -> tuple[list[int], FloatArray]:
    """Choose pivots among candidates; return them and the Cholesky factor of their block."""
    left = block.diagonal().copy()
    columns = np.empty((len(block), wanted))
    chosen: list[int] = []
    for number in range(wanted):
        ratio = np.where(left > noise, left / odds, 0.0)
        total = float(ratio.sum())
        if not total > 0.0:
            break
        pivot = int(rng.choice(len(block), p=ratio / total))
        column = block[:, pivot] - columns[:, :number] @ columns[pivot, :number]
        column /= left[pivot] ** 0.5
        column[pivot] = left[pivot] ** 0.5
        columns[:, number] = column
        left -= column**2
        left[pivot] = 0.0
        chosen.append(pivot)
    return chosen, np.tril(columns[chosen, : len(chosen)])


def nystrom(matrix: Any, rank: int | None = None, *, seed: int = 0) -> Preconditioner:
    """A preconditioner from one product of K with random vectors.

    The randomised Nyström approximation of Frangella, Tropp, Udell (arXiv 2110.02820, algorithm 2.1): one pass of
    ``rank`` columns, all in float64. We depart from it in two points: outside of the span P is the mean of what the
    approximation leaves of the diagonal, where they take its last eigenvalue; and where K is not positive
    semi-definite to rounding, so that the factorisation fails, the shift that stabilises it is made larger, ten times
    at a time; ``shift`` says what it was.

    One pass, and one for the diagonal where that is not known. Memory is four blocks of shape (n, rank) in float64.
    """
    return _made("nystrom", matrix, rank, partial(_by_product, rng=np.random.default_rng(seed)))


def _by_product(operator: Operator, rank: int, *, rng: np.random.Generator) -> _Parts:
    trace, storage_floor = operator.trace(), operator.storage_floor()
    test = np.linalg.qr(rng.standard_normal((operator.num_rows, rank)))[0]
    product = operator.matmat(test)
    if not np.isfinite(product).all():
        raise NonFiniteError("the matrix holds NaN or infinity")
    found = _shifted_factor(test, product)
    if found is None:
        lowest = lowest_eigenvalue(operator)
        raise ConfigError(
            f"the matrix is far from positive semi-definite, and has no Nyström approximation: {lowest.words}. Give "
            f"preconditioner='rpcholesky', and an absolute ridge of at least {lowest.ridge():.2g}"
        )
    factor, shift = found
    vectors, values = _left_singular(factor)
    values = values - shift
    kept = values > max(_NOISE**2 * shift, storage_floor)
    tail = (trace - float(values[kept].sum())) / operator.num_rows
    return np.ascontiguousarray(vectors[:, kept]), values[kept], max(tail, storage_floor), shift


def _shifted_factor(test: FloatArray, product: FloatArray) -> tuple[FloatArray, float] | None:
    """Return F, with F F' the Nyström approximation of K + shift I, and the shift; none if no small one will do."""
    size = float(np.linalg.norm(product))
    if size == 0.0:
        return np.zeros_like(product), 0.0
    shift = float(np.spacing(size))
    for _ in range(_MOST_SHIFTS):
        core = test.T @ product
        core = (core + core.T) / 2
        core[np.diag_indices_from(core)] += shift
        try:
            lower = np.linalg.cholesky(core)
        except np.linalg.LinAlgError:
            shift *= 10.0
            if shift > size:
                break
            continue
        factor = np.empty_like(product)
        for rows in runs(len(product), _ROWS_AT_ONCE):
            factor[rows] = _solve_rows(lower, product[rows] + shift * test[rows])
        return factor, shift
    return None


def _left_singular(factor: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Eigenvectors and descending eigenvalues of F F', more accurate than from F' F."""
    if not factor.shape[1]:
        return np.zeros(factor.shape), np.zeros(0)
    vectors, upper = np.linalg.qr(factor)
    rotation, sizes, _ = np.linalg.svd(upper)
    for rows in runs(len(vectors), _ROWS_AT_ONCE):
        vectors[rows] = vectors[rows] @ rotation
    return vectors, sizes**2


def _solve_rows(lower: NDArray[Any], rows: FloatArray) -> FloatArray:
    """Return ``rows @ lower^-T``."""
    return np.asarray(solve_triangular(lower, rows.T, lower=True, check_finite=False).T)


def checked_rank(rank: int | None, num_rows: int) -> int:
    """The rank that is asked for, as far as there are rows, or the default."""
    return default_rank(num_rows) if rank is None else min(int(check_number("rank", rank, low=1)), num_rows)


def preconditioner_of(operator: Operator, method: str, rank: int | None, seed: int) -> Preconditioner:
    """Make the preconditioner of this name."""
    return (randomly_pivoted_cholesky if method == "rpcholesky" else nystrom)(operator, rank, seed=seed)


def saved_of(made: Preconditioner) -> dict[str, Any]:
    """What is saved of a preconditioner: its numbers, and two arrays."""
    names = ("rank", "tail", "shift", "method", "work", "seconds", "vectors", "values")
    return {name: getattr(made, name) for name in names}


def preconditioner_from(saved: Mapping[str, Any]) -> Preconditioner:
    """Restore a preconditioner from its numbers and arrays, which anybody may have written."""
    vectors, values, work, method = (saved[name] for name in ("vectors", "values", "work", "method"))
    numbers = {name: as_number(saved[name]) for name in ("tail", "shift", "seconds")}
    is_finite = bool(np.isfinite(vectors).all() and np.isfinite(values).all())
    if method not in get_args(PreconditionerMethod) or numbers["tail"] < 0.0 or not is_finite or (values < 0.0).any():
        raise ValueError("its preconditioner is not positive definite")
    work = work if isinstance(work, Work) else as_work(work)
    return Preconditioner(vectors=vectors, values=values, method=method, work=work, **numbers)


def preconditioner_once(stages: Stages, num_rows: int, make: Callable[[], Preconditioner]) -> Preconditioner:
    """Make a preconditioner as a stage of a calculation, which is saved."""
    found = stages.once("preconditioner", lambda: saved_of(make()))
    with stages.journal.reading():
        if found["vectors"].shape != (num_rows, len(found["values"])):
            raise ValueError(f"its preconditioner has shape {found['vectors'].shape}")
        return preconditioner_from(found)
