"""The operator of what users have: a stored kernel, an array, or an operator already."""

from typing import Any

import numpy as np

from ntkpipe.config import check_number
from ntkpipe.errors import ResourceError
from ntkpipe.kernel import Kernel
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.operators.operator import Operator
from ntkpipe.operators.reading import TileReader, buffer_bytes
from ntkpipe.operators.streaming import StreamingOperator
from ntkpipe.operators.tiles import ArrayTiles, KernelTiles, TileSource
from ntkpipe.resources import available_memory, format_bytes, num_cores, process_memory

# Of what is free: the rest is for vectors, and for others.
_SHARE_OF_MEMORY = 0.5


def as_operator(matrix: Any, *, memory_limit: int | None = None, threads: int | None = None) -> Operator:
    """The operator of a matrix.

    Parameters
    ----------
    matrix
        A symmetric stored kernel, as ``store.train``; a NumPy array; a memory map or an array of another store, as a
        ``zarr.Array``, whose upper tiles are streamed; or an operator, which is returned as it is.
    memory_limit
        Bytes that this process may have once tiles are kept; default what it has and half of what is free. What does
        not fit is read again in each pass. For a matrix in memory, or an operator, it means nothing.
    threads
        That multiply; default one for each core. No number depends on it.

    Raises
    ------
    ConfigError
        If it is no symmetric matrix, or an option is out of range.
    NonFiniteError
        If an array holds NaN or infinity.
    ResourceError
        If the limit leaves no room for the tiles in use.
    """
    if isinstance(matrix, Operator):
        return matrix
    if isinstance(matrix, Kernel):
        return _stream(KernelTiles(matrix), memory_limit, threads)
    if isinstance(matrix, np.memmap) or hasattr(matrix, "chunks"):
        return _stream(ArrayTiles(matrix), memory_limit, threads)
    return DenseOperator(matrix)


def _stream(source: TileSource, memory_limit: int | None, threads: int | None) -> StreamingOperator:
    if threads is not None:
        check_number("threads", threads, low=1)
    threads = threads or num_cores()
    in_use = buffer_bytes(source, threads)
    if memory_limit is None:
        room = int(_SHARE_OF_MEMORY * available_memory())
    else:
        check_number("memory_limit", memory_limit, low=1)
        room = memory_limit - process_memory()
        if room < in_use:
            raise ResourceError(
                f"memory_limit={format_bytes(memory_limit)}, and this process has {format_bytes(process_memory())}; "
                f"tiles in use by {threads} threads need {format_bytes(in_use)}. Give more memory, or threads=1"
            )
    reader = TileReader(source, source.grid.tiles(), cache_bytes=max(0, room - in_use), streams=threads)
    return StreamingOperator(reader, threads=threads)
