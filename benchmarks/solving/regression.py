"""Kernel regression with ten outputs: ntkpipe against conjugate gradients of scipy, sklearn and LAPACK."""

import warnings
from collections.abc import Callable

import numpy as np
import scipy.sparse.linalg
from numpy.typing import NDArray
from sklearn.kernel_ridge import KernelRidge

import ntkpipe
from ntkpipe.base.operator import Operator
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelStore
from solving.measuring import in_turns, median, print_table, ratio, watched

_TOL = 1e-6
# Of the mean of the diagonal.
_RIDGES = (0.0, 1e-6)
_MOST_STEPS = 1000

Solve = Callable[[], NDArray[np.float64]]


def compare(store: KernelStore, repeats: int) -> None:
    """Passes, seconds and true residual of each method, for each ridge."""
    kernel = store.train
    operator, targets = ntkpipe.as_operator(kernel), np.eye(10)[store.targets] - 0.1
    operator @ targets  # from here on tiles are in memory
    for share in _RIDGES:
        ridge = share * operator.trace() / operator.num_rows
        print(f"\nRegression of {len(kernel):,} rows, ten outputs, ridge {share:g} of the mean diagonal", flush=True)
        steps, passes, coefficients = watched(operator, _methods(operator, kernel, targets, ridge))
        seconds = in_turns(steps, repeats)
        rows = []
        for name, found in seconds.items():
            residual = _residual(operator.shifted(ridge), coefficients[name], targets)
            times = f"{median(found):.2f}", f"{ratio(found, seconds['ntkpipe.solve']):.2f}"
            rows.append((name, f"{passes[name]:.0f}" if passes[name] else "dense", *times, f"{residual:.1e}"))
        print_table(("method", "passes", "seconds", "vs ntkpipe.solve", "true residual"), rows)
    operator.close()


def _residual(system: Operator, coefficients: NDArray[np.float64], targets: NDArray[np.float64]) -> float:
    """Largest of the columns that were solved, relative to the targets."""
    targets = targets[:, : coefficients.shape[1]]
    misfits = np.linalg.norm(targets - system @ coefficients, axis=0)
    return float((misfits / np.linalg.norm(targets, axis=0)).max())


def _methods(operator: Operator, kernel: Kernel, targets: NDArray[np.float64], ridge: float) -> dict[str, Solve]:
    """Methods by name; each begins with tiles in memory, the dense ones with the stored kernel in the page cache."""
    quarter = operator.num_rows // 4
    num_rows = operator.num_rows

    def ours(method: str, rank: int | None) -> Solve:
        return lambda: (
            ntkpipe.solve(
                operator, targets, ridge=ridge, method=method, rank=rank, tol=_TOL, max_passes=_MOST_STEPS
            ).coefficients
        )

    def cg() -> NDArray[np.float64]:
        system = operator.shifted(ridge).aslinearoperator()
        return scipy.sparse.linalg.cg(system, targets[:, 0], rtol=_TOL, maxiter=_MOST_STEPS)[0][:, None]

    def sklearn() -> NDArray[np.float64]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an ill-conditioned matrix; the residual is printed
            return KernelRidge(alpha=ridge, kernel="precomputed").fit(dense(), targets).dual_coef_

    def dense() -> NDArray[np.float64]:
        return kernel[:, :].astype(np.float64)

    def lapack() -> NDArray[np.float64]:
        matrix = dense()
        matrix[np.arange(num_rows), np.arange(num_rows)] += ridge
        return np.linalg.solve(matrix, targets)

    return {
        "ntkpipe.solve": ours("auto", None),
        f"the same, block_cg of rank {quarter:,}": ours("block_cg", quarter),
        f"the same, pcg of rank {quarter:,}": ours("pcg", quarter),
        "scipy cg, one output of the ten": cg,
        "sklearn KernelRidge": sklearn,
        "numpy.linalg.solve": lapack,
    }
