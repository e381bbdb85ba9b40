"""The public names and their modules, for type checkers and for `lazy_loader`, which imports each on first use."""

from . import infinite as infinite
from . import parametrised as parametrised
from .analysis.alignment import alignment as alignment
from .analysis.comparing.compare import compare_kernels as compare_kernels
from .analysis.eigenlearning import learning_curve as learning_curve
from .analysis.generalisation import generalisation as generalisation
from .analysis.spectrum import spectrum as spectrum
from .base.config import ClusterSpec as ClusterSpec
from .base.errors import NtkpipeError as NtkpipeError
from .build.compute import compute_kernel as compute_kernel
from .build.compute import plan_kernel as plan_kernel
from .build.compute import repair as repair
from .build.compute import verify as verify
from .build.derive import derive_kernel as derive_kernel
from .build.estimate import estimate_cluster as estimate_cluster
from .build.in_memory import jacobian_operator as jacobian_operator
from .build.in_memory import kernel_matrix as kernel_matrix
from .infinite.matrix import infinite_kernel_matrix as infinite_kernel_matrix
from .learning.dynamics import dynamics as dynamics
from .learning.gaussian.calibration import calibration as calibration
from .learning.gaussian.influence import influence as influence
from .learning.gaussian.process import gaussian_process as gaussian_process
from .learning.regression.estimator import KernelRegression as KernelRegression
from .learning.regression.ridge_path import ridge_path as ridge_path
from .learning.regression.sklearn_gp import PrecomputedKernel as PrecomputedKernel
from .operators.opening import as_operator as as_operator
from .report.report import write_report as write_report
from .solvers.direct.cholesky import cholesky as cholesky
from .solvers.direct.eigh import eigh as eigh
from .solvers.direct.eigh import eigvalsh as eigvalsh
from .solvers.inverse.solve import solve as solve
from .solvers.inverse.solve import solve_path as solve_path
from .solvers.spectral.density import density as density
from .solvers.spectral.lanczos import eigsh as eigsh
from .solvers.spectral.logdet import logdet as logdet
from .solvers.spectral.logdet import slq_logdet as slq_logdet
from .solvers.spectral.smallest import smallest as smallest
from .steps.registry import read_result as read_result
from .steps.run import run_step as run_step
from .store.export import export_kernel as export_kernel
from .store.kernel import Kernel as Kernel
from .store.kernel_store import KernelStore as KernelStore
from .store.kernel_store import open_kernel as open_kernel
from .store.results import Checkpoint as Checkpoint

__version__: str
