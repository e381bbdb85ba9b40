"""The operator of an analysis, and the memory of its parts, where a limit may be less than streaming needs."""

from typing import Any

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ResourceError
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import process_memory
from ntkpipe.operators.opening import as_operator, open_for_solver

# Beside what is counted.
_NOISE_BYTES = 2**24


def open_for_analysis(matrix: Any, memory_limit: int | None) -> tuple[Operator, int | None]:
    """The operator of a matrix and the limit for what is computed; tiles are not kept where the limit has no room."""
    if memory_limit is not None:
        check_number("memory_limit", memory_limit, low=1)
    try:
        return open_for_solver(matrix, memory_limit)
    except ResourceError:
        return as_operator(matrix, keep_tiles=False, threads=1), memory_limit


def at_least(memory_limit: int | None, num_bytes: int) -> int | None:
    """A limit for a solver that needs so many bytes: the given one, or what this process then has."""
    return None if memory_limit is None else max(memory_limit, process_memory() + num_bytes + _NOISE_BYTES)
