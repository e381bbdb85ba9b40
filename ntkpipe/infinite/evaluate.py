"""Tiles of a network's kernels: products of inputs of one fixed shape, then layers on strips that stay in cache."""

from collections.abc import Iterator, Sequence

import numpy as np

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.infinite import images
from ntkpipe.infinite.layers import Layer, through
from ntkpipe.infinite.state import Rows, Spare, State, sliced

# BLAS sums entries of products of one shape in one order, wherever they lie and whichever factor is the left one; other
# shapes go through other kernels, whose last bits differ.
EDGE = 256
STRIP = 8192  # entries of Σ in a strip: 64 KiB


def product(left: FloatArray, right: FloatArray, out: FloatArray | None = None) -> FloatArray:
    """``left @ right.T``, each entry with bits that depend on its two rows alone."""
    if out is None:
        out = np.empty((len(left), len(right)))
    for rows in runs(len(left), EDGE):
        first = _padded(left[rows])
        for columns in runs(len(right), EDGE):
            # A copy, since NumPy takes another routine for a matrix times its own transpose.
            second = _padded(right[columns], copies=right is left)
            part = out[rows, columns]
            if part.shape == (EDGE, EDGE):
                np.matmul(first, second.T, out=part)
            else:
                part[:] = (first @ second.T)[: part.shape[0], : part.shape[1]]
    return out


def _padded(rows: FloatArray, *, copies: bool = False) -> FloatArray:
    if len(rows) == EDGE:
        return rows.copy() if copies else rows
    found = np.zeros((EDGE, rows.shape[1]))
    found[: len(rows)] = rows
    return found


def own_state(layers: Sequence[Layer], samples: FloatArray, scale: float) -> State:
    """Σ of samples with themselves before the first layer, with the bits that pairs have."""
    if samples.ndim > 2:
        return images.start(samples, samples, images.pools_of(layers), scale, Spare())
    s = np.concatenate([product(part := samples[run], part).diagonal() for run in runs(len(samples), EDGE)]) * scale
    return State(s, np.zeros_like(s), is_own=True, fan_in=samples.shape[-1])


def fill(
    layers: Sequence[Layer], rows: Rows, columns: Rows, *, scale: float, nngp: FloatArray, ntk: FloatArray
) -> None:
    """Compute both kernels of samples into arrays; where rows are the columns, upper blocks alone, and mirror them."""
    if rows.samples.ndim > 2:
        images.fill(layers, rows, columns, scale=scale, nngp=nngp, ntk=ntk)
        return
    spare = Spare()
    for at, across in blocks(rows, columns):
        s = product(rows.samples[at], columns.samples[across])
        s *= scale
        theta = np.zeros_like(s)
        right = sliced(columns.kept, across)
        left = sliced(rows.kept, at)
        for run in runs(len(s), max(1, STRIP // s.shape[1])):
            strip = State(s[run], theta[run], is_own=False, fan_in=rows.samples.shape[-1], spare=spare)
            through(layers, strip, sliced(left, run), right)
            into = slice(at.start + run.start, at.start + run.stop)
            nngp[into, across], ntk[into, across] = strip.s, strip.theta
        if rows is columns and at != across:
            nngp[across, at], ntk[across, at] = nngp[at, across].T, ntk[at, across].T


def blocks(rows: Rows, columns: Rows) -> Iterator[tuple[slice, slice]]:
    """Runs of samples whose pairs are computed together."""
    for at in runs(len(rows), EDGE):
        for across in runs(len(columns), EDGE):
            if rows is not columns or at.start <= across.start:
                yield at, across
