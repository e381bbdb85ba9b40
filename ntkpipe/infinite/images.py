"""Pairs of images: their states, and the tiles that come from them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.infinite.layers import Layer, through
from ntkpipe.infinite.pixels import total_sum
from ntkpipe.infinite.state import Kept, Rows, Spare, State

_ENTRIES = 1 << 19  # of Σ in a piece: pairs of images that are computed together, 4 MiB
_STRIP = 1 << 15  # entries of Σ that an activation goes through at a time


@dataclass
class Images(State):
    """Σ and Θ of pairs of images, samples with themselves among them.

    Axes are pixels, (H, W) of those with themselves or (H, W, H', W') of all pairs, then B pairs of samples.
    """

    pools: int = 0  # layers to come that need pairs of different pixels

    @property
    def copies(self) -> int:
        """How many copies of the pixel axes there are: 0, 1, 2."""
        return (self.s.ndim - 1) // 2

    @property
    def variances(self) -> FloatArray:
        """See :attr:`State.variances`."""
        found = self.s if self.copies < 2 else np.einsum("abab...->ab...", self.s)
        return np.moveaxis(found, -1, 0)

    def spread(self, left: FloatArray, right: FloatArray) -> tuple[FloatArray, FloatArray]:
        """See :meth:`State.spread`; what was kept begins with the pairs."""
        pixels = min(self.copies, 1) * 2
        first, second = (np.moveaxis(each, 0, pixels) for each in (left, right))
        if self.copies < 2:
            return first, second
        return first[:, :, None, None], second[None, None]

    def strips(self, left: Kept, right: Kept) -> Iterator[tuple[State, Kept, Kept]]:
        """See :meth:`State.strips`: some rows of pixels at a time."""
        tall = max(1, _STRIP * len(self.s) // self.s.size)
        if self.copies == 0 or tall >= len(self.s):
            yield self, left, right
            return
        for run in runs(len(self.s), tall):
            at = (slice(None), run)
            second = right if self.copies == 2 else _cut(right, at)
            yield Images(self.s[run], self.theta[run], self.is_own, self.fan_in, self.spare), _cut(left, at), second

    def by_sample(self, values: FloatArray) -> FloatArray:
        """See :meth:`State.by_sample`."""
        return values.reshape(-1, values.shape[-1]).T

    def flatten(self, *, is_mean: bool) -> None:
        """See :meth:`State.flatten`."""
        if not self.copies:
            return
        area = prod(self.s.shape[:2])
        axes = "ab...->ab..." if self.copies == 1 else "abab...->ab..."
        self.s, self.theta = (total_sum(np.einsum(axes, each)) for each in (self.s, self.theta))
        if is_mean:
            self.s /= area
            self.theta /= area
        self.fan_in *= area


def _cut(kept: Kept, at: tuple[slice, ...]) -> Kept:
    return tuple(_cut(each, at) if isinstance(each, tuple) else each[at] for each in kept)


def _chosen(kept: Kept, samples: NDArray[np.intp]) -> Kept:
    """What was kept of some samples, which come last in memory."""
    return tuple(_chosen(each, samples) if isinstance(each, tuple) else _last(each[samples]) for each in kept)


def _last(values: FloatArray) -> FloatArray:
    """The same array, whose first axis comes last in memory, behind pixels, and others first."""
    order = (*range(3, values.ndim), *range(1, min(values.ndim, 3)), 0)
    return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))


def start(left: FloatArray, right: FloatArray, pools: int, scale: float, spare: Spare) -> Images:
    """Σ of pairs before the first layer, of images (B, H, W, C)."""
    first, second = (np.ascontiguousarray(np.moveaxis(each, 0, -1)) for each in (left, right))
    if pools:
        first, second = first[:, :, None, None], second[None, None]
    s = first[..., 0, :] * second[..., 0, :]
    (more,) = spare.arrays(1, s.shape)
    for channel in range(1, left.shape[-1]):
        np.multiply(first[..., channel, :], second[..., channel, :], out=more)
        s += more
    s *= scale
    return Images(s, np.zeros_like(s), False, left.shape[-1], spare, pools)


def pools_of(layers: Sequence[Layer]) -> int:
    """How many layers need pairs of different pixels."""
    return sum(layer.pools() for layer in layers)


def pairs_at_once(layers: Sequence[Layer], samples: FloatArray) -> int:
    """Pairs of images (n, H, W, C) that are computed together."""
    return max(1, _ENTRIES // prod(samples.shape[1:-1]) ** (2 if pools_of(layers) else 1))


def pairs(rows: int, columns: int, *, is_symmetric: bool, most: int) -> Iterator[tuple[NDArray[np.intp], ...]]:
    """Row and column numbers of all pairs, or of those on and above the diagonal, so many at a time."""
    first = np.arange(rows) if is_symmetric else np.zeros(rows, np.intp)
    ends = np.cumsum(columns - first)
    for run in runs(int(ends[-1]), most):
        numbers = np.arange(run.start, run.stop)
        row = np.searchsorted(ends, numbers, side="right")
        yield row, numbers - ends[row] + columns


def fill(
    layers: Sequence[Layer], rows: Rows, columns: Rows, *, scale: float, nngp: FloatArray, ntk: FloatArray
) -> None:
    """Compute both kernels of images into arrays; where rows are the columns, the upper half alone, and mirror it."""
    spare, pools, most = Spare(), pools_of(layers), pairs_at_once(layers, rows.samples)
    for i, j in pairs(*nngp.shape, is_symmetric=rows is columns, most=most):
        state = start(rows.samples[i], columns.samples[j], pools, scale, spare)
        through(layers, state, _chosen(rows.kept, i), _chosen(columns.kept, j))
        nngp[i, j], ntk[i, j] = state.s, state.theta
        if rows is columns:
            nngp[j, i], ntk[j, i] = state.s, state.theta
