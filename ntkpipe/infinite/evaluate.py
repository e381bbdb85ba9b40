"""Tiles of a network's kernels: products of inputs of one fixed shape, then layers on strips that stay in cache."""

from collections.abc import Sequence

import numpy as np

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.infinite import images
from ntkpipe.infinite.layers import Layer, through
from ntkpipe.infinite.state import Rows, Spare, State, sliced

# BLAS sums entries of products of one shape by one thread in one order, wherever they lie and whichever factor is the
# left one; other shapes and numbers of threads take other ways, whose last bits differ.
HEIGHT, WIDTH, DEPTH = 256, 1024, 4096
STRIP = 16384  # entries of Σ in a strip: 128 KiB


def product(left: FloatArray, right: FloatArray, out: FloatArray | None = None) -> FloatArray:
    """``left @ right.T``, each entry with bits that depend on its two rows alone; needs a single thread of BLAS."""
    if out is None:
        out = np.empty((len(left), len(right)))
    part = np.empty((HEIGHT, WIDTH))
    for columns in runs(len(right), WIDTH):
        for depth in runs(left.shape[1], DEPTH):
            # A copy, since NumPy takes another routine for a matrix times its own transpose.
            second = _padded(right[columns, depth], WIDTH).T
            for rows in runs(len(left), HEIGHT):
                into = out[rows, columns]
                np.matmul(_padded(left[rows, depth], HEIGHT), second, out=part)
                found = part[: into.shape[0], : into.shape[1]]
                if depth.start:
                    into += found
                else:
                    into[...] = found
    return out


def _padded(rows: FloatArray, count: int) -> FloatArray:
    if len(rows) == count == HEIGHT:
        return rows
    found = np.zeros((count, rows.shape[1]))
    found[: len(rows)] = rows
    return found


def own_state(layers: Sequence[Layer], samples: FloatArray, scale: float) -> State:
    """Σ of samples with themselves before the first layer, with the bits that pairs have."""
    if samples.ndim > 2:
        return images.start(samples, samples, images.pools_of(layers), scale)
    s = np.concatenate([product(samples[run], samples[run]).diagonal() for run in runs(len(samples), HEIGHT)]) * scale
    return State(s, np.zeros_like(s), is_own=True, fan_in=samples.shape[-1])


def fill(layers: Sequence[Layer], rows: Rows, columns: Rows, *, scale: float, into: FloatArray) -> None:
    """Compute both kernels of samples into (2, n, m); where rows are the columns, the lower part is mirrored."""
    if rows.samples.ndim > 2:
        images.fill(layers, rows, columns, scale=scale, into=into)
        return
    spare, block = Spare(), np.empty((HEIGHT, WIDTH))
    for at in runs(len(rows), HEIGHT):
        left = rows[at]
        for across in runs(len(columns), WIDTH):
            if rows is columns and across.stop <= at.start:
                continue
            right, found = columns[across], into[:, at, across]
            s = product(left.samples, right.samples, block[: len(left), : len(right)])
            for run in runs(len(left), max(1, STRIP // len(right))):
                first, theta = spare.first(2, s[run].shape)
                state = State(first, theta, is_own=False, fan_in=rows.samples.shape[1], spare=spare)
                np.multiply(s[run], scale, out=state.s)
                state.theta.fill(0.0)
                through(layers, state, sliced(left.kept, run), right.kept)
                found[0, run], found[1, run] = state.s, state.theta
            if rows is columns:
                into[:, across, at] = found.swapaxes(1, 2)
