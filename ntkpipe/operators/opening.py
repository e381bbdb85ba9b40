"""Operators for what users have: a stored kernel, an array, or already an operator."""

from typing import TYPE_CHECKING, Any

from ntkpipe.base.arguments import checked
from ntkpipe.base.config import Budget, MemoryLimit, check_number
from ntkpipe.base.errors import ResourceError
from ntkpipe.base.given import is_in_slices, require_opened, require_square
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import num_cores
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.operators.products import ProductOperator
from ntkpipe.operators.streaming import StreamingOperator
from ntkpipe.operators.tiles import ArrayTiles, TileReader, buffer_bytes, tiles_of
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelSet

if TYPE_CHECKING:
    from distributed import Client


def matrix_of(given: Any, name: str = "the matrix") -> Any:
    """An operator, or what has tiles: a stored kernel, or an array that is read in slices."""
    if isinstance(given, KernelSet):
        given = given.train
    if isinstance(given, Operator | Kernel):
        return given
    require_opened(name, given)
    if is_in_slices(given):
        require_square(name, tuple(given.shape))
        return given
    has_products = hasattr(given, "shape") and hasattr(given, "__matmul__") and not hasattr(given, "__array__")
    return ProductOperator(given, name) if has_products else DenseOperator(given, name=name)


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
        A symmetric stored kernel, such as ``store.train``, or a store, for that; an array in memory: NumPy's, or what
        becomes one, such as lists, tensors and data frames; a memory map or an array of another library's store, such
        as a ``zarr.Array``; a matrix of :mod:`scipy.sparse` or a :class:`scipy.sparse.linalg.LinearOperator`, whose
        entries, where they are needed, are products with unit vectors; or an operator, which is returned as it is.
        Options are for what is stored, and ignored for others. An array in memory is not copied, so it must not
        change meanwhile. It may differ from its transpose by rounding: products then take it as it is, direct solvers
        its upper triangle. Of what is stored the upper tiles of 2,048 rows are read, and their mirrors are not.
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
        If the matrix is not symmetric, not of real numbers, or not opened yet (a path, a group); if entries are masked;
        if an option is out of range, or the client is no Dask client.
    NonFiniteError
        If an array holds NaN or infinity.
    TileError
        From the operator, where a ``zarr.Array`` lacks chunks, which would read as its fill value; it names them.
    ResourceError
        If the limit leaves no room for the tiles in use.
    ClusterError
        If the cluster has no workers, or a worker that cannot be used.
    """
    matrix = matrix_of(matrix)
    if isinstance(matrix, Operator):
        return matrix
    source = tiles_of(matrix)
    assert source is not None
    if isinstance(source, ArrayTiles):
        source.require_upper()
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
    matrix = matrix_of(matrix)
    if isinstance(matrix, Operator):
        return matrix, budget
    share = budget.half() if keep_tiles else budget
    try:
        return as_operator(matrix, memory_limit=share, threads=threads, keep_tiles=keep_tiles), share
    except ResourceError:
        return as_operator(matrix, memory_limit=Budget(), threads=1, keep_tiles=False), budget
