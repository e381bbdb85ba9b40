"""Two Jacobian blocks become a part of a tile: pieces are contracted, turned sample-major, and mirrored."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ntkpipe.jacobian.engine import JacobianBlock
from ntkpipe.jacobian.model.device import is_out_of_memory, release_memory
from ntkpipe.jacobian.representations.contract import contract_planes
from ntkpipe.jacobian.representations.pieces import Piece
from ntkpipe.jacobian.representations.sums import Pairs
from ntkpipe.jacobian.representations.workspace import Workspace


@dataclass
class Gram:
    """Contracts the strips of one worker; where memory runs out, it halves the pieces from then on."""

    num_covectors: int
    pairs: Pairs
    pause: Callable[[], None]
    most: int | None = None  # samples of a piece, if there is a limit
    workspace: Workspace = field(default_factory=Workspace)

    def fill(
        self, left: JacobianBlock, right: JacobianBlock, tiles: Sequence[Tensor], row: int, column: int, mirror: bool
    ) -> None:
        """Write the Gram entries of two strips into the tile of every plane, sample-major."""
        while True:
            # The parts of a piece that meets itself must be the same objects on both sides.
            lefts = list(self._placed(left, row))
            rights = lefts if right is left and row == column else list(self._placed(right, column))
            try:
                for rows, one in lefts:
                    for columns, other in rights:
                        if mirror and columns.start < rows.start:
                            continue
                        self.pause()
                        parts = [tile[rows, columns] for tile in tiles]
                        contract_planes(one, other, self.workspace, self.pairs, parts)
                        if mirror and columns != rows:
                            for tile in tiles:
                                tile[columns, rows] = tile[rows, columns].T
            except Exception as error:
                if not is_out_of_memory(error) or all(piece.num_samples == 1 for _, piece in (*lefts, *rights)):
                    raise
            else:
                return
            # Not in the handler: the error keeps the frames of the failed attempt alive, and so their tensors.
            largest = max(piece.num_samples for block in (left, right) for piece in block.pieces)
            self.most = max(1, min(largest, self.most or largest) // 2)
            self.workspace.clear()
            release_memory()

    def _placed(self, block: JacobianBlock, start: int) -> Iterator[tuple[slice, Piece]]:
        """Pieces of a block, or parts of at most ``most`` samples, with their rows in the tile."""
        width = self.num_covectors
        for piece in block.pieces:
            size = piece.num_samples
            step = min(size, self.most or size)
            for first in range(0, size, step):
                part = piece if step == size else piece.part(first, min(first + step, size))
                place = start + first
                yield slice(place * width, (place + part.num_samples) * width), part
            start += size
