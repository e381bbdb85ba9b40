"""Arguments of public functions, checked by the annotations of their parameters: names, and types of plain values."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, wraps
from inspect import Parameter, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ntkpipe.base.errors import ArgumentError, ConfigError

P = ParamSpec("P")
T = TypeVar("T")

_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "text", Path: "a path", NoneType: "None"}
_PLURALS = {int: "integers", float: "numbers", str: "texts"}
_VALUES = (bool, int, float, str, Path, list, tuple, dict, np.generic, np.ndarray, NoneType)
_STRICT = ConfigDict(strict=True)


def plain_part(annotation: Any) -> Any:
    """The part of an annotation that JSON has: numbers, text, truth values, paths, lists of these; or None.

    Of ``Literal["a"] | SomeClass`` it is the former. Anything that arrays may be given for has no plain part.
    """
    if annotation in _NAMES or get_origin(annotation) is Literal:
        return annotation
    origin, members = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        parts = [part for part in map(plain_part, members) if part is not None]
        return None if bytes in members or set(parts) <= {NoneType} else Union[tuple(parts)]  # noqa: UP007
    is_list = isinstance(origin, type) and issubclass(origin, Sequence | Mapping)
    return annotation if is_list and all(one is ... or plain_part(one) is not None for one in members) else None


@cache
def parameters_of(function: Callable[..., Any]) -> Mapping[str, Parameter]:
    """Parameters by name."""
    return signature(function).parameters


@cache
def options_of(function: Callable[..., Any]) -> Mapping[str, Parameter]:
    """The parameters that take plain values, annotated with just these."""
    found = {name: plain_part(one.annotation) for name, one in parameters_of(function).items()}
    return {
        name: parameters_of(function)[name].replace(annotation=part) for name, part in found.items() if part is not None
    }


def check_options(options: Mapping[str, Parameter], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The given values, numpy's converted to Python's; raises ConfigError for one of another type."""
    return {
        name: _checked(f"{where}: {name}", value, options[name]) if name in options else value
        for name, value in given.items()
    }


def _checked(name: str, value: Any, parameter: Parameter) -> Any:
    annotation = parameter.annotation
    plain = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    plain = list(plain) if isinstance(plain, range) else plain
    if plain is parameter.default:
        return plain
    try:
        return _adapter(annotation).validate_python(plain)
    except ValidationError:
        raise ConfigError(f"{name}={plain!r}; needed {describe(annotation)}") from None


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=_STRICT)


def describe(annotation: Any) -> str:
    """What an annotation takes, in words."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _joined([repr(one) for one in members])
    if origin in (Union, UnionType):
        return _joined([describe(one) for one in members])
    if annotation in _NAMES:
        return _NAMES[annotation]
    return f"a list of {_PLURALS.get(members[0], 'values')}"


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def require_known(names: Iterable[str], known: Iterable[str], where: str, what: str) -> None:
    """Raise for the first name that is none of the known ones, and say which is the nearest."""
    allowed = list(known)
    for name in names:
        if name not in allowed:
            close = get_close_matches(name, allowed, n=1, cutoff=0.0)
            nearest = f"; the nearest is {close[0]!r}" if close else ""
            raise ArgumentError(f"{where} has no {what} {name!r}{nearest} (known: {', '.join(allowed)})")


def bound(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in, checked."""
    where, parameters = f"{function.__name__}()", parameters_of(function)
    require_known(kwargs, parameters, where, "argument")
    call = signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    options = options_of(function)
    # Where an annotation has other parts, too, these are the function's to check.
    plain = {
        name: value
        for name, value in call.arguments.items()
        if name in options and (isinstance(value, _VALUES) or parameters[name].annotation == options[name].annotation)
    }
    return {**call.arguments, **check_options(options, plain, where)}


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check names of arguments and types of plain ones before a function is called.

    An unknown name raises ArgumentError with the nearest one, a value of another type ConfigError with what is needed.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(**bound(function, args, kwargs))  # type: ignore[call-arg]

    return call
