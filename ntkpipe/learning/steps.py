"""Regression and Gaussian processes with the targets and test set of a store; kept below its ``results``."""

from collections.abc import Sequence
from typing import Any, Literal

from ntkpipe.base.errors import ConfigError
from ntkpipe.base.ridge import RidgeScale
from ntkpipe.base.targets import Task
from ntkpipe.learning.gaussian.calibration import calibration
from ntkpipe.learning.gaussian.influence import Influence, influence
from ntkpipe.learning.gaussian.process import Posterior, ProcessMethod, gaussian_process
from ntkpipe.learning.regression.estimator import FitMethod, KernelRegression
from ntkpipe.learning.regression.ridge_path import PathMethod, RidgePath, ridge_path
from ntkpipe.learning.regression.sources import targets_of, test_kernel_of
from ntkpipe.solvers.on_store import StoreRequest, of_store, result_name
from ntkpipe.store.results import save_result

Centre = Literal["initial_outputs"] | None


@of_store("regression")
def regression_of_store(
    request: StoreRequest,
    *,
    ridges: Sequence[float] | None = None,
    ridge_scale: RidgeScale = None,
    centre: Centre = None,
    method: PathMethod = "auto",
    task: Task = "auto",
    tol: float = 1e-8,
    num_left_out: int = 64,
    seed: int = 0,
) -> RidgePath:
    """Kernel ridge regression of the stored targets at many ridges, judged on the stored test set where there is one.

    Options are those of :func:`ntkpipe.ridge_path`; with ``centre="initial_outputs"`` targets are
    centred at the stored outputs.
    """
    store = request.store
    is_measured = store.manifest.test is not None and store.test_targets is not None
    return ridge_path(
        request.operator,
        targets_of(store, "train"),
        ridges=ridges,
        ridge_scale=ridge_scale,
        test_kernel=test_kernel_of(request) if is_measured else None,
        test_targets=store.test_targets if is_measured else None,
        **_initial(request, centre, is_measured),
        method=method,
        task=task,
        tol=tol,
        num_left_out=num_left_out,
        memory_limit=request.memory_limit,
        seed=seed,
        monitor=request.monitor,
    )


@of_store("gaussian_process")
def gaussian_process_of_store(
    request: StoreRequest,
    *,
    ridge: float = 1e-3,
    ridge_scale: RidgeScale = "mean_diagonal",
    centre: Centre = None,
    method: ProcessMethod = "auto",
    path: str | None = None,
    task: Task = "auto",
    tol: float = 1e-8,
    scale: float | Literal["likelihood"] = "likelihood",
    seed: int = 0,
) -> Posterior:
    """The Gaussian process with the stored kernel and targets, and its posterior at the stored test samples, if any.

    Options are those of :func:`ntkpipe.gaussian_process`. Where there are test targets its
    calibration, with ``scale`` as of :func:`ntkpipe.calibration`, goes to ``results/calibration``.
    """
    store = request.store
    is_tested = store.manifest.test is not None
    posterior = gaussian_process(
        request.operator,
        targets_of(store, "train"),
        ridge=ridge,
        ridge_scale=ridge_scale,
        test_kernel=test_kernel_of(request),
        test_diagonal=_test_diagonal(request) if is_tested else None,
        **_initial(request, centre, is_tested),
        method=method,
        path=path,
        task=task,
        tol=tol,
        memory_limit=request.memory_limit,
        seed=seed,
        monitor=request.monitor,
    )
    if is_tested and store.test_targets is not None:
        judged = calibration(posterior, store.test_targets, scale=scale, task=task, seed=seed)
        name = result_name("calibration", request.kernel.name)
        save_result(store.store, name, judged.to_json(), judged.arrays())
    return posterior


@of_store("influence")
def influence_of_store(
    request: StoreRequest,
    *,
    ridge: float = 1e-3,
    ridge_scale: RidgeScale = "mean_diagonal",
    centre: Centre = None,
    method: FitMethod = "auto",
    task: Task = "auto",
    tol: float = 1e-6,
    top: int = 10,
    seed: int = 0,
) -> Influence:
    """Which train samples the predictions at the stored test samples are made of.

    Options are those of :class:`ntkpipe.KernelRegression` and, for ``top``,
    :func:`ntkpipe.influence`.
    """
    if request.store.manifest.test is None:
        raise ConfigError(f"{request.store.path} has no test samples; give test_inputs= to compute_kernel")
    initial = _initial(request, centre, True)
    model = KernelRegression(
        ridge,
        ridge_scale=ridge_scale,
        method=method,
        tol=tol,
        centre=centre,
        task=task,
        memory_limit=request.memory_limit,
        seed=seed,
    )
    targets = targets_of(request.store, "train")
    model.fit(request.operator, targets, initial_outputs=initial.get("initial_outputs"))
    offset = initial.get("test_initial_outputs")
    return influence(model, test_kernel_of(request), top=top, initial_outputs=offset)


def _initial(request: StoreRequest, centre: Centre, is_tested: bool) -> dict[str, Any]:
    """Outputs at initialisation, where targets are centred there."""
    if centre is None:
        return {}
    if centre != "initial_outputs":
        raise ConfigError(f"centre={centre!r}; needed 'initial_outputs' or None")
    store = request.store
    return {"initial_outputs": store.outputs, "test_initial_outputs": store.test_outputs if is_tested else None}


def _test_diagonal(request: StoreRequest) -> Any:
    name = f"{request.kernel.name.removesuffix('train')}test_diagonal"
    array = request.store.store.arrays[name]
    return array.read_samples(0, array.layout.shape[0]).astype("float64")
