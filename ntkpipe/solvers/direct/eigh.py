"""The whole spectrum in memory by LAPACK in float64, checked against the matrix."""

import json
from typing import Any

import numpy as np

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.base.config import Budget, MemoryLimit
from ntkpipe.base.errors import NonFiniteError, SelfCheckError
from ntkpipe.base.operator import Operator
from ntkpipe.base.paths import said
from ntkpipe.base.resources import format_bytes
from ntkpipe.solvers.eigenpairs import Eigenpairs
from ntkpipe.solvers.memory import bytes_of_density, bytes_of_eigsh
from ntkpipe.solvers.result import Monitor, Step, ignore, recorded

MOST_ROWS_OF_32_BITS = 32766  # for more the workspace of LAPACK's eigh, 1 + 6 n + 2 n², exceeds 32-bit integers
_EPS = float(np.finfo(np.float64).eps)
_ROWS_AT_ONCE = 1024
_NUM_PROBES = 4


@recorded(keep_tiles=False)
def eigvalsh(matrix: Any, *, memory_limit: MemoryLimit = None, monitor: Monitor = ignore) -> Eigenpairs:
    """All eigenvalues of a symmetric matrix that fits into memory.

    Reads one triangle of K into one float64 array, in one pass, and takes about 4/3 n³ flops. NumPy's LAPACK driver
    ``syevd`` copies the array; where a copy does not fit, SciPy's ``syevr`` works in place. Memory is ``16 n²`` bytes,
    or ``8 n²`` in place, and two panels of 1,024 rows.

    Raises
    ------
    SelfCheckError
        If LAPACK failed, or trace and Frobenius norm of the result are not those of K.
    """
    return _decompose(matrix, Budget.of(memory_limit), monitor, with_vectors=False)


@recorded(keep_tiles=False)
def eigh(matrix: Any, *, memory_limit: MemoryLimit = None, monitor: Monitor = ignore) -> Eigenpairs:
    """All eigenvalues and eigenvectors of a symmetric matrix that fits into memory.

    Like :func:`eigvalsh`, with one more pass to check the vectors on random combinations of them. Memory is ``40 n²``
    bytes with ``syevd``, or ``16 n²`` in place; about 9 n³ flops at most.

    Raises
    ------
    SelfCheckError
        If LAPACK failed, or the result does not fit K.
    """
    return _decompose(matrix, Budget.of(memory_limit), monitor, with_vectors=True)


def _decompose(operator: Operator, budget: Budget, monitor: Monitor, *, with_vectors: bool) -> Eigenpairs:
    before = operator.work
    driver = _driver(operator.num_rows, budget, with_vectors=with_vectors)
    upper, trace, frobenius = _read(operator)
    monitor(Step(operator.work - before, None, 0.0))
    try:
        ascending, columns = _by_lapack(driver, upper, with_vectors)
    except np.linalg.LinAlgError as error:
        raise SelfCheckError(f"LAPACK ({driver}) failed on {operator.num_rows} rows: {said(error)}") from error
    del upper
    values = ascending[::-1].copy()
    trace_error, frobenius_error = _check_identities(values, trace, frobenius, driver)
    vectors = None if columns is None else columns[:, ::-1]
    residual = orthogonality = None
    if vectors is not None:
        residual, orthogonality = _check_vectors(operator, values, vectors, frobenius)
        monitor(Step(operator.work - before, residual, _bound(operator.num_rows)))
    return Eigenpairs(
        status="converged",
        message=f"LAPACK ({driver}) in float64; trace and Frobenius norm are those of the matrix",
        options={"driver": driver, "eigenvectors": with_vectors},
        eigenvalues=values,
        eigenvectors=vectors,
        trace_error=trace_error,
        frobenius_error=frobenius_error,
        residual=residual,
        orthogonality=orthogonality,
        floor=float(np.finfo(operator.storage_dtype).eps) * frobenius / operator.num_rows**0.5,
    )


def bytes_of_drivers(num_rows: int, *, with_vectors: bool) -> dict[str, int]:
    """Memory of each driver that can be used, the fastest first."""
    # Number of n × n arrays: K, its copy or the vectors, and workspace.
    matrices = {"syevd": 5 if with_vectors else 2, "syevr in place": 2 if with_vectors else 1}
    if num_rows > MOST_ROWS_OF_32_BITS and not has_64_bit_integers():
        del matrices["syevd"]
    panels = 2 * 8 * min(_ROWS_AT_ONCE, num_rows) * num_rows
    return {driver: 8 * count * num_rows**2 + panels + 8 * 64 * num_rows for driver, count in matrices.items()}


def _driver(num_rows: int, budget: Budget, *, with_vectors: bool) -> str:
    needs = bytes_of_drivers(num_rows, with_vectors=with_vectors)
    for driver, need in needs.items():
        if budget.fits(need, share=1.0):
            return driver
    pairs, probes = format_bytes(bytes_of_eigsh(num_rows)), format_bytes(bytes_of_density(num_rows))
    advice = (
        f"what fits: eigsh(matrix, 100), leading eigenpairs, about 14 passes and {pairs}; density(matrix), how many "
        f"eigenvalues lie where, up to 100 passes and {probes}; fewer eigenpairs, probes or steps take less"
    )
    budget.require(min(needs.values()), f"the whole spectrum of {num_rows} rows", advice)
    raise AssertionError


