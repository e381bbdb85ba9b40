"""Activations whose dual has a closed form."""

import math
from dataclasses import dataclass

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.infinite.activations.dual import RAISED, TINY, Dual
from ntkpipe.infinite.state import Kept, State


@dataclass(frozen=True)
class Rectifier(Dual):
    """ReLU, and other slopes on the left: a x + (1 − a) ReLU(x) (Cho, Saul 2009, Eqs. 3–6)."""

    name: str
    slope: float

    @property
    def share(self) -> float:
        """Of ReLU's kernel over 2π in this one's."""
        return (1.0 - self.slope) ** 2 / (2.0 * math.pi)

    def keep(self, p: FloatArray, gain: float) -> Kept:
        """√p times the root of what V is multiplied with, and 1 / √p of both signs, zero where p counts as zero."""
        root = np.sqrt(p)
        inverse = np.divide(math.sqrt(RAISED), root, out=np.zeros_like(root), where=p > TINY)
        return root * math.sqrt(gain * self.share), inverse, -inverse

    def apply(self, state: State, left: Kept, right: Kept, gain: float) -> None:
        """V = √(pq) (sin φ + (π − φ) cos φ) / 2π, V̇ = (π − φ) / 2π."""
        s, theta = state.s, state.theta
        minus, angle = state.scratch(2)
        value = self._room(state)
        np.multiply(*state.spread(left[1], right[2]), out=minus)  # −cos φ, so that its angle is π − φ
        minus *= s
        minus.clip(-1.0, 1.0, out=minus)
        np.add(1.0, minus, out=value)  # 1 − c² would lose the digits of angles near zero
        np.subtract(1.0, minus, out=angle)
        value *= angle
        np.sqrt(value, out=value)
        np.arccos(minus, out=angle)
        minus *= angle
        value -= minus
        np.multiply(*state.spread(left[0], right[0]), out=minus)
        angle *= gain * self.share
        value *= minus
        if self.slope:
            s *= gain * self.slope
            s += value
            angle += gain * self.slope
        theta *= angle

    def _room(self, state: State) -> FloatArray:
        """Where V comes: in place of Σ if that is no part of it, since less memory stays in cache."""
        return state.scratch(3)[2] if self.slope else state.s

    def slow(self, s: float, p: float, q: float) -> tuple[float, float]:
        """The same by the angle of two numbers; that of a zero is π/2, as :meth:`keep` has it."""
        square = p * q - s * s
        height = math.sqrt(square) if square > (RAISED**2 - 1.0) * p * q else 0.0
        angle = math.pi - (math.atan2(height, s) if min(p, q) > TINY else math.pi / 2.0)
        return self.slope * s + self.share * (height + angle * s), self.slope + self.share * angle


class _Bounded(Dual):
    """What erf and GELU share: x = s / √((t + p)(t + q)), and 1 − x² without cancellation where s² = pq."""

    threshold: float  # t

    def keep(self, p: FloatArray, gain: float) -> Kept:
        """a = 1 / √(t + p), t a², p a², p a."""
        root = 1.0 / np.sqrt(self.threshold + p)
        square = root * root
        return root, self.threshold * square, p * square, p * root

    def sine(self, state: State, left: Kept, right: Kept) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """The product of both a, x, 1 − x², and room for another."""
        scale, sine, rest, other = state.scratch(4)
        np.multiply(*state.spread(left[0], right[0]), out=scale)
        np.multiply(state.s, scale, out=sine)
        np.multiply(*state.spread(left[2], right[2]), out=rest)
        np.multiply(sine, sine, out=other)
        rest -= other
        np.maximum(rest, 0.0, out=rest)
        rest += np.add(*state.spread(left[1], right[1]), out=other)
        rest -= np.multiply(*state.spread(left[1], right[1]), out=other)
        return scale, np.clip(sine, -1.0, 1.0, out=sine), rest, other


@dataclass(frozen=True)
class Erf(_Bounded):
    """The error function (Williams 1997, Eq. 11)."""

    name = "erf"
    threshold = 0.5

    def apply(self, state: State, left: Kept, right: Kept, gain: float) -> None:
        """V = (2/π) asin x, V̇ = (2/π) / √((½ + p)(½ + q)(1 − x²)), x = s / √((½ + p)(½ + q))."""
        scale, sine, rest, _ = self.sine(state, left, right)
        np.arcsin(sine, out=state.s)
        state.s *= gain * (2.0 / math.pi)
        np.sqrt(rest, out=rest)
        scale /= rest
        scale *= gain * (2.0 / math.pi)
        state.theta *= scale

    def slow(self, s: float, p: float, q: float) -> tuple[float, float]:
        """The same by the angle of two numbers."""
        height = math.sqrt(1.0 + 2.0 * (p + q) + 4.0 * max(p * q - s * s, 0.0))
        return 2.0 / math.pi * math.atan2(2.0 * s, height), 4.0 / math.pi / height


