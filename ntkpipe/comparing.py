"""Comparing a store with another one: progress is shown, the result is kept below ``results/compare`` of the first."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkpipe.analysis.compare import compare_kernels
from ntkpipe.analysis.comparison import Comparison
from ntkpipe.errors import ConfigError
from ntkpipe.kept import keep
from ntkpipe.kernel import KernelStore, open_kernel
from ntkpipe.operators.operator import Operator
from ntkpipe.ridges import RidgeScale
from ntkpipe.saving import Checkpoint
from ntkpipe.solvers.result import Monitor

if TYPE_CHECKING:
    from distributed import Client


def compare_of_store(
    store: KernelStore,
    *,
    other: str | Path | None = None,
    array: str = "train",
    k: int = 10,
    ridge: float = 0.0,
    ridge_scale: RidgeScale = None,
    smallest_eigenvalue: bool = True,
    seed: int = 0,
    memory_limit: int | None = None,
    client: "Client | None" = None,
    progress: bool = True,
) -> Comparison:
    """Compare the kernel of a store with that of another one, the reference.

    See :func:`ntkpipe.analysis.compare.compare_kernels`.

    Parameters
    ----------
    store
        A; the result goes to its ``results/compare``.
    other
        Path or URL of B's store; needed.
    array
        Which kernel of both, as ``train``, or ``groups/head/train``.
    k, ridge, ridge_scale, smallest_eigenvalue, seed, memory_limit, client
        Of the comparison.
    progress
        Show passes on standard error.

    Raises
    ------
    ConfigError
        If there is no ``other``, the kernels are not of the same samples, or an option is wrong.
    Interrupted
        On Ctrl-C.
    TileError
        If a tile is missing or damaged.
    """
    if other is None:
        raise ConfigError("compare needs other: the path of the store to compare with, which is the reference")
    reference = open_kernel(other)
    options: dict[str, Any] = {
        "k": k,
        "ridge": ridge,
        "ridge_scale": ridge_scale,
        "smallest_eigenvalue": smallest_eigenvalue,
        "seed": seed,
    }

    def find(operator: Operator, monitor: Monitor, checkpoint: Checkpoint) -> Comparison:
        del operator, checkpoint  # both kernels are opened one after the other, and passes are few
        return compare_kernels(
            store, reference, array=array, memory_limit=memory_limit, client=client, monitor=monitor, **options
        )

    asked = {**options, "other": reference.manifest.digest()}
    return keep(store, "compare", array, asked, find, None, None, progress)
