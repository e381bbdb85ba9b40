"""Comparing a store with another one: progress is shown, the result is kept below ``results/compare`` of the first."""

from ntkpipe.analysis.compare import compare_kernels
from ntkpipe.analysis.comparison import Comparison
from ntkpipe.errors import ConfigError
from ntkpipe.kept import Question, of_store
from ntkpipe.kernel import open_kernel
from ntkpipe.ridges import RidgeScale


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
    """Compare a stored kernel with that of the same name in another store, the reference.

    Parameters
    ----------
    question
        A; both kernels are opened one after the other.
    other
        Path or URL of the store of B; needed.
    k, ridge, ridge_scale, smallest_eigenvalue, seed
        Of :func:`ntkpipe.analysis.compare.compare_kernels`.

    Raises
    ------
    ConfigError
        If there is no ``other``, the kernels are not of the same samples, or an option is wrong.
    """
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
