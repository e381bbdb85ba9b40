"""Cholesky factorisation of matrices that are larger than memory: each panel of the factor is written once."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError, IndefiniteError, NonFiniteError, ResourceError
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import format_bytes, num_cores
from ntkpipe.operators.opening import as_operator
from ntkpipe.solvers.direct.factor import CholeskyFactor
from ntkpipe.solvers.direct.factor_folder import FactorFolder, FactorState, Pivots, require_same
from ntkpipe.solvers.direct.fitting import bytes_of_panel, room_for_panels, shape_in_memory, widest_shape
from ntkpipe.solvers.direct.panels import Panels, PanelsInMemory, Shape, require_room
from ntkpipe.solvers.direct.pool import Pool
from ntkpipe.solvers.direct.triangular import ROWS_OF_THREAD, NotPositiveError, factor_in_place
from ntkpipe.solvers.result import Monitor, Step, ignore

_MOST_JITTERS = 5
_JITTER_FACTOR = 10.0


def cholesky(
    matrix: Any,
    *,
    ridge: float = 0.0,
    jitter: Literal["auto"] | None = None,
    path: str | Path | None = None,
    memory_limit: int | None = None,
    panel_width: int | None = None,
    threads: int | None = None,
    monitor: Monitor = ignore,
) -> CholeskyFactor:
    """The Cholesky factor of ``K + ridge I``, in memory or in files.

    Left-looking by panels of columns: a panel of K is read, what all panels before it contribute is subtracted, and it
    is factored and written, once. So K is read about once and stays as it is, L is written once and read
    ``n / (3 panel_width) + 1`` times, and every panel is a checkpoint: after a kill the same call goes on after the
    last whole one, to the same bits on the same machine. n³/3 multiplications and additions, nearly all of them in
    float64 matrix products. (Toledo, "A survey of out-of-core algorithms in numerical linear algebra", 1999, describes
    left-looking panels; here L is stored beside K, and K is never overwritten.)

    Parameters
    ----------
    matrix
        An operator, a stored kernel or a symmetric array; see :func:`ntkpipe.as_operator`.
    ridge
        λ that is added to the diagonal.
    jitter
        ``auto``: if a pivot is not positive, try again with the storage floor added to the diagonal, and ten times as
        much, five times at most. What was needed is in the result. Default: an error.
    path
        A folder, or the URL of an object store, for L: n²/2 float64 numbers in the Zarr array ``cholesky/lower``, whose
        chunks above the diagonal blocks are not there. A factor of the same matrix and ridge that is there is used or
        continued. Default memory, which must hold n²/2 float64 numbers.
    memory_limit
        Bytes that this process may have; default what it has and half of what is free. A panel has n · panel_width
        float64 numbers; diagonal blocks and chunks on their way are counted, too.
    panel_width
        Columns of a panel; default with a path as many as memory allows (at most n/8 if that is over 2,048), in memory
        1,024. What is over 256 becomes a multiple of it. It sets the last bits.
    threads
        That multiply; default one for each core. No bit depends on it.
    monitor
        Called after each panel. Its ``residual`` is the share of the arithmetic that is left.

    Raises
    ------
    ConfigError
        If it is no symmetric matrix, or an option is out of range.
    IndefiniteError
        If a pivot is not positive: K + ridge I is not positive definite, or not beyond what rounding of its entries
        hides. The message says where, and which ridge helps.
    NonFiniteError
        If the matrix holds NaN or infinity.
    ResourceError
        If the factor or a panel does not fit memory, or the factor does not fit the disk; with the numbers.
    StoreMismatchError
        If the path holds the factor of another matrix, or of another ridge.
    StoreError
        If the path holds something else or cannot be written, or another process writes there.
    TileError
        If a part of the matrix or of L is missing or damaged; the message names it.
    """
    start = perf_counter()
    ridge = float(check_number("ridge", ridge, low=0.0))
    if not math.isfinite(ridge):
        raise ConfigError(f"ridge={ridge!r}; needed a finite number")
    if jitter not in {None, "auto"}:
        raise ConfigError(f"jitter={jitter!r}; needed 'auto' or None")
    if panel_width is not None:
        check_number("panel_width", panel_width, low=1)
    if threads is not None:
        check_number("threads", threads, low=1)
    num_threads = threads or num_cores()
    operator = as_operator(matrix, memory_limit=memory_limit, threads=threads, keep_tiles=False)
    room = room_for_panels(memory_limit) - operator.buffer_bytes
    work = operator.work
    with contextlib.ExitStack() as stack:
        if path is None:
            shape = shape_in_memory(operator.num_rows, panel_width, room, num_threads)
            task = _Task(
                operator,
                PanelsInMemory(shape),
                FactorState(operator.identity(), ridge, 0.0, shape),
                monitor,
                num_threads,
            )
        else:
            folder = FactorFolder(path)
            stack.enter_context(folder.held())
            state = _stored_state(folder, operator, ridge, jitter, panel_width, room, num_threads)
            panels = folder.panels(state.shape)
            state = state.up_to(panels.num_complete(len(state.panels)))
            task = _Task(operator, panels, state, monitor, num_threads, folder.commit)
        resumed = len(task.state.panels)
        if path is not None:
            require_room(task.state.shape, folder.medium, resumed)
        attempts = _factor_with_jitter(task) if jitter == "auto" else _factor_once(task)
    state, traffic = task.state, task.panels.traffic
    message = f"{operator.num_rows:,} pivots are positive"
    if state.jitter:
        message += f" with a jitter of {state.jitter:.3g}; without it one was not"
    return CholeskyFactor(
        status="converged",
        message=message,
        work=operator.work - work,
        seconds=perf_counter() - start,
        options={
            "ridge": ridge,
            "jitter": jitter,
            "path": None if path is None else str(path),
            "memory_limit": memory_limit,
            "panel_width": state.shape.width,
            "threads": num_threads,
        },
        matrix=state.matrix,
        num_rows=operator.num_rows,
        ridge=ridge,
        jitter=state.jitter,
        logdet=math.fsum(panel.logdet for panel in state.panels),
        smallest_pivot=min(panel.smallest for panel in state.panels),
        largest_pivot=max(panel.largest for panel in state.panels),
        num_panels=state.shape.num_panels,
        panel_width=state.shape.width,
        resumed=resumed if attempts == 1 else 0,
        path=None if path is None else folder.root,
        factor_passes=traffic.passes,
        factor_bytes_read=traffic.bytes_read,
        factor_bytes_written=traffic.bytes_written,
        _panels=task.panels,
        _operator=operator,
    )


@dataclass
class _Task:
    """One factorisation as far as it is."""

    operator: Operator
    panels: Panels
    state: FactorState
    monitor: Monitor
    num_threads: int
    save: Callable[[FactorState], None] = lambda state: None

    def begin(self, jitter: float) -> None:
        """Start over with another jitter; panels that are there do not count any more."""
        self.state = FactorState(self.state.matrix, self.state.ridge, jitter, self.state.shape)
        self.save(self.state)


def _factor_once(task: _Task) -> int:
    _factor(task)
    return 1


def _factor_with_jitter(task: _Task) -> int:
    """Try larger and larger jitters, and say how many tries there were."""
    floor = task.operator.storage_floor()
    allowed = [floor * _JITTER_FACTOR**power for power in range(_MOST_JITTERS)]
    attempts = 1
    while True:
        try:
            _factor(task)
        except IndefiniteError:
            larger = [value for value in allowed if value > task.state.jitter]
            if not larger:
                raise
            task.begin(larger[0])
            attempts += 1
        else:
            return attempts


def _factor(task: _Task) -> None:
    """All panels that are not there yet."""
    shape, before = task.state.shape, task.operator.work
    top = np.empty((shape.width if shape.num_panels > 1 else 0, shape.width))
    scratch = np.empty(shape.height * shape.width)
    with Pool.open(task.num_threads) as pool:
        for number in range(len(task.state.panels), shape.num_panels):
            # A function of its own: nothing of one panel may outlive it when the next is read.
            found = _factor_panel(task, number, top, scratch, pool)
            task.state = task.state.with_panel(found)
            task.save(task.state)
            task.monitor(Step(task.operator.work - before, _share_left(shape, number), 0.0))


def _factor_panel(
    task: _Task, number: int, top: NDArray[np.float64], scratch: NDArray[np.float64], pool: Pool
) -> Pivots:
    """One panel, read, factored and written."""
    shape, columns = task.state.shape, task.state.shape.columns(number)
    width = columns.stop - columns.start
    values = task.operator.block(slice(columns.start, shape.num_rows), columns)
    diagonal = np.arange(width)
    values[diagonal, diagonal] += task.state.ridge + task.state.jitter
    _subtract_earlier(task.panels, number, values, top, scratch, pool)
    try:
        triangle = factor_in_place(values[:width], scratch, pool)
    except NotPositiveError as error:
        message, floor = _words_of_pivot(task, number, error)
        row = columns.start + error.row + 1
        raise IndefiniteError(message, row=row, pivot=error.pivot, floor=floor) from None
    pivots = values[diagonal, diagonal]
    if not np.isfinite(pivots).all():
        raise NonFiniteError(f"the matrix holds NaN or infinity in or before columns {columns.start}:{columns.stop}")
    starts = range(width, len(values), ROWS_OF_THREAD)
    with task.panels.writing(number, values) as put:
        solved = pool.start(triangle.solve_right, (values[start : start + ROWS_OF_THREAD] for start in starts))
        try:
            for rows in shape.chunks(number):
                first, last = (row - columns.start - width for row in (rows.start, rows.stop))
                for future in solved[max(first, 0) // ROWS_OF_THREAD : -(-max(last, 0) // ROWS_OF_THREAD)]:
                    future.result()
                put(rows)
        finally:
            pool.finish(solved)
    return Pivots(2.0 * math.fsum(np.log(pivots)), float(pivots.min()) ** 2, float(pivots.max()) ** 2)


def _subtract_earlier(
    panels: Panels,
    number: int,
    values: NDArray[np.float64],
    top: NDArray[np.float64],
    scratch: NDArray[np.float64],
    pool: Pool,
) -> None:
    """Subtract what earlier panels contribute to one, ``top`` and ``scratch`` being memory for it."""
    shape = panels.shape
    columns = shape.columns(number)
    width = columns.stop - columns.start
    requests = ((p, rows) for p in range(number) for rows in shape.chunks(p, columns.start))
    with contextlib.closing(panels.read(requests)) as chunks:
        for _, rows, chunk in chunks:
            start, stop = rows.start - columns.start, rows.stop - columns.start
            if start < width:
                top[start:stop] = chunk
            width_here = min(stop, width)
            pool.subtract_product(values[start:stop, :width_here], chunk, top[:width_here], scratch)


def _share_left(shape: Shape, done: int) -> float:
    """Share of the arithmetic that is left after panel ``done``."""

    def cost(number: int) -> float:
        columns = shape.columns(number)
        width = columns.stop - columns.start
        return float((shape.num_rows - columns.start) * width * (2 * columns.start + width))

    costs = [cost(number) for number in range(shape.num_panels)]
    return sum(costs[done + 1 :]) / sum(costs)


def _words_of_pivot(task: _Task, number: int, error: NotPositiveError) -> tuple[str, float]:
    """What to say of a pivot that is not positive, and the storage floor."""
    state, row = task.state, task.state.shape.columns(number).start + error.row
    floor = task.operator.storage_floor()
    added = f"ridge={state.ridge:.4g}" + (f" and a jitter of {state.jitter:.4g}" if state.jitter else "")
    if error.pivot < -_MOST_JITTERS * _JITTER_FACTOR * floor:
        why = "which is more than rounding explains: the matrix is not positive semi-definite"
    else:
        why = "so it is indefinite at storage precision"
    message = (
        f"with {added} the leading {row + 1:,} rows are not positive definite: pivot {error.pivot:.4g} in row {row:,}, "
        f"panel {number + 1} of {state.shape.num_panels}. Rounding of entries to {task.operator.storage_dtype} moves "
        f"eigenvalues by about {floor:.3g} (the storage floor), {why}. Give a ridge of at least {floor:.3g}, or "
        "jitter='auto', which adds that to the diagonal and says so"
    )
    return message, floor


def _stored_state(
    folder: FactorFolder,
    operator: Operator,
    ridge: float,
    jitter: str | None,
    panel_width: int | None,
    room: int,
    num_threads: int,
) -> FactorState:
    """The state in the folder, or the one to begin with."""
    n, identity = operator.num_rows, operator.identity()
    state = folder.load()
    if state is None:
        shape = Shape.of_width(n, panel_width) if panel_width else widest_shape(n, room, num_threads)
        state = FactorState(identity, ridge, 0.0, shape)
    else:
        asked: dict[str, object] = {"matrix": identity, "num_rows": n, "ridge": ridge}
        if jitter is None:
            asked["jitter"] = 0.0
        if panel_width is not None:
            asked["panel_width"] = Shape.of_width(n, panel_width).width
        require_same(state, asked, folder.root)
    is_complete = len(state.panels) == state.shape.num_panels
    needed = bytes_of_panel(state.shape, num_threads)
    if needed > room and not is_complete:
        raise ResourceError(
            f"a panel of {state.shape.width:,} columns needs {format_bytes(needed)} of memory; {format_bytes(room)} "
            "may be used. Give a larger memory_limit"
        )
    folder.commit(state)
    return state
