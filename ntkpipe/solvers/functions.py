"""Functions of a matrix without its eigenvectors: density, log determinant, training dynamics."""

from ntkpipe.solvers.density import Counts, Density, density
from ntkpipe.solvers.dynamics import Dynamics, dynamics
from ntkpipe.solvers.logdet import LogDeterminantEstimate, slq_logdet

__all__ = ["Counts", "Density", "Dynamics", "LogDeterminantEstimate", "density", "dynamics", "slq_logdet"]
