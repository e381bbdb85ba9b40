"""Cholesky factorisation of matrices that are larger than memory: each panel of the factor is written once."""

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.blas import Pool
from ntkpipe.base.config import Budget, MemoryLimit, RidgeScale, absolute_ridge, check_number
from ntkpipe.base.errors import IndefiniteError, NonFiniteError
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import num_cores
from ntkpipe.solvers.direct.factor import CholeskyFactor
from ntkpipe.solvers.direct.panels import (
    FACTOR_ARRAY,
    FactorFolder,
    FactorState,
    Panels,
    Pivots,
    Shape,
    StoredPanels,
    bytes_in_memory,
    bytes_of_panel,
    require_same,
    usual_shape,
    widest_shape,
)
from ntkpipe.solvers.direct.triangular import ROWS_OF_THREAD, NotPositiveError, factor_in_place
from ntkpipe.solvers.probe_lanczos import lowest_eigenvalue, ridge_of_solves
from ntkpipe.solvers.result import Monitor, Step, ignore, recorded

_MOST_JITTERS = 5
_JITTER_FACTOR = 10.0


@recorded(keep_tiles=False)
def cholesky(
    matrix: Any,
    *,
    ridge: float = 0.0,
    ridge_scale: RidgeScale = None,
    jitter: Literal["auto"] | None = None,
    path: str | Path | None = None,
    memory_limit: MemoryLimit = None,
    panel_width: int | None = None,
    threads: int | None = None,
    monitor: Monitor = ignore,
) -> CholeskyFactor:
    """Factor ``K + ridge I = L L'``, with L in memory or in files.

    Left-looking by panels of columns (Toledo, "A survey of out-of-core algorithms in numerical linear algebra", 1999):
    a panel of K is read, contributions of earlier panels are subtracted, and it is factored and written, once. So K is
    read about once, L is written once and read ``n / (3 panel_width) + 1`` times, and every panel is a checkpoint:
    after a kill the same call continues after the last complete one, to the same bits on the same machine. The cost is
    n³/3 multiplications and additions, nearly all of them in float64 matrix products.

    Parameters
    ----------
    jitter
        ``auto``: if a pivot is not positive, try again with the storage floor added to the diagonal, then ten times as
        much, five times at most. The result says what was added. Default: raise an error.
    path
        A folder, or the URL of an object store, for L: n²/2 float64 numbers in the Zarr array ``cholesky/lower``, whose
        chunks above the diagonal blocks do not exist. A factor of the same matrix and ridge that is already there is
        used or continued. Default: memory, which must hold n²/2 float64 numbers.
    panel_width
        Columns of a panel, of n · panel_width float64 numbers; default with a path as many as memory allows (at most
        n/8 if that is over 2,048), in memory 1,024. A width over 256 is rounded up to a multiple of 256. It affects the
        last bits.
    threads
        Number of threads that multiply; default one per core. No bit depends on it.
    monitor
        Called after each panel. Its ``residual`` is the share of the arithmetic that is left.

    Raises
    ------
    IndefiniteError
        If a pivot is not positive: K + ridge I is not positive definite, or not beyond what rounding of its entries
        hides. The message says where, and which ridge helps.
    StoreMismatchError
        If the path holds the factor of another matrix, or of another ridge.
    StoreError
        If the path holds something else or cannot be written, or another process writes there.
    """
    operator: Operator = matrix
    ridge = absolute_ridge(ridge, ridge_scale, operator.diagonal)
    for name, value in (("panel_width", panel_width), ("threads", threads)):
        if value is not None:
            check_number(name, value, low=1)
    budget = Budget.of(memory_limit)
    task = _Task(operator, ridge, jitter, panel_width, threads or num_cores(), budget, monitor)
    with _opened(task, path):
        (_factor_with_jitter if jitter == "auto" else _factor)(task)
    return _result(task)


def factor_for_solves(operator: Operator, ridge: float, tol: float, **how: Any) -> CholeskyFactor:
    """The factor; an error advises a ridge with which systems are solved to ``tol``, too."""
    try:
        return cholesky(operator, ridge=ridge, **how)
    except IndefiniteError as error:
        raise error.advising(ridge_of_solves(operator, tol)) from None


