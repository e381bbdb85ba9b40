"""How wide the panels of a factor may be, by memory."""

from itertools import chain

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ResourceError
from ntkpipe.base.resources import format_bytes, memory_room
from ntkpipe.solvers.direct.panels import Shape
from ntkpipe.solvers.direct.triangular import solve_bytes

# Beyond it the 32-bit indices of scipy's BLAS come near, and nothing is gained.
_WIDEST = 32768
_WIDTH_IN_MEMORY, _WIDER_IN_MEMORY = 1024, 2048
# So many panels, if they are not narrow, are checkpoints close enough to each other.
_NUM_CHECKPOINTS = 8
_WIDTHS = (2048, 256, 32, 1)


def room_for_panels(memory_limit: int | None) -> int:
    """Bytes that may be allocated."""
    if memory_limit is not None:
        check_number("memory_limit", memory_limit, low=1)
    return memory_room(memory_limit)


def shape_in_memory(num_rows: int, panel_width: int | None, room: int, num_threads: int) -> Shape:
    """How a factor in memory is cut."""
    default = _WIDTH_IN_MEMORY if num_rows < 8 * _WIDER_IN_MEMORY else _WIDER_IN_MEMORY
    shape = Shape.of_width(num_rows, panel_width or default)
    needed = shape.factor_bytes + shape.working_bytes() + num_threads * solve_bytes(shape.width)
    if needed > room:
        raise ResourceError(
            f"the Cholesky factor of {num_rows:,} rows needs {format_bytes(needed)} of memory; {format_bytes(room)} "
            "may be used. Give path=, a folder: the factor is then written there in panels that fit"
        )
    return shape


def bytes_of_panel(shape: Shape, num_threads: int) -> int:
    """Memory of a factorisation whose panels go to files."""
    return (
        8 * shape.num_rows * min(shape.width, shape.num_rows)
        + shape.working_bytes()
        + num_threads * solve_bytes(shape.width)
    )


def widest_shape(num_rows: int, room: int, num_threads: int) -> Shape:
    """The widest panels that fit, whole tiles of the usual size where that is possible; at least one column."""
    most = min(num_rows, _WIDEST, max(_WIDTHS[0], -(-num_rows // _NUM_CHECKPOINTS)))
    multiples = ([most] if most == num_rows else [], *(range(most // step * step, 0, -step) for step in _WIDTHS))
    for width in chain(*multiples):
        shape = Shape.of_width(num_rows, width)
        if bytes_of_panel(shape, num_threads) <= room:
            return shape
    return Shape.of_width(num_rows, 1)
