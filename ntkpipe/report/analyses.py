"""What a page shows of a kernel, each by the function that does it."""

from collections.abc import Mapping

from ntkpipe.analysis.alignment import Alignment, alignment
from ntkpipe.analysis.generalisation import Generalisation, generalisation
from ntkpipe.analysis.path_result import RidgePath
from ntkpipe.analysis.ridge_path import ridge_path
from ntkpipe.analysis.spectrum import KernelSpectrum, spectrum
from ntkpipe.operators.operator import Operator
from ntkpipe.report.gather import Analysis, Inputs
from ntkpipe.solvers.result import Monitor


def _spectrum(inputs: Inputs, operator: Operator, monitor: Monitor) -> KernelSpectrum:
    options = inputs.options
    return spectrum(
        operator,
        eigenpairs=inputs.pairs,
        ridges=options.ridges,
        ridge_scale=options.ridge_scale,
        memory_limit=options.memory_limit,
        monitor=monitor,
    )


def _alignment(inputs: Inputs, operator: Operator, monitor: Monitor) -> Alignment:
    return alignment(
        operator,
        inputs.targets,
        eigenpairs=inputs.pairs,
        memory_limit=inputs.options.memory_limit,
        monitor=monitor,
    )


def _regression(inputs: Inputs, operator: Operator, monitor: Monitor) -> RidgePath:
    options = inputs.options
    is_measured = inputs.test_kernel is not None and inputs.test_targets is not None
    return ridge_path(
        operator,
        inputs.targets,
        ridges=options.ridges,
        ridge_scale=options.ridge_scale,
        test_kernel=inputs.test_kernel if is_measured else None,
        test_targets=inputs.test_targets if is_measured else None,
        eigenpairs=inputs.eigenpairs,
        memory_limit=options.memory_limit,
        monitor=monitor,
    )


def _generalisation(inputs: Inputs, operator: Operator, monitor: Monitor) -> Generalisation:
    options = inputs.options
    is_measured = inputs.test_kernel is not None and inputs.test_targets is not None
    return generalisation(
        operator,
        inputs.targets,
        ridges=options.ridges,
        ridge_scale=options.ridge_scale,
        test_kernel=inputs.test_kernel if is_measured else None,
        test_targets=inputs.test_targets if is_measured else None,
        eigenpairs=inputs.eigenpairs,
        memory_limit=options.memory_limit,
        monitor=monitor,
    )


# By the names of results, which steps of the same name save, too.
ANALYSES: Mapping[str, Analysis] = {
    "spectrum": Analysis(_spectrum),
    "alignment": Analysis(_alignment, needs_targets=True),
    "regression": Analysis(_regression, needs_targets=True),
    "generalisation": Analysis(_generalisation, needs_targets=True),
}