def bytes_of_cholesky(num_rows: int) -> int:
    """Memory of a factor that is not in files while it is made: ``4 n²`` bytes and some panels."""
    return bytes_in_memory(usual_shape(num_rows, None))


@dataclass
class _Task:
    """One factorisation, as it was asked for, and its progress."""

    operator: Operator
    ridge: float
    jitter: str | None
    panel_width: int | None
    num_threads: int
    budget: Budget
    monitor: Monitor
    panels: Panels = field(init=False)
    state: FactorState = field(init=False)
    resumed: int = 0  # panels that were complete at the start
    path: str | None = None
    save: Callable[[FactorState], None] = lambda state: None

    def require(self, num_bytes: int, what: str, advice: str) -> None:
        """Check that so many bytes fit beside the tiles in use."""
        self.budget.require(num_bytes + self.operator.buffer_bytes, what, advice, share=0.5)

    def begin(self, shape: Shape) -> FactorState:
        """The state in which nothing is factored."""
        return FactorState(self.operator.identity(), self.ridge, 0.0, shape)


@contextlib.contextmanager
def _opened(task: _Task, path: str | Path | None) -> Iterator[None]:
    """A factorisation in memory, or in a locked folder with what it holds already."""
    if path is None:
        shape = usual_shape(task.operator.num_rows, task.panel_width)
        advice = "give path=, a folder: the factor is then written there in panels that fit"
        task.require(bytes_in_memory(shape), f"the Cholesky factor of {shape.num_rows:,} rows", advice)
        task.panels, task.state = Panels(shape), task.begin(shape)
        yield
        return
    folder = FactorFolder(path)
    with folder.held():
        state = _stored_state(task, folder)
        panels = StoredPanels(state.shape, folder.medium, FACTOR_ARRAY)
        task.resumed = panels.num_complete(len(state.panels))
        panels.require_room(task.resumed)
        task.panels, task.state = panels, replace(state, panels=state.panels[: task.resumed])
        task.path, task.save = folder.root, folder.commit
        yield


def _result(task: _Task) -> CholeskyFactor:
    state, traffic, num_rows = task.state, task.panels.traffic, task.operator.num_rows
    message = f"{num_rows:,} pivots are positive"
    if state.jitter:
        message += f" with a jitter of {state.jitter:.3g}; without it one was not"
    return CholeskyFactor(
        status="converged",
        message=message,
        options={"panel_width": state.shape.width, "threads": task.num_threads},
        num_rows=num_rows,
        ridge=state.ridge,
        jitter=state.jitter,
        logdet=math.fsum(panel.logdet for panel in state.panels),
        smallest_pivot=min(panel.smallest for panel in state.panels),
        largest_pivot=max(panel.largest for panel in state.panels),
        num_panels=state.shape.num_panels,
        panel_width=state.shape.width,
        resumed=task.resumed,
        path=task.path,
        factor_passes=traffic.passes,
        factor_bytes_read=traffic.bytes_read,
        factor_bytes_written=task.panels.bytes_written,
        _panels=task.panels,
        _operator=task.operator,
    )


def _factor_with_jitter(task: _Task) -> None:
    """Try larger and larger jitters until all pivots are positive; panels of a smaller one do not count any more."""
    floor = task.operator.storage_floor()
    allowed = [floor * _JITTER_FACTOR**power for power in range(_MOST_JITTERS)]
    while True:
        try:
            return _factor(task)
        except IndefiniteError:
            larger = [value for value in allowed if value > task.state.jitter]
            if not larger:
                raise
            task.state, task.resumed = replace(task.state, jitter=larger[0], panels=()), 0
            task.save(task.state)


