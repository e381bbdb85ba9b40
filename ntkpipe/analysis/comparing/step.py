"""Comparing a store with another one: progress is shown, the result is kept below ``results/compare`` of the first."""

from ntkpipe.analysis.comparing.compare import compare_kernels
from ntkpipe.analysis.comparing.result import Comparison
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.ridge import RidgeScale
from ntkpipe.solvers.on_store import Question, of_store
from ntkpipe.store.kernel_store import open_kernel


@of_store("compare")
def compare_of_store(
    question: Question,
    *,
    other: str | None = None,
    k: int = 10,
    ridge: float = 0.0,
    ridge_scale: RidgeScale = None,
    smallest_eigenvalue: bool = True,
    seed: int = 0,
) -> Comparison:
    """Compare a stored kernel with that of the same name in another store, the reference."""
    if other is None:
        raise ConfigError("compare needs other: the path of the store to compare with, which is the reference")
    return compare_kernels(
        question.store,
        open_kernel(other),
        array=question.kernel.name,
        k=k,
        ridge=ridge,
        ridge_scale=ridge_scale,
        smallest_eigenvalue=smallest_eigenvalue,
        seed=seed,
        memory_limit=question.memory_limit,
        client=question.client,
        monitor=question.monitor,
    )
