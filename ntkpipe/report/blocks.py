"""Means of blocks of a stored kernel whose samples are put in an order: one pass, two small matrices in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.targets import Targets
from ntkpipe.store.kernel import Kernel

BinLabels = NDArray[np.int64]

_MOST_BINS = 300  # a screen shows no more


@dataclass(frozen=True)
class Arrangement:
    """Samples in the order in which a picture shows them."""

    bins: BinLabels  # shape (N,): the row of the picture in which each sample is
    num_bins: int  # rows of the picture
    # Shape (N,): the number of each sample's class among :attr:`names`; none if targets are no classes
    classes: BinLabels | None
    names: tuple[str, ...]  # labels of classes
    bounds: tuple[int, ...]  # where one class ends and the next begins, in samples
    order: str  # what decides the order, in words


def arrange(targets: Targets | None, num_samples: int) -> Arrangement:
    """By class, or by the one target, or as stored; where samples are many, neighbours share a row."""
    names: tuple[str, ...] = ()
    bounds: tuple[int, ...] = ()
    classes, order = None, "as stored"
    key: NDArray[Any] = np.arange(num_samples)
    if targets is not None and targets.classes is not None and targets.codes is not None:
        names, order = tuple(map(str, targets.classes.tolist())), "sorted by class"
        key = classes = targets.codes
        bounds = tuple(int(end) for end in np.bincount(classes).cumsum()[:-1])
    elif targets is not None and targets.matrix.shape[1] == 1:
        key, order = targets.matrix[:, 0], "sorted by target"
    num_bins = min(num_samples, _MOST_BINS)
    bins = np.empty(num_samples, np.int64)
    bins[np.argsort(key, kind="stable")] = np.arange(num_samples) * num_bins // num_samples
    return Arrangement(bins, num_bins, classes, names, bounds, order)


def block_means(kernel: Kernel, groupings: Sequence[tuple[BinLabels, int]]) -> list[FloatArray]:
    """Mean entry of each pair of groups of samples, for one or more groupings; one pass over the stored tiles.

    Entries of a sample with itself are left out where a group has others. Of a full NTK the entry of two samples is the
    mean of their block's diagonal.
    """
    sums = [np.zeros((count, count)) for _, count in groupings]
    diagonal = np.zeros(kernel.grid.rows.num_samples)
    for row, column in kernel.grid.tiles():
        tile = _by_sample(kernel.read_stored(row, column), kernel.num_covectors)
        at = [slice(span.start, span.stop) for span in map(kernel.grid.rows.samples, (row, column))]
        for total, (labels, count) in zip(sums, groupings, strict=True):
            pairs = labels[at[0], None] * count + labels[at[1]]
            part = np.bincount(pairs.ravel(), tile.ravel(), count * count).reshape(count, count)
            total += part if row == column else part + part.T
        if row == column:
            diagonal[at[0]] = tile.diagonal()
    return [_mean(total, diagonal, labels) for total, (labels, _) in zip(sums, groupings, strict=True)]


def _by_sample(tile: NDArray[Any], width: int) -> FloatArray:
    blocks = tile.astype(np.float64).reshape(tile.shape[0] // width, width, tile.shape[1] // width, width)
    return np.asarray(blocks.trace(axis1=1, axis2=3) / width, np.float64)


def _mean(total: FloatArray, diagonal: FloatArray, labels: BinLabels) -> FloatArray:
    """Sums over numbers of entries; a group of one sample has its diagonal entry alone."""
    sizes = np.bincount(labels, minlength=len(total)).astype(np.float64)
    counts, alone = np.outer(sizes, sizes), sizes == 1
    own = np.bincount(labels, diagonal, minlength=len(total))
    np.fill_diagonal(total, np.where(alone, own, total.diagonal() - own))
    np.fill_diagonal(counts, np.where(alone, 1.0, sizes * (sizes - 1)))
    return np.asarray(total / np.maximum(counts, 1.0), np.float64)