def _factor(task: _Task) -> None:
    shape, before = task.state.shape, task.operator.work
    top = np.empty((shape.width if shape.num_panels > 1 else 0, shape.width))
    scratch = np.empty(shape.height * shape.width)
    with Pool.open(task.num_threads) as pool:
        for number in range(len(task.state.panels), shape.num_panels):
            # In a function of its own: nothing of one panel may stay in memory when the next is read.
            pivots = _factor_panel(task, number, top, scratch, pool)
            task.state = replace(task.state, panels=(*task.state.panels, pivots))
            task.save(task.state)
            task.monitor(Step(task.operator.work - before, _share_left(shape, number), 0.0))


def _factor_panel(task: _Task, number: int, top: FloatArray, scratch: FloatArray, pool: Pool) -> Pivots:
    shape, columns = task.state.shape, task.state.shape.columns(number)
    width = columns.stop - columns.start
    values = task.operator.block(slice(columns.start, shape.num_rows), columns)
    diagonal = np.arange(width)
    values[diagonal, diagonal] += task.state.ridge + task.state.jitter
    _subtract_earlier(task.panels, number, values, top, scratch, pool)
    try:
        triangle = factor_in_place(values[:width], scratch, pool)
    except NotPositiveError as error:
        raise _indefinite_error(task, number, error) from None
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
            wait([future for future in solved if not future.cancel()])
    return Pivots(2.0 * math.fsum(np.log(pivots)), float(pivots.min()) ** 2, float(pivots.max()) ** 2)


def _subtract_earlier(
    panels: Panels, number: int, values: FloatArray, top: FloatArray, scratch: FloatArray, pool: Pool
) -> None:
    """Subtract the contributions of earlier panels from one; ``top`` and ``scratch`` are buffers."""
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
    runs = [shape.columns(number) for number in range(shape.num_panels)]
    costs = [float((shape.num_rows - c.start) * (c.stop - c.start) * (c.start + c.stop)) for c in runs]
    return sum(costs[done + 1 :]) / sum(costs)


def _indefinite_error(task: _Task, number: int, error: NotPositiveError) -> IndefiniteError:
    """What a pivot of a panel that is not positive means; not the pivot tells, but the smallest eigenvalue."""
    state, row = task.state, task.state.shape.columns(number).start + error.row
    added = f"ridge={state.ridge:.4g}" + (f" and a jitter of {state.jitter:.4g}" if state.jitter else "")
    lowest = lowest_eigenvalue(task.operator)
    # At least twice what was added and does not do, should the estimate be wrong.
    ridge, floor = lowest.ridge(2.0 * (state.ridge + state.jitter)), lowest.floor
    found = (
        f"with {added} the leading {row + 1:,} rows are not positive definite: pivot {error.pivot:.4g} in row {row:,}, "
        f"panel {number + 1} of {state.shape.num_panels}; {lowest.words}"
    )
    otherwise = ""
    if state.jitter == 0.0 and ridge <= floor * _JITTER_FACTOR ** (_MOST_JITTERS - 1):
        otherwise = ", or jitter='auto', which adds the storage floor to the diagonal, or some of them, and says so"
    about = {"row": row + 1, "pivot": error.pivot, "floor": floor, "ridge": ridge}
    return IndefiniteError(found, **about, otherwise=otherwise)


def _stored_state(task: _Task, folder: FactorFolder) -> FactorState:
    """The state in the folder if it fits the options, or the one to begin with; it is committed."""
    n, width, threads = task.operator.num_rows, task.panel_width, task.num_threads
    room = task.budget.room() - task.operator.buffer_bytes
    state = folder.load()
    if state is None:
        state = task.begin(Shape.of_width(n, width) if width else widest_shape(n, room, threads))
    else:
        wanted: dict[str, object] = {"matrix": task.operator.identity(), "num_rows": n, "ridge": task.ridge}
        if task.jitter is None:
            wanted["jitter"] = 0.0
        if width is not None:
            wanted["panel_width"] = Shape.of_width(n, width).width
        require_same(state, wanted, folder.root)
    if len(state.panels) < state.shape.num_panels:
        what = f"a panel of {state.shape.width:,} columns"
        task.require(bytes_of_panel(state.shape, threads), what, "give a larger memory_limit")
    folder.commit(state)
    return state
