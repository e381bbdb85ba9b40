"""Tiles of a network's kernels: products of inputs of one fixed shape, then layers on strips that stay in cache."""

from collections.abc import Sequence

import numpy as np

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.infinite import images
from ntkpipe.infinite.layers import Layer, through
from ntkpipe.infinite.state import Rows, Spare, State, sliced

# BLAS sums entries of products of one shape by one thread in one order, wherever they lie and whichever factor is the
# left one; other shapes and numbers of threads take other ways, whose last bits differ.
HEIGHT, WIDTH, DEPTH = 256, 512, 4096
SPAN = 4096  # columns of a strip, since loops that broadcast begin anew at each row
STRIP = 32768  # entries of Σ in a strip: 256 KiB, for which calls of NumPy take a twentieth of the time


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


def scratch_bytes(features: int) -> int:
    """Bytes of padded samples, a block of products, and strips."""
    return 8 * ((HEIGHT + WIDTH) * min(features, DEPTH) + HEIGHT * (WIDTH + SPAN) + 8 * STRIP)


def _padded(rows: FloatArray, count: int) -> FloatArray:
    if len(rows) == count:
        return rows
    found = np.zeros((count, rows.shape[1]))
    found[: len(rows)] = rows
    return found


def own_state(layers: Sequence[Layer], samples: FloatArray, scale: float) -> State:
    """Σ of samples with themselves before the first layer, with the bits that pairs have."""
    if samples.ndim > 2:
        return images.start(samples, samples, images.pools_of(layers), scale)
    s = np.concatenate([product(samples[run], samples[run]).diagonal() for run in runs(len(samples), HEIGHT)])
    s = s * (scale * layers[0].gain)
    return State(s, np.zeros_like(s), is_own=True, fan_in=samples.shape[-1], is_ahead=layers[0].gain != 1.0)


def fill(
    layers: Sequence[Layer], rows: Rows, columns: Rows, *, scale: float, into: FloatArray, mirror: FloatArray | None
) -> None:
    """Compute both kernels of samples into (2, n, m), and their transposes into a mirror, while they are in cache."""
    if rows.samples.ndim > 2:
        images.fill(layers, rows, columns, scale=scale, into=into)
        if mirror is not None:
            mirror[...] = into.swapaxes(1, 2)
        return
    factor, is_ahead, fan_in = scale * layers[0].gain, layers[0].gain != 1.0, rows.samples.shape[1]
    spare, base, block = Spare(), Spare(), np.empty((min(len(rows), HEIGHT), min(len(columns), SPAN)))
    for at in runs(len(rows), HEIGHT):
        left = rows[at]
        strips = [(run, sliced(left.kept, run)) for run in runs(len(left), STRIP // SPAN)]
        for across in runs(len(columns), SPAN):
            right, found = columns[across], into[:, at, across]
            s = product(left.samples, right.samples, block[: len(left), : len(right)])
            for run, kept in strips:
                covariance, theta = base.arrays(2, s[run].shape)
                state = State(covariance, theta, is_own=False, fan_in=fan_in, is_ahead=is_ahead, spare=spare)
                np.multiply(s[run], factor, out=covariance)
                theta.fill(0.0)
                through(layers, state, kept, right.kept)
                found[0, run], found[1, run] = state.s, state.theta
            if mirror is not None:
                for plane, upper in zip(mirror, found, strict=True):
                    plane[across, at].T[...] = upper