@dataclass(frozen=True)
class Gelu(_Bounded):
    """x Φ(x) (Tsuchida et al. 2021, arXiv 2002.08517)."""

    name = "gelu"
    threshold = 1.0

    def apply(self, state: State, left: Kept, right: Kept, gain: float) -> None:
        """With x = s / √D = sin ψ, D = (1 + p)(1 + q), A = 1 / (1 + p), B = 1 / (1 + q).

        V = s/4 + (s ψ + x² / (√D cos ψ) + pq cos ψ / √D) / 2π, V̇ = ¼ + (ψ + tan ψ (A B / cos² ψ + A + B)) / 2π.
        """
        s = state.s
        scale, sine, rest, other = self.sine(state, left, right)
        slope, angle, added = state.scratch(3)
        np.arcsin(sine, out=angle)
        np.multiply(*state.spread(left[1], right[1]), out=slope)
        slope /= rest
        slope += np.add(*state.spread(left[1], right[1]), out=other)
        np.sqrt(rest, out=rest)
        np.multiply(*state.spread(left[3], right[3]), out=other)
        other *= rest
        np.divide(sine, rest, out=added)  # tan ψ
        slope *= added
        slope += angle
        slope *= gain * (0.5 / math.pi)
        slope += gain * 0.25
        state.theta *= slope
        added *= sine
        added *= scale
        added += other
        angle *= s
        added += angle
        added *= gain * (0.5 / math.pi)
        s *= gain * 0.25
        s += added

    def slow(self, s: float, p: float, q: float) -> tuple[float, float]:
        """The same by the angle of two numbers, in the variables of the paper."""
        whole = (1.0 + p) * (1.0 + q)
        square = 1.0 + p + q + max(p * q - s * s, 0.0)
        height = math.sqrt(square)
        angle = math.atan2(s, height)
        value = s / 4.0 + (s * angle + (s * s + p * q * square) / (whole * height)) / (2.0 * math.pi)
        slope = 0.25 + angle / (2.0 * math.pi)
        return value, slope + s / (2.0 * math.pi * height) * (1.0 / square + (1.0 - p * q) / whole + 1.0)


@dataclass(frozen=True)
class Wave(Dual):
    """Sine and cosine: each is the other's derivative, but for a sign that squares."""

    name: str

    def keep(self, p: FloatArray, gain: float) -> Kept:
        """p / 2."""
        return (0.5 * p,)

    def apply(self, state: State, left: Kept, right: Kept, gain: float) -> None:
        """E[sin sin] = e^(−(p+q)/2) sinh s, E[cos cos] = e^(−(p+q)/2) cosh s, without overflow."""
        near, far, half = state.scratch(3)
        np.add(*state.spread(left[0], right[0]), out=half)
        np.exp(np.subtract(state.s, half, out=near), out=near)
        half += state.s
        np.exp(np.negative(half, out=far), out=far)
        near *= 0.5 * gain
        far *= 0.5 * gain
        odd, even = np.subtract(near, far, out=half), np.add(near, far, out=near)
        value, slope = (odd, even) if self.name == "sin" else (even, odd)
        state.s[...] = value
        state.theta *= slope

    def slow(self, s: float, p: float, q: float) -> tuple[float, float]:
        """The same by two exponentials."""
        near, far = math.exp(s - (p + q) / 2.0) / 2.0, math.exp(-s - (p + q) / 2.0) / 2.0
        return (near - far, near + far) if self.name == "sin" else (near + far, near - far)


@dataclass(frozen=True)
class Identity(Dual):
    """No activation."""

    name = "identity"

    def keep(self, p: FloatArray, gain: float) -> Kept:
        """Nothing."""
        return ()

    def apply(self, state: State, left: Kept, right: Kept, gain: float) -> None:
        """V = s, V̇ = 1."""
        state.s *= gain
        state.theta *= gain

    def slow(self, s: float, p: float, q: float) -> tuple[float, float]:
        """The same."""
        return s, 1.0
