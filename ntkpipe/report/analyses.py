"""What a page shows of a kernel, each by the function that does it."""

from collections.abc import Mapping

from ntkpipe.analysis.alignment import Alignment, alignment
from ntkpipe.analysis.generalisation import generalisation
from ntkpipe.analysis.generalisation_result import Generalisation
from ntkpipe.analysis.path_result import RidgePath
from ntkpipe.analysis.ridge_path import ridge_path
from ntkpipe.analysis.spectrum import spectrum
from ntkpipe.analysis.spectrum_result import KernelSpectrum
from ntkpipe.kept import Question
from ntkpipe.report.gather import Analysis, Inputs


def _spectrum(inputs: Inputs, question: Question) -> KernelSpectrum:
    options = inputs.options
    return spectrum(
        question.operator,
        eigenpairs=inputs.pairs,
        ridges=options.ridges,
        ridge_scale=options.ridge_scale,
        memory_limit=question.memory_limit,
        monitor=question.monitor,
    )


def _alignment(inputs: Inputs, question: Question) -> Alignment:
    return alignment(
        question.operator,
        inputs.known_targets,
        eigenpairs=inputs.pairs,
        memory_limit=question.memory_limit,
        monitor=question.monitor,
    )


def _regression(inputs: Inputs, question: Question) -> RidgePath:
    options = inputs.options
    is_measured = inputs.test_kernel is not None and inputs.test_targets is not None
    return ridge_path(
        question.operator,
        inputs.known_targets,
        ridges=options.ridges,
        ridge_scale=options.ridge_scale,
        test_kernel=inputs.test_kernel if is_measured else None,
        test_targets=inputs.test_targets if is_measured else None,
        eigenpairs=inputs.eigenpairs,
        memory_limit=question.memory_limit,
        monitor=question.monitor,
    )


def _generalisation(inputs: Inputs, question: Question) -> Generalisation:
    options = inputs.options
    is_measured = inputs.test_kernel is not None and inputs.test_targets is not None
    return generalisation(
        question.operator,
        inputs.known_targets,
        ridges=options.ridges,
        ridge_scale=options.ridge_scale,
        test_kernel=inputs.test_kernel if is_measured else None,
        test_targets=inputs.test_targets if is_measured else None,
        eigenpairs=inputs.eigenpairs,
        memory_limit=question.memory_limit,
        monitor=question.monitor,
    )


# By the names of results, which steps of the same name save, too.
ANALYSES: Mapping[str, Analysis] = {
    "spectrum": Analysis(_spectrum),
    "alignment": Analysis(_alignment, needs_targets=True),
    "regression": Analysis(_regression, needs_targets=True),
    "generalisation": Analysis(_generalisation, needs_targets=True),
}
