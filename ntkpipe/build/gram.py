"""Two Jacobian blocks become a part of a tile: pieces are contracted, turned sample-major, and mirrored."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from ntkpipe.jacobian.engine import JacobianBlock
from ntkpipe.jacobian.model.device import is_out_of_memory, release_memory
from ntkpipe.jacobian.representations.pieces import Piece, contract_planes
from ntkpipe.jacobian.representations.sums import Pairs, Workspace


def fill_tile(
    left: JacobianBlock,
    right: JacobianBlock,
    tiles: Sequence[Tensor],
    *,
    row: int,
    column: int,
    num_covectors: int,
    pairs: Pairs,
    is_mirrored: bool,
    workspace: Workspace,
    pause: Callable[[], None],
    most: int | None = None,
) -> int | None:
    """Write the Gram entries of two strips into the tile of every plane, sample-major."""
    # Where memory runs out, pieces are halved; the result is the most samples of a piece, if there is a limit.
    while True:
        # The parts of a piece that meets itself must be the same objects on both sides.
        lefts = list(_placed(left, row, most, num_covectors))
        rights = lefts if right is left and row == column else list(_placed(right, column, most, num_covectors))
        try:
            for rows, one in lefts:
                for columns, other in rights:
                    if is_mirrored and columns.start < rows.start:
                        continue
                    pause()
                    contract_planes(one, other, workspace, pairs, [tile[rows, columns] for tile in tiles])
                    if is_mirrored and columns != rows:
                        for tile in tiles:
                            tile[columns, rows] = tile[rows, columns].T
        except Exception as error:
            if not is_out_of_memory(error) or all(piece.num_samples == 1 for _, piece in (*lefts, *rights)):
                raise
        else:
            return most
        # Not in the handler: the error keeps the frames of the failed attempt alive, and so their tensors.
        largest = max(piece.num_samples for block in (left, right) for piece in block.pieces)
        most = max(1, min(largest, most or largest) // 2)
        workspace.clear()
        release_memory()


def _placed(block: JacobianBlock, start: int, most: int | None, num_covectors: int) -> Iterator[tuple[slice, Piece]]:
    """Pieces of a block, or parts of at most ``most`` samples, with their rows in the tile."""
    for piece in block.pieces:
        size = piece.num_samples
        for first in range(0, size, most or size):
            part = piece if most is None or size <= most else piece.part(first, min(first + most, size))
            place = start + first
            yield slice(place * num_covectors, (place + part.num_samples) * num_covectors), part
        start += size
