"""What passes through layers: covariances and tangent kernels of pairs of samples, or of samples with themselves."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from ntkpipe.base.arrays import FloatArray

# What a layer keeps of samples, for their pairs: arrays whose first axis is the samples', or tuples of such.
Kept: TypeAlias = tuple[Any, ...]

_MOST_SHAPES = 8  # that memory is held for


@dataclass
class State:
    """Σ and Θ of a strip of pairs, arrays of one shape that layers change in place or replace.

    Axes are (rows, columns); of samples with themselves, ``is_own``, there is one axis. Images have their own states.
    """

    s: FloatArray
    theta: FloatArray
    is_own: bool
    fan_in: int  # channels, features
    gain: float = 1.0  # by which the next layer will multiply; an activation may do so for it
    is_ahead: bool = False  # whether it has
    spare: "Spare" = field(default_factory=lambda: Spare())

    @property
    def variances(self) -> FloatArray:
        """Σ of each sample (and pixel, after it) with itself, of an own state."""
        return self.s

    def spread(self, left: FloatArray, right: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What was kept of rows and columns as views that broadcast against Σ, and may have more axes behind."""
        return (left, right) if self.is_own else (left[:, None], right[None])

    def strips(self, left: Kept, right: Kept) -> "Iterator[tuple[State, Kept, Kept]]":
        """Parts that stay in cache, with what was kept of their samples: here one, since pairs come in strips."""
        yield self, left, right

    def by_sample(self, values: FloatArray) -> FloatArray:
        """All entries of each sample, of an own state."""
        return values.reshape(len(values), -1)

    def flatten(self, *, is_mean: bool) -> None:
        """Pixels become features, by the mean or the sum over pixels with themselves; here there are none."""

    def scratch(self, count: int) -> list[FloatArray]:
        """Arrays like Σ for the use of one layer."""
        return self.spare.arrays(count, self.s.shape)

    def multiply(self, gain: float) -> None:
        """Multiply Σ and Θ by a gain, unless the activation before has."""
        if not self.is_ahead and gain != 1.0:
            self.s *= gain
            self.theta *= gain
        self.is_ahead = False


class Spare:
    """Memory that layers share, one after the other."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, tuple[int, ...]], list[FloatArray]] = {}

    def arrays(self, count: int, shape: tuple[int, ...]) -> list[FloatArray]:
        """The same arrays of a shape, whenever so many are asked for; they hold anything."""
        found = self._held.get((count, shape))
        if found is None:
            if len(self._held) == _MOST_SHAPES:
                self._held.clear()
            found = self._held[count, shape] = [np.empty(shape) for _ in range(count)]
        return found


@dataclass(frozen=True)
class Rows:
    """Samples as a network takes them, with what its layers keep of each; slices are of samples."""

    samples: FloatArray  # (n, n₀), or (n, H, W, C)
    kept: Kept
    nngp: FloatArray  # of each sample with itself
    ntk: FloatArray

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, part: slice) -> "Rows":
        return Rows(self.samples[part], sliced(self.kept, part), self.nngp[part], self.ntk[part])


def sliced(kept: Kept, part: slice) -> Kept:
    """The same of some samples."""
    return tuple(sliced(each, part) if isinstance(each, tuple) else each[part] for each in kept)


def size_of(kept: Kept) -> int:
    """Bytes of all arrays."""
    return sum(size_of(each) if isinstance(each, tuple) else each.nbytes for each in kept)
