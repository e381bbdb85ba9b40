"""Empirical neural tangent kernels at data-set size: exact, verified, resumable, out of core."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntkpipe.analysis.alignment import alignment
    from ntkpipe.analysis.calibration import calibration
    from ntkpipe.analysis.compare import compare_kernels
    from ntkpipe.analysis.estimator import KernelRegression
    from ntkpipe.analysis.gaussian import gaussian_process
    from ntkpipe.analysis.generalisation import generalisation
    from ntkpipe.analysis.influence import influence
    from ntkpipe.analysis.learning_curve import learning_curve
    from ntkpipe.analysis.ridge_path import ridge_path
    from ntkpipe.analysis.spectrum import spectrum
    from ntkpipe.api import compute_kernel, jacobian_operator, kernel_matrix, plan_kernel
    from ntkpipe.config import ClusterSpec
    from ntkpipe.derive import derive_kernel
    from ntkpipe.errors import NtkpipeError
    from ntkpipe.estimate import estimate_cluster
    from ntkpipe.export import export_kernel
    from ntkpipe.kernel import Kernel, KernelStore, open_kernel
    from ntkpipe.operators.opening import as_operator
    from ntkpipe.precomputed import PrecomputedKernel
    from ntkpipe.report.report import write_report
    from ntkpipe.saving import Checkpoint
    from ntkpipe.solvers.cholesky import cholesky
    from ntkpipe.solvers.dense import eigh, eigvalsh
    from ntkpipe.solvers.determinant import logdet
    from ntkpipe.solvers.functions import density, dynamics, slq_logdet
    from ntkpipe.solvers.lanczos import eigsh
    from ntkpipe.solvers.smallest import smallest
    from ntkpipe.solvers.solve import solve, solve_path
    from ntkpipe.solving import read_result
    from ntkpipe.upkeep import repair, verify

__version__ = "0.1.0"

# Resolved on first use, so that reading a store loads neither torch nor dask.
_HOMES = {
    "Checkpoint": "saving",
    "ClusterSpec": "config",
    "Kernel": "kernel",
    "KernelRegression": "analysis.estimator",
    "KernelStore": "kernel",
    "NtkpipeError": "errors",
    "PrecomputedKernel": "precomputed",
    "alignment": "analysis.alignment",
    "as_operator": "operators.opening",
    "cholesky": "solvers.cholesky",
    "compare_kernels": "analysis.compare",
    "compute_kernel": "api",
    "density": "solvers.functions",
    "derive_kernel": "derive",
    "dynamics": "solvers.functions",
    "eigh": "solvers.dense",
    "eigsh": "solvers.lanczos",
    "eigvalsh": "solvers.dense",
    "estimate_cluster": "estimate",
    "export_kernel": "export",
    "generalisation": "analysis.generalisation",
    "calibration": "analysis.calibration",
    "gaussian_process": "analysis.gaussian",
    "influence": "analysis.influence",
    "jacobian_operator": "api",
    "kernel_matrix": "api",
    "learning_curve": "analysis.learning_curve",
    "logdet": "solvers.determinant",
    "open_kernel": "kernel",
    "plan_kernel": "api",
    "read_result": "solving",
    "repair": "upkeep",
    "ridge_path": "analysis.ridge_path",
    "slq_logdet": "solvers.functions",
    "smallest": "solvers.smallest",
    "solve": "solvers.solve",
    "solve_path": "solvers.solve",
    "spectrum": "analysis.spectrum",
    "verify": "upkeep",
    "write_report": "report.report",
}

__all__ = [
    "Checkpoint",
    "ClusterSpec",
    "Kernel",
    "KernelRegression",
    "KernelStore",
    "NtkpipeError",
    "PrecomputedKernel",
    "alignment",
    "as_operator",
    "calibration",
    "cholesky",
    "compare_kernels",
    "compute_kernel",
    "density",
    "derive_kernel",
    "dynamics",
    "eigh",
    "eigsh",
    "eigvalsh",
    "estimate_cluster",
    "export_kernel",
    "gaussian_process",
    "generalisation",
    "influence",
    "jacobian_operator",
    "kernel_matrix",
    "learning_curve",
    "logdet",
    "open_kernel",
    "plan_kernel",
    "read_result",
    "repair",
    "ridge_path",
    "slq_logdet",
    "smallest",
    "solve",
    "solve_path",
    "spectrum",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ntkpipe' has no attribute {name!r}")
    return getattr(import_module(f"ntkpipe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
