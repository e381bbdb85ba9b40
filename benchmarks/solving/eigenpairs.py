"""Leading eigenpairs to one tolerance: ntkpipe against ARPACK, LOBPCG and Dask's randomised SVD."""

import warnings
from collections.abc import Callable

import dask.array as da
import numpy as np
import scipy.sparse.linalg
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

import ntkpipe
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import num_cores
from ntkpipe.store.kernel_store import KernelStore
from solving.measuring import in_turns, median, print_table, ratio, watched

_TOL = 1e-6
# Powers of Dask's SVD that are tried, in this order.
_POWERS = (2, 4, 8, 16)
_CHUNK = 1024

Pairs = tuple[NDArray[np.float64], NDArray[np.float64]]


def compare(store: KernelStore, repeats: int, counts: tuple[int, ...] = (20, 100)) -> None:
    """Passes, seconds and largest residual of each method, for each number of pairs."""
    operator = ntkpipe.as_operator(store.train)
    chunks = da.from_array(store.train[:, :].astype(np.float64), chunks=_CHUNK)
    operator @ np.ones((operator.num_rows, 1))  # from here on tiles are in memory
    for k in counts:
        print(f"\n{k} leading eigenpairs of {operator.num_rows:,} rows to {_TOL:g} of each", flush=True)
        own = ntkpipe.eigsh(operator, k, tol=_TOL)
        runs: dict[str, Callable[[], Pairs]] = {
            "ntkpipe.eigsh": lambda k=k: _ours(operator, k),
            "scipy eigsh": lambda k=k: _arpack(operator, k),
            "scipy lobpcg": lambda k=k, least=own.eigenvalues[-1]: _lobpcg(operator, k, least),
        }
        power = next((p for p in _POWERS[:-1] if _largest_residual(operator, _dask(chunks, k, p)) <= _TOL), _POWERS[-1])
        runs[f"dask svd_compressed, n_power_iter={power}"] = lambda k=k, power=power: _dask(chunks, k, power)
        steps, passes, pairs = watched(operator, runs)
        seconds = in_turns(steps, repeats)
        rows = []
        for name, found in seconds.items():
            number = passes[name] or 2 + 2 * power  # of Dask, which has its own products
            times = f"{median(found):.2f}", f"{ratio(found, seconds['ntkpipe.eigsh']):.2f}"
            rows.append((name, f"{number:.0f}", *times, f"{_largest_residual(operator, pairs[name]):.1e}"))
        print_table(("method", "passes", "seconds", "vs ntkpipe", "largest residual"), rows)
    operator.close()


def _largest_residual(operator: Operator, pairs: Pairs) -> float:
    """|K v - λ v| / |λ| at most, with vectors of length one."""
    values, vectors = pairs
    vectors = vectors / np.linalg.norm(vectors, axis=0)
    return float((np.linalg.norm(operator @ vectors - vectors * values, axis=0) / np.abs(values)).max())


def _ours(operator: Operator, k: int) -> Pairs:
    found = ntkpipe.eigsh(operator, k, tol=_TOL)
    return found.eigenvalues, found.eigenvectors


def _arpack(operator: Operator, k: int) -> Pairs:
    start = np.random.default_rng(0).standard_normal(operator.num_rows)
    return scipy.sparse.linalg.eigsh(operator.aslinearoperator(), k, which="LA", tol=_TOL, v0=start)


def _lobpcg(operator: Operator, k: int, least: float) -> Pairs:
    """Its tolerance is absolute and the same for all pairs: that of the smallest, which others had to find."""
    start = np.random.default_rng(0).standard_normal((operator.num_rows, k))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where it stops short; the residual is printed
        return scipy.sparse.linalg.lobpcg(operator.aslinearoperator(), start, tol=_TOL * least, maxiter=300)


def _dask(chunks: da.Array, k: int, power: int) -> Pairs:
    """From float64 entries in memory; ``QR`` since plain powers lose all but the first pairs."""
    with threadpool_limits(1):  # as Dask advises, whose threads are the cores already
        left, values, _ = da.linalg.svd_compressed(chunks, k, iterator="QR", n_power_iter=power, seed=0)
        vectors, values = da.compute(left, values, num_workers=num_cores())
    return values, vectors
