"""Empirical neural tangent kernels at data-set size: exact, verified, resumable, out of core."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ntkpipe.base.version import VERSION

if TYPE_CHECKING:
    from ntkpipe.analysis.alignment import alignment
    from ntkpipe.analysis.comparing.compare import compare_kernels
    from ntkpipe.analysis.generalisation import generalisation
    from ntkpipe.analysis.learning_curve import learning_curve
    from ntkpipe.analysis.spectrum import spectrum
    from ntkpipe.base.config import ClusterSpec
    from ntkpipe.base.errors import NtkpipeError
    from ntkpipe.build.compute import compute_kernel, plan_kernel
    from ntkpipe.build.estimate import estimate_cluster
    from ntkpipe.build.in_memory import kernel_matrix
    from ntkpipe.build.jacobian_operator import jacobian_operator
    from ntkpipe.build.upkeep.verify_repair import repair, verify
    from ntkpipe.learning.dynamics import dynamics
    from ntkpipe.learning.gaussian.calibration import calibration
    from ntkpipe.learning.gaussian.influence import influence
    from ntkpipe.learning.gaussian.process import gaussian_process
    from ntkpipe.learning.regression.estimator import KernelRegression
    from ntkpipe.learning.regression.ridge_path import ridge_path
    from ntkpipe.learning.regression.sklearn_gp import PrecomputedKernel
    from ntkpipe.operators.opening import as_operator
    from ntkpipe.report.report import write_report
    from ntkpipe.solvers.direct.cholesky import cholesky
    from ntkpipe.solvers.direct.eigh import eigh, eigvalsh
    from ntkpipe.solvers.linear.solve import solve, solve_path
    from ntkpipe.solvers.spectral.density import density
    from ntkpipe.solvers.spectral.lanczos import eigsh
    from ntkpipe.solvers.spectral.logdet import logdet
    from ntkpipe.solvers.spectral.slq_logdet import slq_logdet
    from ntkpipe.solvers.spectral.smallest import smallest
    from ntkpipe.solvers.steps import read_result
    from ntkpipe.store.derive import derive_kernel
    from ntkpipe.store.export import export_kernel
    from ntkpipe.store.kernel import Kernel
    from ntkpipe.store.kernel_store import KernelStore, open_kernel
    from ntkpipe.store.results import Checkpoint

__version__ = VERSION

# Resolved on first use, so that reading a store loads neither torch nor dask.
_HOMES = {
    "Checkpoint": "store.results",
    "ClusterSpec": "base.config",
    "Kernel": "store.kernel",
    "KernelRegression": "learning.regression.estimator",
    "KernelStore": "store.kernel_store",
    "NtkpipeError": "base.errors",
    "PrecomputedKernel": "learning.regression.sklearn_gp",
    "alignment": "analysis.alignment",
    "as_operator": "operators.opening",
    "cholesky": "solvers.direct.cholesky",
    "compare_kernels": "analysis.comparing.compare",
    "compute_kernel": "build.compute",
    "density": "solvers.spectral.density",
    "derive_kernel": "store.derive",
    "dynamics": "learning.dynamics",
    "eigh": "solvers.direct.eigh",
    "eigsh": "solvers.spectral.lanczos",
    "eigvalsh": "solvers.direct.eigh",
    "estimate_cluster": "build.estimate",
    "export_kernel": "store.export",
    "generalisation": "analysis.generalisation",
    "calibration": "learning.gaussian.calibration",
    "gaussian_process": "learning.gaussian.process",
    "influence": "learning.gaussian.influence",
    "jacobian_operator": "build.jacobian_operator",
    "kernel_matrix": "build.in_memory",
    "learning_curve": "analysis.learning_curve",
    "logdet": "solvers.spectral.logdet",
    "open_kernel": "store.kernel_store",
    "plan_kernel": "build.compute",
    "read_result": "solvers.steps",
    "repair": "build.upkeep.verify_repair",
    "ridge_path": "learning.regression.ridge_path",
    "slq_logdet": "solvers.spectral.slq_logdet",
    "smallest": "solvers.spectral.smallest",
    "solve": "solvers.linear.solve",
    "solve_path": "solvers.linear.solve",
    "spectrum": "analysis.spectrum",
    "verify": "build.upkeep.verify_repair",
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
