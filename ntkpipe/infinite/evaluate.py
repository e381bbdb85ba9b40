"""Tiles of a network's kernels: products of inputs of one fixed shape, then layers on strips that stay in cache."""

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from ntkpipe.base.arrays import FloatArray, runs
from ntkpipe.infinite.layers import Layer
from ntkpipe.infinite.state import Kept, Rows, Spare, State, sliced

# BLAS sums entries of products of one shape in one order, wherever they lie and whichever factor is the left one; other
# shapes go through other kernels, whose last bits differ.
EDGE = 256
STRIP = 8192  # entries of Σ in a strip: 64 KiB
_BLOCK = 1 << 17  # entries of Σ in a block of pairs of images


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


def own_state(samples: FloatArray, copies: int, scale: float) -> State:
    """Σ of samples with themselves before the first layer, with the bits that :func:`pair_state` gives."""
    if copies == 0:
        s = np.concatenate([product(part := samples[run], part).diagonal() for run in runs(len(samples), EDGE)])
    elif copies == 1:
        pixels = samples.reshape(-1, samples.shape[-1])
        flat = [product(part := pixels[run], part).diagonal() for run in runs(len(pixels), EDGE)]
        s = np.concatenate(flat).reshape(samples.shape[:-1])
    else:
        flat_samples = samples.reshape(len(samples), -1, samples.shape[-1])
        s = np.stack([product(each, each) for each in flat_samples])
        s = s.reshape(len(samples), *samples.shape[1:-1], *samples.shape[1:-1])
    s = s * scale
    return State(s, np.zeros_like(s), is_own=True, fan_in=samples.shape[-1])


def pair_state(left: FloatArray, right: FloatArray, copies: int, scale: float, spare: Spare) -> State:
    """Σ of pairs before the first layer."""
    n, m, sizes, channels = len(left), len(right), left.shape[1:-1], left.shape[-1]
    if copies == 0:
        s = product(left, right)
    elif copies == 1:
        s = np.empty((n, m, *sizes))
        for at in np.ndindex(*sizes):
            rows, columns = (np.ascontiguousarray(each[(slice(None), *at)]) for each in (left, right))
            s[(..., *at)] = product(rows, columns)
    else:
        pixels = prod(sizes)
        flat = product(left.reshape(-1, channels), right.reshape(-1, channels))
        s = np.ascontiguousarray(flat.reshape(n, pixels, m, pixels).swapaxes(1, 2)).reshape(n, m, *sizes, *sizes)
    s *= scale
    return State(s, np.zeros_like(s), is_own=False, fan_in=channels, spare=spare)


def fill(
    layers: Sequence[Layer], rows: Rows, columns: Rows, *, copies: int, scale: float, nngp: FloatArray, ntk: FloatArray
) -> None:
    """Compute both kernels of samples into arrays; where rows are the columns, upper blocks alone, and mirror them."""
    spare = Spare()
    for at, across in blocks(rows, columns, copies):
        state = pair_state(rows.samples[at], columns.samples[across], copies, scale, spare)
        right = sliced(columns.kept, across)
        left = sliced(rows.kept, at)
        tall = len(state.s) if copies else max(1, STRIP // state.s.shape[1])
        for run in runs(len(state.s), tall):
            strip = State(state.s[run], state.theta[run], is_own=False, fan_in=state.fan_in, spare=spare)
            through(layers, strip, sliced(left, run), right)
            into = slice(at.start + run.start, at.start + run.stop)
            nngp[into, across], ntk[into, across] = strip.s, strip.theta
        if rows is columns and at != across:
            nngp[across, at], ntk[across, at] = nngp[at, across].T, ntk[at, across].T


def blocks(rows: Rows, columns: Rows, copies: int) -> Iterator[tuple[slice, slice]]:
    """Runs of samples whose pairs are computed together."""
    edge = EDGE
    if copies:
        edge = max(1, int((_BLOCK / prod(rows.samples.shape[1:-1]) ** copies) ** 0.5))
    for at in runs(len(rows), edge):
        for across in runs(len(columns), edge):
            if rows is not columns or at.start <= across.start:
                yield at, across


def through(layers: Sequence[Layer], state: State, left: Kept, right: Kept) -> None:
    """Take a state through all layers."""
    for layer, first, second in zip(layers, left, right, strict=True):
        layer.apply(state, first, second)
