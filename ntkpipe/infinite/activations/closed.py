"""Activations whose dual has a closed form."""

import math
from dataclasses import dataclass

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.infinite.activations.dual import Dual
from ntkpipe.infinite.state import Kept, State

# Rounding lowers the cosine of parallel samples by up to three units of 2⁻⁵³, and the angle of such a cosine is 10⁻⁸.
# Cosines are raised by as much, and cut at one: a sample with itself, or its multiple, has the angle zero.
_RAISED = 1.0 + 2.0**-51


@dataclass(frozen=True)
class Rectifier(Dual):
    """ReLU, and other slopes on the left: a x + (1 − a) ReLU(x) (Cho, Saul 2009, Eqs. 3–6)."""

    name: str
    slope: float

    def keep(self, p: FloatArray) -> Kept:
        """√p and its inverse, zero where p is."""
        root = np.sqrt(p)
        inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0.0)
        return root, inverse * math.sqrt(_RAISED)

    def apply(self, state: State, left: Kept, right: Kept) -> None:
        """V = √(pq) (sin φ + (π − φ) cos φ) / 2π, V̇ = (π − φ) / 2π."""
        s, theta = state.s, state.theta
        c, r, a = state.scratch(3)
        np.multiply(*state.spread(left[1], right[1]), out=c)
        c *= s
        np.clip(c, -1.0, 1.0, out=c)
        np.subtract(1.0, c, out=r)
        np.add(1.0, c, out=a)
        r *= a
        np.sqrt(r, out=r)
        np.arccos(c, out=a)
        np.subtract(math.pi, a, out=a)
        c *= a
        r += c
        np.multiply(*state.spread(left[0], right[0]), out=c)
        r *= c
        share = (1.0 - self.slope) ** 2 / (2.0 * math.pi)
        a *= share
        r *= share
        if self.slope:
            s *= self.slope
            s += r
            a += self.slope
        else:
            s[:] = r
        theta *= a

    def slow(self, s: float, p: float, q: float) -> tuple[float, float]:
        """See :meth:`Dual.slow`."""
        angle = math.atan2(math.sqrt(max(p * q - s * s, 0.0)), s)
        share = (1.0 - self.slope) ** 2 / (2.0 * math.pi)
        value = self.slope * s + share * (math.sqrt(max(p * q - s * s, 0.0)) + (math.pi - angle) * s)
        return value, self.slope + share * (math.pi - angle)
