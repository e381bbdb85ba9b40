"""Pairs of images: their states, and the tiles that come from them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.infinite.layers import Layer, through
from ntkpipe.infinite.pixels import total_sum
from ntkpipe.infinite.state import Kept, Rows, Spare, State, sliced

_ENTRIES = 1 << 19  # of Σ in a piece: pairs of images that are computed together, 4 MiB
_STRIP = 1 << 15  # entries of Σ that an activation goes through at a time


@dataclass
class Images(State):
    """Σ and Θ of pairs of images, samples with themselves among them.

    Axes are pixels, (H, W) of those with themselves or (H, W, H', W') of all pairs, then B pairs of samples.
    """

    pools: int = 0  # layers to come that need pairs of different pixels
    room: Spare = field(default_factory=Spare)  # for sums over windows

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
        if self.copies == 0:
            return left, right
        first, second = (each.transpose(1, 2, 0, *range(3, each.ndim)) for each in (left, right))
        return (first, second) if self.copies == 1 else (first[:, :, None, None], second[None, None])

    def strips(self, left: Kept, right: Kept) -> Iterator[tuple[State, Kept, Kept]]:
        """See :meth:`State.strips`: some rows of pixels at a time."""
        tall = max(1, _STRIP * len(self.s) // self.s.size)
        if self.copies == 0 or tall >= len(self.s):
            yield self, left, right
            return
        for run in runs(len(self.s), tall):
            at = (slice(None), run)
            second = right if self.copies == 2 else _cut(right, at)
            strip = Images(self.s[run], self.theta[run], is_own=False, fan_in=0, spare=self.spare)
            yield strip, _cut(left, at), second

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


def _packed(kept: Kept) -> Kept:
    """The same arrays, whose first axis, of samples, comes last in memory, behind pixels, and others before."""
    return tuple(_packed(each) if isinstance(each, tuple) else _pack(each) for each in kept)


def _pack(values: FloatArray) -> FloatArray:
    order = (*range(3, values.ndim), *range(1, min(values.ndim, 3)), 0)
    return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))


def start(left: FloatArray, right: FloatArray, pools: int, scale: float) -> Images:
    """Σ of pairs before the first layer, of images (B, H, W, C), or one and B."""
    first, second = (np.moveaxis(each, (-1, 0), (0, -1)) for each in (left, right))
    if pools:
        first, second = first[:, :, :, None, None], second[:, None, None]
    s = first[0] * second[0]
    more = np.empty_like(s)
    for one, other in zip(first[1:], second[1:], strict=True):
        s += np.multiply(one, other, out=more)
    s *= scale
    return Images(s, np.zeros_like(s), is_own=False, fan_in=left.shape[-1], pools=pools)


def pools_of(layers: Sequence[Layer]) -> int:
    """How many layers need pairs of different pixels."""
    return sum(layer.pools() for layer in layers)


def pairs_at_once(layers: Sequence[Layer], samples: FloatArray) -> int:
    """Pairs of images (n, H, W, C) that are computed together."""
    return max(1, _ENTRIES // _entries(layers, samples.shape[1:-1]))


def scratch_bytes(layers: Sequence[Layer], shape: Sequence[int]) -> int:
    """Bytes of Σ, Θ, and four arrays of their size: sums over windows, products of channels, copies for a residual."""
    return 6 * 8 * max(_ENTRIES, _entries(layers, shape[1:]))


def _entries(layers: Sequence[Layer], sizes: Sequence[int]) -> int:
    return prod(sizes) ** (2 if pools_of(layers) else 1)


def fill(layers: Sequence[Layer], rows: Rows, columns: Rows, *, scale: float, into: FloatArray) -> None:
    """Compute both kernels of images into (2, n, m); where rows are the columns, the lower part is mirrored."""
    if len(rows) > len(columns):
        rows, columns, into = columns, rows, into.swapaxes(1, 2)
    pools, spare, room = pools_of(layers), Spare(), Spare()
    for run in runs(len(columns), pairs_at_once(layers, rows.samples)):
        samples, kept = _packed((columns.samples[run], sliced(columns.kept, run)))
        for row in range(run.stop if rows is columns else len(rows)):
            one = slice(row, row + 1)
            first = max(row - run.start, 0) if rows is columns else 0
            right = _cut((samples, kept), (slice(first, None),))
            if first and pools:
                right = _packed(right)  # so that slices are long
            state = replace(start(rows.samples[one], right[0], pools, scale), spare=spare, room=room)
            through(layers, state, sliced(rows.kept, one), right[1])
            at = slice(run.start + first, run.stop)
            into[0, row, at], into[1, row, at] = state.s, state.theta
            if rows is columns:
                into[:, at, row] = into[:, row, at]
