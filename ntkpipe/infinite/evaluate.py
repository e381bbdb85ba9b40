"""Tiles of a network's kernels: products of inputs, then layers on strips that stay in cache."""

import itertools
from collections.abc import Sequence

import numpy as np

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.infinite import images
from ntkpipe.infinite.layers import Layer, through
from ntkpipe.infinite.state import Rows, Spare, State, sliced

# BLAS sums entries of products in one order, wherever they lie and whichever factor is the left one, by one thread, and
# with as many features at a time; but small products, of up to a million operations in OpenBLAS, take other ways.
HEIGHT, DEPTH = 256, 4096
_EDGE = 64  # of what this divides, or HEIGHT where there are fewer than 256 features, are numbers of rows and columns
SPAN = 4096  # columns that are taken through layers after their product, 8 MiB of each kernel
_TURNED = 64  # columns that become rows at a time, in cache
STRIP = 65536  # entries of Σ in a strip: 512 KiB, for which calls of NumPy take a twentieth of the time


def product(left: FloatArray, right: FloatArray, out: FloatArray | None = None) -> FloatArray:
    """``left @ right.T``, each entry with bits that depend on its two rows alone; needs a single thread of BLAS."""
    if out is None:
        out = np.empty((len(left), len(right)))
    for rows, depth in itertools.product(runs(len(left), HEIGHT), runs(left.shape[1], DEPTH)):
        edge = _EDGE if depth.stop - depth.start >= 256 else HEIGHT
        first = _padded(left[rows, depth], edge)
        whole = len(right) - len(right) % edge
        for columns in (*runs(whole, SPAN), *([slice(whole, len(right))] if whole < len(right) else [])):
            second, into = _padded(right[columns, depth], edge), out[rows, columns]
            if np.may_share_memory(first, second):
                first = first.copy()  # of a matrix and itself NumPy takes another product, half of it
            if not depth.start and into.shape == (len(first), len(second)):
                np.matmul(first, second.T, out=into)
            else:
                part = (first @ second.T)[: into.shape[0], : into.shape[1]]
                np.copyto(into, part + into if depth.start else part)
    return out


def _padded(rows: FloatArray, edge: int) -> FloatArray:
    if not len(rows) % edge:
        return rows
    found = np.zeros((-(-len(rows) // edge) * edge, rows.shape[1]))
    found[: len(rows)] = rows
    return found


def own_state(layers: Sequence[Layer], samples: FloatArray, scale: float) -> State:
    """Σ of samples with themselves before the first layer, with the bits that pairs have."""
    if samples.ndim > 2:
        return images.start(samples, samples, images.pools_of(layers), scale)
    s = np.concatenate([product(samples[run], samples[run]).diagonal() for run in runs(len(samples), _EDGE)])
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
    spare = Spare()
    with np.errstate():
        np.setbufsize(512)  # NumPy copies what broadcasts to buffers where rows are shorter than they; until the end
        for at, across in itertools.product(runs(len(rows), HEIGHT), runs(len(columns), SPAN)):
            left, right, found = rows[at], columns[across], into[:, at, across]
            product(left.samples, right.samples, found[0])
            for run in runs(len(left), max(1, STRIP // len(right))):
                s, theta = found[:, run]
                s *= factor
                theta.fill(0.0)
                state = State(s, theta, is_own=False, fan_in=fan_in, is_ahead=is_ahead, spare=spare)
                through(layers, state, sliced(left.kept, run), right.kept)
            if mirror is not None:
                into_mirror = mirror[:, across, at]
                for part in runs(len(right), _TURNED):
                    into_mirror[:, part] = found[:, :, part].swapaxes(1, 2)
