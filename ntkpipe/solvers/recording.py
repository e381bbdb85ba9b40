"""How results come to say how they were found: options, work, seconds, matrix; written in one place for all solvers."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

from ntkpipe.base.arguments import bound, options_of, parameters_of
from ntkpipe.base.budget import Budget
from ntkpipe.operators.opening import open_for_solver
from ntkpipe.solvers.result import Result

P = ParamSpec("P")
R = TypeVar("R", bound=Result)

# First parameters that are opened as operators.
MATRICES = ("matrix", "kernel")


def recorded(*, keep_tiles: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a solver or an analysis: its arguments are checked, its matrix opened, its result says how it was found.

    A first parameter ``matrix`` or ``kernel`` arrives as an :class:`Operator`, and ``memory_limit`` as the
    :class:`Budget` that is left beside its tiles; ``keep_tiles`` says whether these are worth keeping for another pass.

    The function begins with ``operator: Operator = matrix`` and ``budget = Budget.of(memory_limit)``, and returns its
    result without ``options``, ``work``, ``seconds`` and ``matrix``. They become the plain
    arguments with defaults filled in, updated by ``options`` that the function does return, such as resolved ones;
    products with the matrix and time, added to what it returns, such as those of an earlier process; and the identity
    of the matrix.
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
                operator, given["memory_limit"] = open_for_solver(
                    given[first], budget, keep_tiles=keep_tiles, threads=threads
                )
                given[first], before = operator, operator.work
            result = function(**given)  # type: ignore[call-arg]
            found: dict[str, Any] = {"options": {**options, **result.options}}
            if operator is not None:
                found["work"] = result.work + (operator.work - before)
                found["matrix"] = operator.identity()
            return replace(result, seconds=result.seconds + perf_counter() - begin, **found)

        return call

    return decorate


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
