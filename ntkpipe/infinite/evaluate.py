"""Tiles of a network's kernels: products of inputs of one fixed shape, then layers on strips that stay in cache."""

from collections.abc import Sequence
from math import prod

import numpy as np

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.infinite.layers import Layer, through
from ntkpipe.infinite.state import Rows, Spare, State, sliced

# BLAS sums entries of products of one shape by one thread in one order, wherever they lie and whichever factor is the
# left one; other shapes and numbers of threads take other ways, whose last bits differ.
HEIGHT, WIDTH, DEPTH = 256, 1024, 4096
SPAN = 2048  # columns of a strip, since loops that broadcast begin anew at each row
STRIP = 16384  # entries of Σ in a strip: 128 KiB
_BLOCK = 1 << 17  # entries of Σ in a block of pairs of images


def product(left: FloatArray, right: FloatArray, out: FloatArray | None = None) -> FloatArray:
    """``left @ right.T``, each entry with bits that depend on its two rows alone; needs a single thread of BLAS."""
    if out is None:
        out = np.empty((len(left), len(right)))
    spare = np.empty((HEIGHT, WIDTH))
    for columns in runs(len(right), WIDTH):
        for depth in runs(left.shape[1], DEPTH):
            second = _padded(right[columns, depth], WIDTH).T
            for rows in runs(len(left), HEIGHT):
                into = out[rows, columns]
                is_whole = into.shape == spare.shape and not depth.start
                part = np.matmul(_padded(left[rows, depth], HEIGHT), second, out=into if is_whole else spare)
                if depth.start:
                    into += part[: into.shape[0], : into.shape[1]]
                elif not is_whole:
                    into[...] = part[: into.shape[0], : into.shape[1]]
    return out


def _padded(rows: FloatArray, count: int) -> FloatArray:
    if len(rows) == count:
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
    """Compute both kernels of samples into (2, n, m); where rows are the columns, what is below the diagonal is a copy."""
    height, width = HEIGHT, SPAN
    if copies:
        height = width = max(1, int((_BLOCK / prod(rows.samples.shape[1:-1]) ** copies) ** 0.5))
    is_symmetric = rows is columns
    spare, base, block = Spare(), Spare(), np.empty(0 if copies else (min(len(rows), HEIGHT), min(len(columns), SPAN)))
    for at in runs(len(rows), height):
        left, first = rows[at], at.start if is_symmetric else 0
        strips = [(run, sliced(left.kept, run)) for run in runs(len(left), STRIP // SPAN)]
        for across in runs(len(columns) - first, width):
            across = slice(first + across.start, first + across.stop)
            right, found = columns[across], into[:, at, across]
            if copies:
                state = pair_state(left.samples, right.samples, copies, scale, spare)
                through(layers, state, left.kept, right.kept)
                found[0], found[1] = state.s, state.theta
            else:
                s = product(left.samples, right.samples, block[: len(left), : len(right)])
                for run, kept in strips:
                    first_s, first_theta = base.arrays(2, s[run].shape)
                    state = State(first_s, first_theta, is_own=False, fan_in=left.samples.shape[1], spare=spare)
                    np.multiply(s[run], scale, out=state.s)
                    state.theta.fill(0.0)
                    through(layers, state, kept, right.kept)
                    found[0, run], found[1, run] = state.s, state.theta
            if is_symmetric:
                into[:, across, at] = found.swapaxes(1, 2)
