"""What passes through the layers: covariances and tangent kernels of pairs of samples, or of samples with themselves."""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from ntkpipe.base.arrays import FloatArray

# What a layer keeps of samples, for their pairs: arrays whose first axis is the samples', or tuples of such.
Kept: TypeAlias = tuple[Any, ...]


@dataclass
class State:
    """Σ and Θ of a strip of pairs, arrays of one shape that layers change in place or replace.

    Axes are (rows, columns), then pixels: none, (H, W) where only a pixel with itself is needed, or (H, W, H', W').
    Of samples with themselves, ``is_own``, there is one axis instead of rows and columns.
    """

    s: FloatArray
    theta: FloatArray
    is_own: bool
    fan_in: int  # channels, features
    spare: "Spare" = field(default_factory=lambda: Spare())

    @property
    def copies(self) -> int:
        """How many copies of the pixel axes there are: 0, 1, 2."""
        return (self.s.ndim - (1 if self.is_own else 2)) // 2

    @property
    def variances(self) -> FloatArray:
        """Σ of each sample, and pixel, with itself, of an own state: (n,) or (n, H, W)."""
        return self.s if self.copies < 2 else np.einsum("nabab->nab", self.s)

    def spread(self, left: FloatArray, right: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What was kept of rows and columns, (n,) or (n, H, W) and more, as views that broadcast against Σ."""
        pixels = (slice(None), slice(None)) * (self.copies > 0)
        gaps = (None, None) * (self.copies > 1)
        rows, columns = (slice(None),), (slice(None),)
        if not self.is_own:
            rows, columns = (slice(None), None), (None, slice(None))
        return left[(*rows, *pixels, *gaps)], right[(*columns, *gaps, *pixels)]

    def scratch(self, count: int) -> list[FloatArray]:
        """Arrays like Σ for the use of one layer."""
        return self.spare.arrays(count, self.s.shape)


class Spare:
    """Memory that layers share, one after the other."""

    def __init__(self) -> None:
        self._held: list[FloatArray] = []

    def arrays(self, count: int, shape: tuple[int, ...]) -> list[FloatArray]:
        """Arrays of a shape, which hold anything."""
        size = int(np.prod(shape))
        while len(self._held) < count:
            self._held.append(np.empty(size))
        for place, each in enumerate(self._held[:count]):
            if each.size < size:
                self._held[place] = np.empty(size)
        return [each[:size].reshape(shape) for each in self._held[:count]]


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