def has_64_bit_integers() -> bool:
    """Whether numpy's LAPACK has 64-bit integers, according to its build configuration; the wheels on PyPI have."""
    build = np.show_config(mode="dicts")
    about = json.dumps(build.get("Build Dependencies", {}).get("lapack", {}) if build else {}).lower()
    return "use64bitint" in about or "ilp64" in about


def _read(operator: Operator) -> tuple[FloatArray, float, float]:
    """Upper triangle, in an array whose rest stays zero and so takes no memory; trace and Frobenius norm."""
    num_rows = operator.num_rows
    upper = np.zeros((num_rows, num_rows))
    trace, squared = 0.0, 0.0
    for rows in runs(num_rows, _ROWS_AT_ONCE):
        panel = operator.block(rows, slice(rows.start, num_rows))
        upper[rows, rows.start :] = panel
        square, rest = np.split(panel, [len(panel)], axis=1)
        trace += float(square.trace())
        squared += float(np.einsum("ij,ij->", square, square)) + 2 * float(np.einsum("ij,ij->", rest, rest))
    if not np.isfinite(squared):
        raise NonFiniteError("the matrix holds NaN or infinity")
    return upper, trace, squared**0.5


def _by_lapack(driver: str, upper: FloatArray, with_vectors: bool) -> tuple[FloatArray, FloatArray | None]:
    if driver == "syevd" and with_vectors:
        return np.linalg.eigh(upper, UPLO="U")
    if driver == "syevd":
        return np.asarray(np.linalg.eigvalsh(upper, UPLO="U"), np.float64), None
    from scipy.linalg import eigh as decompose

    # In place: numpy's LAPACK calls copy, scipy's do not if columns are contiguous, as those of the transpose are.
    options = {"lower": True, "driver": "evr", "overwrite_a": True, "check_finite": False}
    found = decompose(upper.T, eigvals_only=not with_vectors, **options)
    return found if with_vectors else (found, None)


def _bound(num_rows: int) -> float:
    """Largest effect of LAPACK's rounding, relative to the Frobenius norm of K: a modest multiple of ``n eps``."""
    return 10 * num_rows * _EPS


def _check_identities(values: FloatArray, trace: float, frobenius: float, driver: str) -> tuple[float, float]:
    """Relative errors of Σλ = tr K and Σλ² = |K|_F².

    The computed eigenvalues are the exact ones of K + E with |E|_F ≤ c n eps |K|_F and a modest c. So the trace is
    wrong by at most sqrt(n) |E|_F, and the sum of squares by 2 |K|_F |E|_F.
    """
    if not np.isfinite(values).all():
        raise NonFiniteError(f"LAPACK ({driver}) returned NaN or infinity for {len(values)} finite rows")
    if frobenius == 0.0:
        return float(np.abs(values).max()), float(np.abs(values).max())
    scaled = values / frobenius
    trace_error = abs(float(scaled.sum()) - trace / frobenius)
    frobenius_error = abs(float(scaled @ scaled) - 1.0)
    bound = _bound(len(values))
    if not (trace_error <= len(values) ** 0.5 * bound and frobenius_error <= 2 * bound):
        raise SelfCheckError(
            f"LAPACK ({driver}) returned eigenvalues whose sum and sum of squares differ from trace and squared "
            f"Frobenius norm by {trace_error:.2g} and {frobenius_error:.2g}, relative to the norm; rounding is "
            f"{2 * bound:.2g} at most. The build of LAPACK is broken for {len(values)} rows: use another numpy"
        )
    return trace_error, frobenius_error


def _check_vectors(
    operator: Operator, values: FloatArray, vectors: FloatArray, frobenius: float
) -> tuple[float, float]:
    """Residual and orthogonality on random vectors, one pass."""
    num_rows = len(values)
    probes = np.random.default_rng(0).standard_normal((num_rows, _NUM_PROBES))
    inside = vectors.T @ probes
    size = float(np.linalg.norm(probes))
    orthogonality = float(np.linalg.norm(vectors @ inside - probes)) / size
    product = operator.matmat(probes)
    product -= vectors @ (values[:, None] * inside)
    scale = frobenius * size / num_rows**0.5
    residual = float(np.linalg.norm(product)) / scale if scale else float(np.linalg.norm(product))
    if not max(residual, orthogonality) <= _bound(num_rows):
        raise SelfCheckError(
            f"LAPACK returned eigenvectors of residual {residual:.2g} and orthogonality {orthogonality:.2g} for "
            f"{num_rows} rows; rounding is {_bound(num_rows):.2g} at most. Use another build of numpy or scipy"
        )
    return residual, orthogonality
