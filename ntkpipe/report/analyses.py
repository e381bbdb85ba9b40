"""What a page shows of a kernel, each by the function that does it."""

from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np

from ntkpipe.analysis.alignment import Alignment, alignment
from ntkpipe.analysis.generalisation import Generalisation, generalisation
from ntkpipe.analysis.spectrum import KernelSpectrum, spectrum
from ntkpipe.base.errors import ConfigError
from ntkpipe.learning.gaussian.influence import Influence, influence
from ntkpipe.learning.regression.estimator import KernelRegression
from ntkpipe.learning.regression.ridge_path import RidgePath, ridge_path
from ntkpipe.report.findings import Missing, choose
from ntkpipe.report.gather import Analysis, Inputs
from ntkpipe.report.posterior import JudgedPosterior, judge_posterior
from ntkpipe.solvers.on_store import StoreRequest

# Of a prediction that are kept.
_NUM_TERMS = 10


def _spectrum(inputs: Inputs, request: StoreRequest) -> KernelSpectrum:
    options = inputs.options
    return spectrum(
        request.operator,
        eigenpairs=inputs.pairs,
        ridges=options.ridges,
        ridge_scale=options.ridge_scale,
        memory_limit=request.memory_limit,
        monitor=request.monitor,
    )


def _alignment(inputs: Inputs, request: StoreRequest) -> Alignment:
    return alignment(
        request.operator,
        inputs.known_targets,
        eigenpairs=inputs.pairs,
        memory_limit=request.memory_limit,
        monitor=request.monitor,
    )


def _across_ridges(inputs: Inputs, request: StoreRequest) -> dict[str, Any]:
    """What analyses across ridges take."""
    options = inputs.options
    is_measured = inputs.test_kernel is not None and inputs.store.test_targets is not None
    return {
        "ridges": options.ridges,
        "ridge_scale": options.ridge_scale,
        "test_kernel": inputs.test_kernel if is_measured else None,
        "test_targets": inputs.store.test_targets if is_measured else None,
        "eigenpairs": inputs.eigenpairs,
        "memory_limit": request.memory_limit,
        "monitor": request.monitor,
    }


def _regression(inputs: Inputs, request: StoreRequest) -> RidgePath:
    return ridge_path(request.operator, inputs.known_targets, **_across_ridges(inputs, request))


def _generalisation(inputs: Inputs, request: StoreRequest) -> Generalisation:
    return generalisation(request.operator, inputs.known_targets, **_across_ridges(inputs, request))


def _influence(inputs: Inputs, request: StoreRequest) -> Influence:
    """At the ridge that the page speaks of, which becomes an option of the result."""
    begin, ridge = perf_counter(), _chosen_ridge(inputs)
    model = KernelRegression(ridge=ridge, memory_limit=request.memory_limit)
    model.fit(request.operator, inputs.known_targets)
    found = influence(model, inputs.test_kernel, top=_NUM_TERMS)
    classes = np.asarray(getattr(model, "classes_", np.zeros(0))).tolist()
    return replace(
        found,
        options={**found.options, "ridge": ridge, "classes": classes},
        matrix=request.operator.identity(),
        work=request.operator.work,
        seconds=perf_counter() - begin,
    )


def _chosen_ridge(inputs: Inputs) -> float:
    found = inputs.found["regression"]
    if isinstance(found, Missing):
        raise ConfigError(found.why)
    return choose(found).ridge


def _is_of_the_chosen_ridge(inputs: Inputs, saved: Mapping[str, Any]) -> bool:
    """Whether a saved result is of that ridge; any will do where none was chosen."""
    found = inputs.found["regression"]
    return isinstance(found, Missing) or bool(saved["options"].get("ridge") == choose(found).ridge)


def _calibration(inputs: Inputs, request: StoreRequest) -> JudgedPosterior:
    test_diagonal, test_targets = inputs.test_diagonal, inputs.store.test_targets
    assert test_diagonal is not None
    assert test_targets is not None
    ridge = _chosen_ridge(inputs)
    return judge_posterior(request, inputs.known_targets, inputs.test_kernel, test_diagonal, test_targets, ridge)


# By the names of results, which steps of the same name save, too.
ANALYSES: Mapping[str, Analysis] = {
    "spectrum": Analysis(_spectrum),
    "alignment": Analysis(_alignment, needs_targets=True),
    "regression": Analysis(_regression, needs_targets=True),
    "generalisation": Analysis(_generalisation, needs_targets=True),
    "calibration": Analysis(_calibration, needs_targets=True, needs_test=True, is_current=_is_of_the_chosen_ridge),
    "influence": Analysis(_influence, needs_targets=True, needs_test=True, is_current=_is_of_the_chosen_ridge),
}
