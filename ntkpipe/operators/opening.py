"""The operator of what users have: a stored kernel, an array, or an operator already."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ResourceError
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import format_bytes, half_of_room, memory_room, num_cores, process_memory
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.operators.reading import TileReader, buffer_bytes
from ntkpipe.operators.streaming import StreamingOperator
from ntkpipe.operators.tiles import ArrayTiles, KernelTiles, TileSource
from ntkpipe.store.kernel import Kernel

if TYPE_CHECKING:
    from distributed import Client


def as_operator(
    matrix: Any,
    *,
    memory_limit: int | None = None,
    threads: int | None = None,
    client: "Client | None" = None,
    keep_tiles: bool = True,
) -> Operator:
    """The operator of a matrix.

    Parameters
    ----------
    matrix
        A symmetric stored kernel, as ``store.train``; a NumPy array; a memory map or an array of another store, as a
        ``zarr.Array``, whose upper tiles are streamed; or an operator, which is returned as it is.
    memory_limit
        Bytes that this process may have in a pass: tiles in use, products, and as many tiles that are kept as there is
        room for beside them; what does not fit is read again in each pass. Default for tiles what it has and half of
        what is free; the rest is for products. For a matrix in memory, or an operator, it means
        nothing. With a client: of each worker; default 60 % of what its Dask gives it.
    threads
        That multiply; default one for each core. No number depends on it. With a client: of each worker; default those
        of its Dask.
    client
        Of a Dask cluster whose workers read and keep the tiles of a stored matrix; results have the same bits. For a
        matrix in memory, or an operator, it means nothing.
    keep_tiles
        Whether tiles that fit are kept for further passes; who reads each of them once has better uses of memory. With
        a client it means nothing.

    Raises
    ------
    ConfigError
        If it is no symmetric matrix, an option is out of range, or the client is none.
    NonFiniteError
        If an array holds NaN or infinity.
    ResourceError
        If the limit leaves no room for the tiles in use.
    ClusterError
        If the cluster has no workers, or one of no use.
    """
    if isinstance(matrix, Operator):
        return matrix
    if isinstance(matrix, Kernel):
        return _open(KernelTiles(matrix), memory_limit, threads, client, keep_tiles)
    if isinstance(matrix, np.memmap) or hasattr(matrix, "chunks"):
        return _open(ArrayTiles(matrix), memory_limit, threads, client, keep_tiles)
    return DenseOperator(matrix)


def open_for_solver(matrix: Any, memory_limit: int | None) -> tuple[Operator, int | None]:
    """The operator of a matrix, and the limit for the solver: half of the room is for tiles that this call opens."""
    if memory_limit is not None:
        check_number("memory_limit", memory_limit, low=1)
    if isinstance(matrix, Operator | np.ndarray) and not isinstance(matrix, np.memmap):
        return as_operator(matrix), memory_limit
    share = half_of_room(memory_limit)
    return as_operator(matrix, memory_limit=share), share


def _open(
    source: TileSource, memory_limit: int | None, threads: int | None, client: "Client | None", keep_tiles: bool
) -> Operator:
    if client is not None:
        from ntkpipe.operators.on_dask.operator import WorkersOperator  # keeps distributed out of work on one machine

        return WorkersOperator(source, client, memory_limit=memory_limit, threads=threads)
    if threads is not None:
        check_number("threads", threads, low=1)
    threads = threads or num_cores()
    in_use = buffer_bytes(source, threads)
    if memory_limit is not None:
        check_number("memory_limit", memory_limit, low=1)
    room = memory_room(memory_limit)
    if memory_limit is not None and room < in_use:
        raise ResourceError(
            f"memory_limit={format_bytes(memory_limit)}, and this process has {format_bytes(process_memory())}; "
            f"tiles in use by {threads} threads need {format_bytes(in_use)}. Give more memory, or threads=1"
        )
    cache_bytes = max(0, room - in_use) if keep_tiles else 0
    reader = TileReader(source, source.grid.tiles(), cache_bytes=cache_bytes, streams=threads)
    return StreamingOperator(reader, threads=threads, room=None if memory_limit is None else room - in_use)
