"""What parameters of solvers and analyses get: what a store gives, by their names, or an option of the step."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arguments import Option, check_options, entries, options_of, parameters_of, require_known, sections
from ntkpipe.base.config import Budget
from ntkpipe.base.errors import ArgumentError, ConfigError
from ntkpipe.base.operator import Operator
from ntkpipe.learning.regression.estimator import KernelRegression
from ntkpipe.operators.opening import as_operator
from ntkpipe.solvers.eigenpairs import Eigenpairs
from ntkpipe.solvers.inverse.choice import AnalysisMethod, all_eigenpairs
from ntkpipe.solvers.result import Monitor, Result
from ntkpipe.steps.registry import REGISTRY, Entry, entry_of, saved_result
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


@wraps(KernelRegression.__init__)
def _model(context: Context, **options: Any) -> KernelRegression:
    model = KernelRegression(**options, memory_limit=context.share)
    targets = require(context, "targets", context.store.targets)
    return model.fit(context.operator, targets, initial_outputs=_initial_outputs(context, centre=model.centre))


_model.__doc__ = KernelRegression.__doc__  # which explains its options


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
    "rhs": lambda context: context.store.targets,
    "targets": lambda context: context.store.targets,
    "test_targets": lambda context: context.store.test_targets,
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


def inputs_of(entry: Entry) -> dict[str, str]:
    """Parameter → input, of those that the store gives."""
    named = {name: entry.inputs.get(name, name) for name in parameters_of(entry.function)}
    return {name: source for name, source in named.items() if source in INPUTS or source in RESULTS}


def _functions(entry: Entry) -> list[Callable[..., Any]]:
    """Functions that have the options of an entry: of its inputs, and its own."""
    sources = reversed(inputs_of(entry).values())
    return [*(INPUTS[source] for source in sources if source in INPUTS), entry.function]


def _linked(entry: Entry) -> list[Entry]:
    """Entries that are done together, in order, and once more the one that is asked for: what it says goes last."""
    before = [RESULTS[source] for source in inputs_of(entry).values() if source in RESULTS]
    names = (*before, entry.name, entry.then, entry.name)
    return [REGISTRY[name] for name in names if name is not None]


def options_of_step(entry: Entry) -> dict[str, Option]:
    """The options of a step: plain parameters that the store does not give, and those of its inputs."""
    found: dict[str, Option] = {}
    for one in _linked(entry):
        given = INPUTS.keys() | one.inputs.keys()
        for function in _functions(one):
            found |= {name: option for name, option in options_of(function).items() if name not in given}
        found |= {name: replace(found[name], default=value) for name, value in one.defaults.items()}
    return found


def check_step(name: str, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of a step, checked; raises ConfigError for a wrong one, with the nearest, or one that is missing."""
    known = options_of_step(entry_of(name))
    require_known(options, known, where, "option")
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    given = check_options(known, given, where)
    missing = [key for key, option in known.items() if option.is_required and key not in given]
    if missing:
        raise ArgumentError(f"{where} needs {missing[0]}")
    return {key: given.get(key, option.default) for key, option in known.items()}


def help_of_step(entry: Entry) -> tuple[str, dict[str, str]]:
    """The first paragraph of a function's docstring, and the first sentence on each option of its step."""
    texts: dict[str, str] = {}
    for function in (function for one in _linked(entry) for function in _functions(one)):
        for name, text in entries(sections(function.__doc__ or "").get("Parameters", "")).items():
            words = re.sub(r":\w+:`~?\.?([^`]+)`", r"\1", text).replace("``", "")
            texts[name] = re.split(r"(?<=[a-z0-9)])[.;](?: |$)", words, maxsplit=1)[0].rstrip(".") + "."
    about = sections(entry.function.__doc__ or "")[""].partition("\n\n")[0]
    return " ".join(about.replace("``", "").split()), texts
