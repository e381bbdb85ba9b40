"""Operators for what users have: a stored kernel, an array, or already an operator."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ntkpipe.base.arguments import checked
from ntkpipe.base.config import Budget, MemoryLimit, check_number
from ntkpipe.base.errors import ResourceError
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import num_cores
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.operators.streaming import StreamingOperator
from ntkpipe.operators.tiles import TileReader, buffer_bytes, tiles_of

if TYPE_CHECKING:
    from distributed import Client


@checked
def as_operator(
    matrix: Any,
    *,
    memory_limit: MemoryLimit = None,
    threads: int | None = None,
    client: "Client | None" = None,
    keep_tiles: bool = True,
) -> Operator:
    """Open a symmetric matrix as an operator, whose products with blocks of columns are float64.

    Parameters
    ----------
    matrix
        A symmetric stored kernel, such as ``store.train``; a NumPy array; a memory map or an array of another store,
        such as a ``zarr.Array``, whose upper tiles are streamed; or an operator, which is returned as it is. For an
        array in memory and for an operator all options are ignored.
    memory_limit
        Bytes that this process may have during a pass: tiles in use, products, and as many cached tiles as there is
        room for beside them; others are read again in each pass. Default for tiles: what the process has and half of
        what is free; the rest is for products. With a client: of each worker; default 60 % of what Dask gives it.
    threads
        Number of threads that multiply; default one per core. No number depends on it. With a client: of each worker;
        default the number that Dask gave it.
    client
        Client of a Dask cluster whose workers read and cache the tiles of a stored matrix; results have the same bits.
    keep_tiles
        Whether to cache tiles that fit for further passes; a caller that reads each tile once has better uses of
        memory. Ignored with a client.

    Raises
    ------
    ConfigError
        If the matrix is not symmetric, an option is out of range, or the client is no Dask client.
    NonFiniteError
        If an array holds NaN or infinity.
    ResourceError
        If the limit leaves no room for the tiles in use.
    ClusterError
        If the cluster has no workers, or a worker that cannot be used.
    """
    if isinstance(matrix, Operator):
        return matrix
    if (source := tiles_of(matrix)) is None:
        return DenseOperator(matrix)
    budget = Budget.of(memory_limit)
    if client is not None:
        from ntkpipe.operators.on_dask.operator import WorkerGroup, WorkersOperator  # distributed is slow to import

        return WorkersOperator(WorkerGroup(client, source, worker_bytes=budget.limit, threads=threads))
    threads = num_cores() if threads is None else int(check_number("threads", threads, low=1))
    in_use = buffer_bytes(source, threads)
    if budget.limit is not None:
        budget.require(in_use, f"what {threads} threads read at a time", "give a larger memory_limit, or threads=1")
    room = budget.room() - in_use
    reader = TileReader(source, source.grid.tiles(), cache_bytes=max(0, room) if keep_tiles else 0, streams=threads)
    return StreamingOperator(source, reader, threads=threads, room=None if budget.limit is None else room)


def open_for_solver(
    matrix: Any, budget: Budget, *, keep_tiles: bool = True, threads: int | None = None
) -> tuple[Operator, Budget]:
    """Open a matrix for a solver, and say what is left of its budget: half of the room is for tiles that are kept.

    Where the limit has no room for tiles, they are read one at a time, beside what the solver takes.
    """
    if isinstance(matrix, Operator | np.ndarray) and not isinstance(matrix, np.memmap):
        return as_operator(matrix), budget
    share = budget.half() if keep_tiles else budget
    try:
        return as_operator(matrix, memory_limit=share, threads=threads, keep_tiles=keep_tiles), share
    except ResourceError:
        return as_operator(matrix, memory_limit=Budget(), threads=1, keep_tiles=False), budget
