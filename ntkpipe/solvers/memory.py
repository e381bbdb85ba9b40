"""What solvers take that others advise, in bytes."""

from ntkpipe.solvers.linear.preconditioner import default_rank

_SMALLEST_BLOCK = 8
BLOCKS, FACTORS = 11, 3  # of conjugate gradients: blocks of the shape of right-hand sides, and of the preconditioner
BLOCKS_BESIDE = 3  # of Lanczos, beside the vectors of all steps


def bytes_of_solve(num_rows: int, num_columns: int, rank: int | None = None) -> int:
    """Memory of conjugate gradients for so many right-hand sides, the making of their preconditioner included."""
    rank = default_rank(num_rows) if rank is None else min(rank, num_rows)
    return 8 * num_rows * (FACTORS * rank + BLOCKS * num_columns)


def bytes_of_density(num_rows: int, num_probes: int = 16, num_steps: int = 100) -> int:
    """Memory that ``density`` takes for so many steps; it takes fewer where that is all there is room for."""
    return 8 * num_rows * num_probes * (num_steps + BLOCKS_BESIDE)


def bytes_of_eigsh(num_rows: int, k: int = 100, *, block: int | None = None, max_basis: int | None = None) -> int:
    """Memory that ``eigsh`` takes for n rows: 11 k vectors at the defaults for large k."""
    width, most = sizes_of_eigsh(num_rows, k, block, max_basis)
    return 8 * num_rows * (most + 4 * width + 3 * k)


def sizes_of_eigsh(num_rows: int, k: int, block: int | None, max_basis: int | None) -> tuple[int, int]:
    """Columns of a pass of ``eigsh``, and most vectors of its basis."""
    width = min(num_rows, max(_SMALLEST_BLOCK, -(-k // 2)) if block is None else block)
    return width, min(num_rows, max(5 * k + 2 * width, 8 * width) if max_basis is None else max_basis)
