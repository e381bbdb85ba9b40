"""Empirical neural tangent kernels at data-set size: exact, verified, resumable, out of core."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ntkpipe.base.version import VERSION

if TYPE_CHECKING:
    from ntkpipe.analysis.alignment import alignment as alignment
    from ntkpipe.analysis.comparing.compare import compare_kernels as compare_kernels
    from ntkpipe.analysis.generalisation import generalisation as generalisation
    from ntkpipe.analysis.learning_curve import learning_curve as learning_curve
    from ntkpipe.analysis.spectrum import spectrum as spectrum
    from ntkpipe.base.config import ClusterSpec as ClusterSpec
    from ntkpipe.base.errors import NtkpipeError as NtkpipeError
    from ntkpipe.build.compute import compute_kernel as compute_kernel
    from ntkpipe.build.compute import plan_kernel as plan_kernel
    from ntkpipe.build.estimate import estimate_cluster as estimate_cluster
    from ntkpipe.build.in_memory import kernel_matrix as kernel_matrix
    from ntkpipe.build.jacobian_operator import jacobian_operator as jacobian_operator
    from ntkpipe.build.upkeep.verify_repair import repair as repair
    from ntkpipe.build.upkeep.verify_repair import verify as verify
    from ntkpipe.learning.dynamics import dynamics as dynamics
    from ntkpipe.learning.gaussian.calibration import calibration as calibration
    from ntkpipe.learning.gaussian.influence import influence as influence
    from ntkpipe.learning.gaussian.process import gaussian_process as gaussian_process
    from ntkpipe.learning.regression.estimator import KernelRegression as KernelRegression
    from ntkpipe.learning.regression.ridge_path import ridge_path as ridge_path
    from ntkpipe.learning.regression.sklearn_gp import PrecomputedKernel as PrecomputedKernel
    from ntkpipe.operators.opening import as_operator as as_operator
    from ntkpipe.report.report import write_report as write_report
    from ntkpipe.solvers.direct.cholesky import cholesky as cholesky
    from ntkpipe.solvers.direct.eigh import eigh as eigh
    from ntkpipe.solvers.direct.eigh import eigvalsh as eigvalsh
    from ntkpipe.solvers.inverse.solve import solve as solve
    from ntkpipe.solvers.inverse.solve import solve_path as solve_path
    from ntkpipe.solvers.spectral.density import density as density
    from ntkpipe.solvers.spectral.lanczos import eigsh as eigsh
    from ntkpipe.solvers.spectral.logdet import logdet as logdet
    from ntkpipe.solvers.spectral.slq_logdet import slq_logdet as slq_logdet
    from ntkpipe.solvers.spectral.smallest import smallest as smallest
    from ntkpipe.steps.run import run_step as run_step
    from ntkpipe.steps.saved import read_result as read_result
    from ntkpipe.store.derive import derive_kernel as derive_kernel
    from ntkpipe.store.export import export_kernel as export_kernel
    from ntkpipe.store.kernel import Kernel as Kernel
    from ntkpipe.store.kernel_store import KernelStore as KernelStore
    from ntkpipe.store.kernel_store import open_kernel as open_kernel
    from ntkpipe.store.results import Checkpoint as Checkpoint

__version__ = VERSION

# Module → its public names, resolved on first use, so that reading a store loads neither torch nor dask.
_HOMES = {
    "analysis.alignment": "alignment",
    "analysis.comparing.compare": "compare_kernels",
    "analysis.generalisation": "generalisation",
    "analysis.learning_curve": "learning_curve",
    "analysis.spectrum": "spectrum",
    "base.config": "ClusterSpec",
    "base.errors": "NtkpipeError",
    "build.compute": "compute_kernel plan_kernel",
    "build.estimate": "estimate_cluster",
    "build.in_memory": "kernel_matrix",
    "build.jacobian_operator": "jacobian_operator",
    "build.upkeep.verify_repair": "repair verify",
    "learning.dynamics": "dynamics",
    "learning.gaussian.calibration": "calibration",
    "learning.gaussian.influence": "influence",
    "learning.gaussian.process": "gaussian_process",
    "learning.regression.estimator": "KernelRegression",
    "learning.regression.ridge_path": "ridge_path",
    "learning.regression.sklearn_gp": "PrecomputedKernel",
    "operators.opening": "as_operator",
    "report.report": "write_report",
    "solvers.direct.cholesky": "cholesky",
    "solvers.direct.eigh": "eigh eigvalsh",
    "solvers.inverse.solve": "solve solve_path",
    "solvers.spectral.density": "density",
    "solvers.spectral.lanczos": "eigsh",
    "solvers.spectral.logdet": "logdet",
    "solvers.spectral.slq_logdet": "slq_logdet",
    "solvers.spectral.smallest": "smallest",
    "steps.run": "run_step",
    "steps.saved": "read_result",
    "store.derive": "derive_kernel",
    "store.export": "export_kernel",
    "store.kernel": "Kernel",
    "store.kernel_store": "KernelStore open_kernel",
    "store.results": "Checkpoint",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ntkpipe' has no attribute {name!r}")
    return getattr(import_module(f"ntkpipe.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
