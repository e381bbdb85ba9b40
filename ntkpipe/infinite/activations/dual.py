"""What every activation offers: E[σ(u)σ(v)] and E[σ'(u)σ'(v)] for Gaussian pairs (u, v)."""

from abc import ABC, abstractmethod
from typing import ClassVar

from ntkpipe.base.arrays import FloatArray
from ntkpipe.infinite.state import Kept, State

# Rounding lowers the cosine of parallel samples by up to three units of 2⁻⁵³, and the angle of such a cosine is 10⁻⁸.
# Where a derivative jumps, cosines are raised by as much, and cut at one: multiples of a sample have the angle zero.
RAISED = 1.0 + 2.0**-51
TINY = 1e-300  # variances up to which samples count as zeros, since the product of two 1 / √p overflows below


class Dual(ABC):
    """An activation σ by its dual V(s, p, q) = E[σ(u)σ(v)], (u, v) ~ N(0, [[p, s], [s, q]]), and V̇ of σ'."""

    name: str  # with its parameter, as in "leaky_relu:0.1"
    operations: ClassVar[float] = 30.0  # an entry, in additions

    @abstractmethod
    def keep(self, p: FloatArray, gain: float) -> Kept:
        """What pairs need of variances p: arrays that begin with the axes of p."""

    @abstractmethod
    def apply(self, state: State, left: Kept, right: Kept, gain: float) -> None:
        """Σ ← gain V, Θ ← gain V̇ Θ, where `left` and `right` are what :meth:`keep` returned for rows and columns."""

    @abstractmethod
    def slow(self, s: float, p: float, q: float) -> tuple[float, float]:
        """V and V̇ of one pair, by another path."""
