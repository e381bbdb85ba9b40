"""Tiles of a network's kernels: products of inputs of one fixed shape, then layers on strips that stay in cache."""

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.infinite.layers import Layer, through
from ntkpipe.infinite.state import Rows, Spare, State, sliced

# BLAS sums entries of products of one shape by one thread in one order, wherever they lie and whichever factor is the
# left one; other shapes and numbers of threads take other ways, whose last bits differ.
HEIGHT, WIDTH, DEPTH = 256, 1024, 4096
STRIP = 16384  # entries of Σ in a strip: 128 KiB
_BLOCK = 1 << 17  # entries of Σ in a block of pairs of images


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


def own_state(samples: FloatArray, copies: int, scale: float) -> State:
    """Σ of samples with themselves before the first layer, with the bits that :func:`pair_state` gives."""
    if copies < 2:
        flat = samples.reshape(-1, samples.shape[-1])
        parts = [product(flat[run], flat[run]).diagonal() for run in runs(len(flat), HEIGHT)]
        s = np.concatenate(parts).reshape(samples.shape[:-1])
    else:
        sizes = samples.shape[1:-1]
        s = np.stack([product(each, each) for each in samples.reshape(len(samples), -1, samples.shape[-1])])
        s = s.reshape(len(samples), *sizes, *sizes)
    s = s * scale
    return State(s, np.zeros_like(s), is_own=True, fan_in=samples.shape[-1])


def pair_state(left: FloatArray, right: FloatArray, copies: int, scale: float, spare: Spare) -> State:
    """Σ of pairs of images before the first layer."""
    n, m, sizes, channels = len(left), len(right), left.shape[1:-1], left.shape[-1]
    if copies == 1:
        s = np.empty((n, m, *sizes))
        for at in np.ndindex(*sizes):
            s[(..., *at)] = product(left[(slice(None), *at)], right[(slice(None), *at)])
    else:
        pixels = prod(sizes)
        flat = product(left.reshape(-1, channels), right.reshape(-1, channels))
        s = np.ascontiguousarray(flat.reshape(n, pixels, m, pixels).swapaxes(1, 2)).reshape(n, m, *sizes, *sizes)
    s *= scale
    return State(s, np.zeros_like(s), is_own=False, fan_in=channels, spare=spare)


def fill(layers: Sequence[Layer], rows: Rows, columns: Rows, *, copies: int, scale: float, into: FloatArray) -> None:
    """Compute both kernels of samples into (2, n, m); where rows are the columns, blocks below the diagonal are mirrored."""
    height, width = HEIGHT, WIDTH
    if copies:
        height = width = max(1, int((_BLOCK / prod(rows.samples.shape[1:-1]) ** copies) ** 0.5))
    spare, block = Spare(), np.empty((HEIGHT, WIDTH))
    for at in runs(len(rows), height):
        left = rows[at]
        for across in runs(len(columns), width):
            if rows is columns and across.stop <= at.start:
                continue
            right, found = columns[across], into[:, at, across]
            if copies:
                state = pair_state(left.samples, right.samples, copies, scale, spare)
                through(layers, state, left.kept, right.kept)
                found[0], found[1] = state.s, state.theta
            else:
                s = product(left.samples, right.samples, block[: len(left), : len(right)])
                for run in runs(len(left), max(1, STRIP // len(right))):
                    state = State(*spare.first(2, s[run].shape), is_own=False, fan_in=rows.samples.shape[1], spare=spare)
                    np.multiply(s[run], scale, out=state.s)
                    state.theta.fill(0.0)
                    through(layers, state, sliced(left.kept, run), right.kept)
                    found[0, run], found[1, run] = state.s, state.theta
            if rows is columns:
                into[:, across, at] = found.swapaxes(1, 2)
