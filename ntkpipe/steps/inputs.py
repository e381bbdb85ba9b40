"""What a store gives to parameters of solvers and analyses, by their names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.budget import Budget
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator
from ntkpipe.base.ridge import RidgeScale
from ntkpipe.base.targets import Task
from ntkpipe.learning.regression.estimator import FitMethod, KernelRegression
from ntkpipe.operators.opening import as_operator
from ntkpipe.solvers.eigenpairs import Eigenpairs
from ntkpipe.solvers.inverse.choice import AnalysisMethod, all_eigenpairs
from ntkpipe.solvers.result import Monitor, Result
from ntkpipe.steps.saved import saved_result
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.results import Checkpoint

if TYPE_CHECKING:
    from distributed import Client

Centre = Literal["initial_outputs"] | None
# All eigenpairs stay for the next step on the same open store if they take at most this share of the memory left.
_SHARE = 0.125
_EIGENPAIRS: WeakKeyDictionary[KernelStore, tuple[str, Eigenpairs]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Context:
    """A stored kernel to work on, and what the work may use."""

    store: KernelStore
    kernel: Kernel
    budget: Budget  # of this process, for tiles and what is computed; with a client of each worker
    client: "Client | None"  # of the cluster whose workers multiply, if any
    monitor: Monitor  # shows progress
    checkpoint: Checkpoint | None  # none where the store cannot be written

    @cached_property
    def operator(self) -> Operator:
        """Products with the kernel, whose tiles have half of the memory."""
        return as_operator(self.kernel, memory_limit=self.share, client=self.client)

    @cached_property
    def share(self) -> Budget:
        """The half of the memory that is for what is computed."""
        return self.budget.half()

    def close(self) -> None:
        """Release the tiles that are in memory, if any were read."""
        if "operator" in self.__dict__:
            self.operator.close()

    def array(self, name: str) -> Any:
        """An array that belongs to the same outputs and parameters as the kernel, such as ``test_train``; or None."""
        return self.store.store.arrays.get(self.kernel.name.removesuffix("train") + name)


def _targets(context: Context) -> NDArray[Any] | None:
    return context.store.targets


def _test_targets(context: Context) -> NDArray[Any] | None:
    return context.store.test_targets


def _test_kernel(context: Context) -> Kernel | None:
    array = context.array("test_train")
    return None if array is None else Kernel(array, context.store.manifest.digest())


def _test_diagonal(context: Context) -> NDArray[np.float64] | None:
    array = context.array("test_diagonal")
    return None if array is None else array.read_samples(0, array.layout.shape[0]).astype(np.float64)


def _initial_outputs(context: Context, *, centre: Centre = None) -> NDArray[Any] | None:
    """Outputs of the train samples at initialisation.

    Parameters
    ----------
    centre
        Whether targets are centred at the stored outputs: initial_outputs, or none.
    """
    return None if centre is None else context.store.outputs


def _test_initial_outputs(context: Context, *, centre: Centre = None) -> NDArray[Any] | None:
    is_tested = centre is not None and context.store.manifest.test is not None
    return context.store.test_outputs if is_tested else None


def _eigenpairs(context: Context, *, method: AnalysisMethod = "auto") -> Eigenpairs | None:
    """All of them; None if they do not fit or streaming was asked for. The next step on the same store finds them."""
    if method not in ("auto", "exact"):
        return None
    if (known := _known_eigenpairs(context)) is not None:
        return known
    found, _ = all_eigenpairs(context.operator, None, context.share, "auto", context.monitor)
    if found is not None and context.share.fits(found.vectors.nbytes / _SHARE, share=1.0):
        _EIGENPAIRS[context.store] = context.kernel.identity, found
    return found


def _known_eigenpairs(context: Context) -> Eigenpairs | None:
    identity, found = _EIGENPAIRS.get(context.store, ("", None))
    return found if identity == context.kernel.identity else None


def _model(
    context: Context,
    *,
    ridge: float = 1e-3,
    ridge_scale: RidgeScale = "mean_diagonal",
    centre: Centre = None,
    method: FitMethod = "auto",
    task: Task = "auto",
    tol: float = 1e-6,
    seed: int = 0,
) -> KernelRegression:
    options: Mapping[str, Any] = {"ridge_scale": ridge_scale, "centre": centre, "method": method, "task": task}
    model = KernelRegression(ridge, **options, tol=tol, seed=seed, memory_limit=context.share)
    targets = require(context, "targets", _targets(context))
    return model.fit(context.operator, targets, initial_outputs=_initial_outputs(context, centre=centre))


def _leading_eigenpairs(context: Context) -> Result | None:
    """Those that `eigsh` saved, if they converged."""
    found = saved_result(context.store, "eigsh", context.kernel.name)
    return found if found is not None and found.is_converged else None


def _other_store(context: Context, *, other: str) -> KernelStore:
    """Another store.

    Parameters
    ----------
    other
        Path or URL of the store to compare with, which is the reference.
    """
    return open_kernel(other)


# By the names of parameters. What has options of its own gives them to every step that it is an input of.
INPUTS: dict[str, Callable[..., Any]] = {
    "matrix": lambda context: context.operator,
    "kernel": lambda context: context.operator,
    "store": lambda context: context.store,
    "other_store": _other_store,
    "array": lambda context: context.kernel.name,
    "memory_limit": lambda context: context.share,
    "client": lambda context: context.client,
    "monitor": lambda context: context.monitor,
    "checkpoint": lambda context: context.checkpoint,
    "rhs": _targets,
    "targets": _targets,
    "test_targets": _test_targets,
    "test_kernel": _test_kernel,
    "test_diagonal": _test_diagonal,
    "initial_outputs": _initial_outputs,
    "test_initial_outputs": _test_initial_outputs,
    "eigenpairs": _eigenpairs,
    "leading_eigenpairs": _leading_eigenpairs,
    "all_eigenpairs": lambda context: _eigenpairs(context),
    "known_eigenpairs": _known_eigenpairs,
    "model": _model,
}
# Inputs that are the result of another step: parameter → name of the step.
RESULTS = {"posterior": "gaussian_process"}

# Inputs whose options another docstring explains.
EXPLAINED: dict[str, Any] = {"model": KernelRegression}

_HOW = {
    "targets": "targets; give targets= to compute_kernel, or return them from the workflow's data.factory",
    "test_targets": "test targets; give test_targets= to compute_kernel",
    "test_kernel": "test samples; give test_inputs= to compute_kernel, or --grow to `ntkpipe run`",
}


def require(context: Context, name: str, value: Any) -> Any:
    """Raise ConfigError for an input that a step cannot do without and the store does not hold."""
    if value is None:
        raise ConfigError(f"{context.store.path} has no {_HOW.get('targets' if name == 'rhs' else name, name)}")
    return value
