"""How results come to say how they were found: options, work, seconds, matrix; written in one place for all solvers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

from ntkpipe.base.arguments import bound, options_of, parameters_of
from ntkpipe.base.budget import Budget
from ntkpipe.base.docstrings import ERRORS, completed
from ntkpipe.operators.opening import open_for_solver
from ntkpipe.solvers.result import Result

P = ParamSpec("P")
R = TypeVar("R", bound=Result)

# First parameters that are opened as operators.
MATRICES = ("matrix", "kernel")


def recorded(
    *, keep_tiles: bool | Callable[[Mapping[str, Any]], bool] = True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a solver or an analysis: its arguments are checked, its matrix opened, its result says how it was found.

    A first parameter ``matrix`` or ``kernel`` arrives as an :class:`Operator`, and ``memory_limit`` as the
    :class:`Budget` that is left beside its tiles; ``keep_tiles``, which may depend on the arguments, says whether these
    are worth keeping for another pass.

    The matrix is refused if squares of its entries leave float64, see :meth:`Operator.require_range`.

    The function begins with ``operator: Operator = matrix`` and ``budget = Budget.of(memory_limit)``. ``options`` of
    its result become the plain arguments, updated by those that it returns; ``work`` and ``seconds`` are added to what
    it returns, such as those of an earlier process.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        first = next(iter(parameters_of(function)))

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            begin, given = perf_counter(), bound(function, args, kwargs)
            options = {name: _as_json(given[name]) for name in options_of(function)}
            if "memory_limit" in given:
                budget = Budget.of(given["memory_limit"])
                options["memory_limit"] = budget.limit
                given["memory_limit"] = budget
            operator = None
            if first in MATRICES:
                threads: Any = given.get("threads")
                keep = keep_tiles if isinstance(keep_tiles, bool) else keep_tiles(given)
                operator, budget = open_for_solver(given[first], budget, keep_tiles=keep, threads=threads)
                given |= {first: operator, "memory_limit": budget}
                before = operator.work
                operator.require_range()
            result = function(**given)  # type: ignore[call-arg]
            of_matrix: dict[str, Any] = {}
            if operator is not None:
                of_matrix = {"matrix": operator.identity(), "work": result.work + (operator.work - before)}
            seconds = result.seconds + perf_counter() - begin
            return replace(result, options={**options, **result.options}, seconds=seconds, **of_matrix)

        call.__doc__ = completed(function, ERRORS)
        return call

    return decorate


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
