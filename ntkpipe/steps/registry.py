"""The table of solvers and analyses. A row makes a command, a workflow step, a saved result, a section, a line of docs.

To add one, write a function of operators and arrays with a result (:class:`ntkpipe.solvers.result.Result`), decorated
with :func:`ntkpipe.solvers.result.recorded`, and give it a row here. Parameters that are named as in
:mod:`ntkpipe.steps.inputs` get what the store holds, others with plain types become options.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from ntkpipe.base.arguments import require_known
from ntkpipe.solvers.result import Result
from ntkpipe.store.export import find_array
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.results import load_result, reading_results


@dataclass(frozen=True)
class Entry:
    """A solver or an analysis."""

    name: str  # of the command, the step, the result below `results/`, and the section
    home: str  # `.module:function` below this package, imported on first use, so that the command line starts at once
    summary: str  # one line
    # Parameter → input of :mod:`ntkpipe.steps.inputs`, where that is not the one of the same name; None leaves it out
    inputs: Mapping[str, str | None] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of options, where on a store they are others
    # Options that older versions did not have: left out of a checkpoint's name at their defaults, so that it is found
    later: tuple[str, ...] = ()
    then: str | None = None  # another entry, which is given this one's result as `posterior` and saved beside it

    @property
    def function(self) -> Callable[..., Result]:
        """The function itself."""
        module, name = self.home.split(":")
        found: Callable[..., Result] = getattr(import_module(module, "ntkpipe"), name)
        return found

    @property
    def results(self) -> tuple[type[Result], ...]:
        """Classes of its results."""
        returned = self.function.__annotations__["return"]
        return get_args(returned) if isinstance(returned, UnionType) else (returned,)


_ENTRIES = (
    Entry("eigsh", ".solvers.spectral.lanczos:eigsh", "leading eigenpairs by block Lanczos", later=("max_basis",)),
    Entry("eigh", ".solvers.direct.eigh:eigh", "all eigenpairs by LAPACK, if they fit in memory"),
    Entry("eigvalsh", ".solvers.direct.eigh:eigvalsh", "all eigenvalues by LAPACK, if they fit in memory"),
    Entry("smallest", ".solvers.spectral.smallest:smallest", "smallest eigenvalues, bounds of the condition number"),
    Entry(
        "density",
        ".solvers.spectral.density:density",
        "spectral density: how many eigenvalues lie where",
        inputs={"top": "leading_eigenpairs"},
    ),
    Entry(
        "logdet",
        ".solvers.spectral.logdet:logdet",
        "log determinant of K + λI, exact or estimated",
        later=("ridge_scale", "num_steps", "preconditioner"),
    ),
    Entry(
        "slq_logdet",
        ".solvers.spectral.logdet:slq_logdet",
        "log determinant of K + λI, estimated by stochastic Lanczos quadrature",
    ),
    Entry(
        "solve",
        ".solvers.inverse.solve:solve",
        "kernel regression (K + λI) A = Y with the stored targets",
        later=("task",),
    ),
    Entry("solve_path", ".solvers.inverse.solve:solve_path", "the same at several ridges, with one preconditioner"),
    Entry("dynamics", ".learning.dynamics:dynamics", "training by gradient flow at many times, with a fixed kernel"),
    Entry(
        "spectrum",
        ".analysis.spectrum:spectrum",
        "extremes, condition, effective ranks, density and tail of the spectrum",
        inputs={"eigenpairs": "known_eigenpairs"},
    ),
    Entry(
        "alignment",
        ".analysis.alignment:alignment",
        "alignment of the kernel with the stored targets",
        inputs={"eigenpairs": "known_eigenpairs"},
    ),
    Entry(
        "regression",
        ".learning.regression.ridge_path:ridge_path",
        "ridge regression at many ridges: training, left-out and test losses",
        inputs={"eigenpairs": "known_eigenpairs"},
    ),
    Entry("generalisation", ".analysis.generalisation:generalisation", "theory of the test loss, and what is measured"),
    Entry(
        "learning_curve",
        ".analysis.eigenlearning:learning_curve",
        "predicted and measured losses for train sets of several sizes",
        inputs={"eigenpairs": "all_eigenpairs"},
    ),
    Entry(
        "gaussian_process",
        ".learning.gaussian.process:gaussian_process",
        "posterior and marginal likelihood of the Gaussian process",
        defaults={"ridge": 1e-3, "ridge_scale": "mean_diagonal"},
        then="calibration",
    ),
    Entry(
        "calibration",
        ".learning.gaussian.calibration:calibration",
        "whether the variances of the Gaussian process can be believed",
        defaults={"scale": "likelihood"},
    ),
    Entry(
        "influence",
        ".learning.gaussian.influence:influence",
        "which train samples each prediction is made of",
        inputs={"is_classification": None, "width": None},
        defaults={"ridge": 1e-3, "ridge_scale": "mean_diagonal"},
    ),
    Entry(
        "compare",
        ".analysis.comparing.compare:compare_kernels",
        "comparison with the kernel of another store, the reference",
        inputs={
            "a": "store",
            "b": "other_store",
            **dict.fromkeys(("targets", "test_targets", "test_kernels", "eigenpairs", "num_outputs")),
        },
    ),
)
REGISTRY: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def entry_of(name: str) -> Entry:
    """The entry of a name; raises ConfigError with the nearest one if there is none."""
    require_known([name], REGISTRY, "ntkpipe", "step")
    return REGISTRY[name]


_TRAIN = "kernel/train"


def result_name(step: str, array: str) -> str:
    """Name below ``results/``: the step, and the kernel where it is not the main one."""
    return step if array == _TRAIN else f"{step}-{array.replace('/', '-')}"


def saved_result(store: KernelStore, step: str, array: str = "train") -> Result | None:
    """The result that a step saved for a kernel; None if there is none, or one of a version that saved other fields.

    Raises StoreError if it is damaged.
    """
    found = read_result(store, result_name(step, find_array(store.store, array).layout.name))
    return found if isinstance(found, Result) else None


def read_result(store: KernelStore | str | Path, name: str) -> Result | dict[str, Any] | None:
    """Read the result below ``results/name`` of a store: as the solver or analysis returned it; None if there is none.

    Parameters
    ----------
    store
        Path, or an open store.
    name
        A step, such as ``eigsh`` or ``regression``; for another kernel than ``train`` its array follows, parts joined
        by ``-``, such as ``eigsh-groups-head-train``. Or another record, such as ``verification``, ``certificate`` or
        ``summary``, which is returned as a dict, as is a result of a version that saved other fields.

    Raises
    ------
    StoreError
        If the result is damaged.
    """
    opened = open_kernel(store)
    found = load_result(opened.store, name)
    entry = REGISTRY.get(name.partition("-")[0])
    for one in entry.results if entry is not None else ():
        if found is not None and one.is_of(found):
            with reading_results(opened.path):
                return one.from_saved(found)
    return found
