"""Sums over windows of pairs of pixels, in orders of additions that do not depend on where a pair of samples lies.

An array holds an entry for each pair (a, a') of pixels of B pairs of samples, (height, width, height, width, B), or for
the pairs (a, a) alone, (height, width, B). Samples come last: slices are long. (x, x') and (x', x) have equal bits.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Literal

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError
from ntkpipe.infinite.state import Spare

Padding = Literal["same", "valid", "circular"] | int  # zeros, as in TensorFlow and JAX; around; zeros on either side
Run = tuple[slice, slice]  # outputs, and the inputs that they read


@dataclass(frozen=True)
class Axis:
    """A window that slides along one side of an image."""

    outputs: int
    taps: tuple[tuple[Run, ...], ...]  # for each place in the window; the first one reaches all outputs, if any does


@cache
def axis_of(size: int, window: int, stride: int, padding: Padding) -> Axis:
    """The outputs along a side; "same" and "circular" pad the smaller half before, as TensorFlow and JAX do."""
    if padding in ("same", "circular"):
        outputs = -(-size // stride)
        before = max((outputs - 1) * stride + window - size, 0) // 2
    else:
        before = 0 if padding == "valid" else int(padding)
        if before > size + window:
            raise ConfigError(f"padding={padding} around {size} pixels; needed at most {size + window}")
        outputs = (size + 2 * before - window) // stride + 1
    if outputs < 1:
        raise ConfigError(f"a window of {window} does not fit {size} pixels with padding={padding!r}")
    places = (range(place - before, place - before + outputs * stride, stride) for place in range(window))
    taps = [_runs(place, size, padding == "circular") for place in places]
    return Axis(outputs, tuple(sorted(taps, key=lambda runs: _reached(runs) < outputs)))


def _runs(places: range, size: int, wraps: bool) -> tuple[Run, ...]:
    """The outputs whose input lies in the image, as few slices."""
    inside = [(out, at % size) for out, at in enumerate(places) if wraps or 0 <= at < size]
    breaks = [i for i in range(1, len(inside)) if inside[i][1] - inside[i - 1][1] != places.step]
    runs = [inside[start:stop] for start, stop in zip([0, *breaks], [*breaks, len(inside)], strict=True) if inside]
    return tuple((slice(run[0][0], run[-1][0] + 1), slice(run[0][1], run[-1][1] + 1, places.step)) for run in runs)


def _reached(runs: tuple[Run, ...]) -> int:
    return sum(out.stop - out.start for out, _ in runs)


def window_sum(values: FloatArray, axes: tuple[Axis, Axis], spare: Spare) -> FloatArray:
    """Σ_δ z[a + δ, a' + δ] over the places δ of a window, zero outside of images: along heights, then along widths.

    The sum takes the place of the values where it has their shape.
    """
    first, second = (range(side, values.ndim - 1, 2) for side in (0, 1))
    (by_height,) = spare.arrays(1, _with(values.shape, first, axes[0]))
    _add_taps(values, axes[0], first, by_height)
    shape = _with(by_height.shape, second, axes[1])
    total = values if values.shape == shape else np.empty(shape)
    _add_taps(by_height, axes[1], second, total)
    return total


def _with(shape: tuple[int, ...], dimensions: range, axis: Axis) -> tuple[int, ...]:
    return tuple(axis.outputs if dimension in dimensions else size for dimension, size in enumerate(shape))


def _add_taps(values: FloatArray, axis: Axis, dimensions: range, total: FloatArray) -> None:
    """Add what each place of a window reads, along one or two dimensions by equal steps."""
    begins = _reached(axis.taps[0]) == axis.outputs
    if not begins:
        total.fill(0.0)
    for number, runs in enumerate(axis.taps):
        for chosen in product(runs, repeat=len(dimensions)):
            out, read = ([slice(None)] * values.ndim for _ in range(2))
            for dimension, run in zip(dimensions, chosen, strict=True):
                out[dimension], read[dimension] = run
            part, given = total[tuple(out)], values[tuple(read)]
            if begins and number == 0:
                part[...] = given
            else:
                np.add(part, given, out=part)


def pool_sum(values: FloatArray, axes: tuple[Axis, Axis], *, keep_all: bool) -> FloatArray:
    """Σ of z[a, a'] over all a of a window and all a' of another, for all pairs of windows or each with itself."""

    def at(*pixels: int) -> FloatArray:
        part = values[tuple(axis.taps[place][0][1] for axis, place in zip(axes * 2, pixels, strict=True))]
        return part if keep_all else np.einsum("abab...->ab...", part)

    places = list(product(*(range(len(axis.taps)) for axis in axes)))
    total = at(*places[0], *places[0]).copy()
    for place in places[1:]:
        total += at(*place, *place)
    for first, second in combinations(places, 2):
        total += np.add(at(*first, *second), at(*second, *first))
    return total


def total_sum(values: FloatArray) -> FloatArray:
    """Σ z[a, a'] over all pairs, or over the pairs (a, a) that are held: (B,)."""
    height, width, *_, samples = values.shape
    rows = values.reshape(height * width, -1, samples)
    if values.ndim == 5:
        by_row, by_column = rows[:, 0].copy(), rows[0].copy()
        for pixel in range(1, height * width):
            by_row += rows[:, pixel]
            by_column += rows[pixel]
        by_row += by_column
        by_row /= 2
        rows = by_row[:, None]
    total: FloatArray = rows[0, 0].copy()
    for row in rows[1:, 0]:
        total += row
    return total
