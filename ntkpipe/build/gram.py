"""Fill a part of a tile from two Jacobian blocks: contract their pieces, and mirror them on the diagonal."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from ntkpipe.jacobian.engine import Block
from ntkpipe.jacobian.model.device import is_out_of_memory, release_memory
from ntkpipe.jacobian.representations.contract import Pairs, contract_planes
from ntkpipe.jacobian.representations.factors import Piece
from ntkpipe.jacobian.representations.workspace import Workspace


def fill_tile(
    left: Block,
    right: Block,
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
    """Write the Gram entries of two strips into the tile of every plane, sample-major.

    Where memory runs out, pieces are halved; the size that was reached is returned, for the next call.
    """

    def is_filled() -> bool:
        # The parts of a piece that meets itself must be the same objects on both sides.
        lefts = list(_placed(left, row, most))
        rights = lefts if right is left and row == column else list(_placed(right, column, most))
        try:
            for left_start, one in lefts:
                for right_start, other in rights:
                    if is_mirrored and right_start < left_start:
                        continue
                    pause()
                    top, side = left_start * num_covectors, right_start * num_covectors
                    height, width = one.num_samples * num_covectors, other.num_samples * num_covectors
                    places = [tile[top : top + height, side : side + width] for tile in tiles]
                    contract_planes(one, other, workspace, pairs, places)
                    if is_mirrored and left_start != right_start:
                        for tile, place in zip(tiles, places, strict=True):
                            tile[side : side + width, top : top + height] = place.T
        except Exception as error:
            if not is_out_of_memory(error) or all(piece.num_samples == 1 for _, piece in (*lefts, *rights)):
                raise
            return False
        return True

    while not is_filled():
        largest = max(piece.num_samples for block in (left, right) for piece in block.pieces)
        most = max(1, min(largest, most or largest) // 2)
        workspace.clear()
        release_memory()
    return most


def _placed(block: Block, start: int, most: int | None) -> Iterator[tuple[int, Piece]]:
    """Pieces of a block, or parts of at most ``most`` samples, each with the position of its first sample."""
    for piece in block.pieces:
        size = piece.num_samples
        if most is None or size <= most:
            yield start, piece
        else:
            for first in range(0, size, most):
                yield start + first, piece.part(first, min(first + most, size))
        start += size
