"""What operators of stored tiles share, wherever the tiles are read."""

from abc import abstractmethod
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.operator import Operator, Statistics
from ntkpipe.operators.tiles import Columns, Measure, Rectangle


class TiledOperator(Operator):
    """A symmetric matrix of tiles."""

    @abstractmethod
    def _gather(self, request: Columns | Rectangle, shape: tuple[int, int]) -> NDArray[np.float64]:
        """What is asked for, from the tiles that it touches."""

    def _columns(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        return self._gather(Columns(indices), (self.num_rows, len(indices)))

    def _block(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        return self._gather(Rectangle(rows, columns), (rows.stop - rows.start, columns.stop - columns.start))


def join_measures(parts: Iterable[Measure], num_rows: int) -> Statistics:
    """Statistics of a matrix from those of its shards, in their order."""
    diagonal, squared = np.empty(num_rows), 0.0
    for part in parts:
        squared += part.squared
        for start, values in part.diagonals:
            diagonal[start : start + len(values)] = values
    return Statistics(diagonal, squared**0.5)
