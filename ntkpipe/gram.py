"""Two Jacobian blocks become a part of a tile: pieces are contracted, turned sample-major, and mirrored."""

from collections.abc import Callable, Iterator

from torch import Tensor

from ntkpipe.jacobian.block import Block
from ntkpipe.jacobian.contract import Pairs, contract
from ntkpipe.jacobian.factors import Piece
from ntkpipe.jacobian.workspace import Workspace


def fill_tile(
    left: Block,
    right: Block,
    tile: Tensor,
    *,
    row: int,
    column: int,
    num_covectors: int,
    pairs: Pairs,
    is_mirrored: bool,
    workspace: Workspace,
    pause: Callable[[], None],
) -> None:
    """Write the Gram entries of two strips into a tile, sample-major.

    Parameters
    ----------
    left, right
        Strips of the tile's row and column samples.
    tile
        Host tensor (tile rows, tile rows) in the store dtype.
    row, column
        First sample of each strip, counted from the tile's.
    num_covectors, pairs
        Rows a sample, and which pairs of covectors are contracted.
    is_mirrored
        Whether the tile lies on the diagonal of a symmetric kernel: then each pair of pieces is computed once, on or
        above the diagonal, and copied below, so that the tile is symmetric to the last bit.
    workspace
        Scratch of the calling thread.
    pause
        Called between pieces; may raise to stop the work.
    """
    for left_start, one in _placed(left, row):
        for right_start, other in _placed(right, column):
            if is_mirrored and right_start < left_start:
                continue
            pause()
            top, side = left_start * num_covectors, right_start * num_covectors
            height, width = one.num_samples * num_covectors, other.num_samples * num_covectors
            place = tile[top : top + height, side : side + width]
            contract(one, other, workspace, pairs, out=place)
            if is_mirrored and left_start != right_start:
                tile[side : side + width, top : top + height] = place.T


def _placed(block: Block, start: int) -> Iterator[tuple[int, Piece]]:
    """Pieces of a block with the position of their first sample."""
    for piece in block.pieces:
        yield start, piece
        start += piece.num_samples
