"""Arguments of public functions: checked by the annotations of parameters, and described once where many share them."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, wraps
from inspect import Parameter, cleandoc, signature
from pathlib import Path
from textwrap import fill, shorten
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ntkpipe.base.config import Budget
from ntkpipe.base.errors import ArgumentError, ConfigError
from ntkpipe.base.given import plain_value

P = ParamSpec("P")
T = TypeVar("T")

_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "text", Path: "a path", NoneType: "None"}
_PLURALS = {int: "integers", float: "numbers", str: "texts"}
_VALUES = (bool, int, float, str, Path, list, tuple, dict, np.generic, np.ndarray, NoneType, range, set, complex, bytes)
_STRICT = ConfigDict(strict=True)
_MOST_SHOWN = 200  # characters of a value in a message
_MOST = 2**31 - 1  # of rows, passes, threads; more is a mistake, and arrays of such sizes fail with errors of others


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


@dataclass(frozen=True)
class Option:
    """A parameter that takes plain values."""

    name: str
    annotation: Any  # of these
    default: Any  # `Parameter.empty` where one must be given
    is_open: bool  # whether objects may be given, too, which the function itself checks

    @property
    def is_required(self) -> bool:
        """Whether there is no default."""
        return self.default is Parameter.empty

    def check(self, value: Any, where: str) -> Any:
        """The value, numpy's converted to Python's; raises ConfigError for one of another type."""
        if self.name == "memory_limit":
            Budget.of(value)
            return value
        plain = value if value is self.default else plain_value(value)
        if value is self.default or (self.is_open and not isinstance(plain, _VALUES)):
            return value
        try:
            found = _adapter(self.annotation).validate_python(plain)
        except ValidationError:
            shown = shorten(" ".join(repr(plain).split()), _MOST_SHOWN, placeholder=" …")
            raise ConfigError(f"{where}: {self.name}={shown}; needed {describe(self.annotation)}") from None
        for number in found if isinstance(found, list | tuple) else (found,):
            self._require_range(number, where)
        return found

    def _require_range(self, number: Any, where: str) -> None:
        """Integers but seeds are counts, and other numbers are not negative; where less will do, functions say so."""
        if isinstance(number, bool) or not isinstance(number, int | float):
            return
        is_count = isinstance(number, int) and float not in _types_of(self.annotation)
        low, high = (1 if is_count else 0), (_MOST if is_count else math.inf)
        if self.name == "seed":
            low, high = 0, math.inf
        is_finite = self.name == "times" or is_count or number < math.inf
        if not (low <= number <= high and is_finite):
            kind = "an integer" if is_count else "a finite number"
            above = f"to {high}" if number > high else "on"
            raise ConfigError(f"{where}: {self.name}={number}; needed {kind} from {low} {above}")

    def read(self, text: str) -> Any:
        """The value that text on a command line stands for; the parts of a list have commas between them."""
        value = text.split(",") if any(map(is_list, members_of(self.annotation))) else text
        try:
            return TypeAdapter(self.annotation).validate_python(value)
        except ValidationError:
            raise ConfigError(f"{text!r}; needed {describe(self.annotation)}") from None


def members_of(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def is_list(annotation: Any) -> bool:
    """Whether an annotation is that of a list or a tuple."""
    origin = get_origin(annotation)
    return isinstance(origin, type) and issubclass(origin, Sequence)


@cache
def options_of(function: Callable[..., Any]) -> Mapping[str, Option]:
    """The parameters that take plain values."""
    found = ((name, one, plain_part(one.annotation)) for name, one in parameters_of(function).items())
    return {
        name: Option(name, part, one.default, part != one.annotation) for name, one, part in found if part is not None
    }


def check_options(options: Mapping[str, Option], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The given values, those of options checked."""
    return {name: options[name].check(value, where) if name in options else value for name, value in given.items()}


def _types_of(annotation: Any) -> set[Any]:
    """The plain types in an annotation, those of lists included."""
    members = get_args(annotation) if get_origin(annotation) is not Literal else ()
    return {annotation}.union(*map(_types_of, members)) if members else {annotation}


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=_STRICT)


def describe(annotation: Any) -> str:
    """What an annotation takes, in words."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin in (Literal, Union, UnionType):
        *words, last = [repr(one) if origin is Literal else describe(one) for one in members]
        return f"{', '.join(words)} or {last}" if words else last
    if annotation in _NAMES:
        return _NAMES[annotation]
    return f"a list of {_PLURALS.get(members[0], 'values')}"


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
    try:
        call = signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"{where}: {error}") from None
    call.apply_defaults()
    return check_options(options_of(function), call.arguments, where)


def known_names(function: Callable[P, T]) -> Callable[P, T]:
    """Check names of arguments alone before a function is called; see :func:`checked`."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        known, where = parameters_of(function).keys() - {"self"}, function.__qualname__.removesuffix(".__init__")
        require_known(kwargs, sorted(known), f"{where}()", "argument")
        return function(*args, **kwargs)

    return call


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check names of arguments and types of plain ones before a function is called, and complete its docstring.

    An unknown name raises ArgumentError with the nearest one, a value of another type ConfigError with what is needed.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(**bound(function, args, kwargs))  # type: ignore[call-arg]

    call.__doc__ = completed(function, errors={})
    return call


def with_arguments_of(other: Callable[P, Any]) -> Callable[[Callable[[Mapping[str, Any]], T]], Callable[P, T]]:
    """Decorate a function of arguments by name: they are those of another function, and checked alike."""

    def decorate(function: Callable[[Mapping[str, Any]], T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return function(bound(call, args, kwargs))

        returned = signature(function).return_annotation
        call.__signature__ = signature(other).replace(return_annotation=returned)  # type: ignore[attr-defined]
        return call

    return decorate


# Entries of `Parameters` for those that a docstring does not describe itself.
PARAMETERS = {
    "matrix": "The symmetric matrix K: what :func:`ntkpipe.as_operator` takes.",
    "kernel": "The train kernel K: what :func:`ntkpipe.as_operator` takes. One of N·O rows is a full NTK.",
    "targets": "Labels of classes (N,), which become one-hot, or real targets (N,) or (N, O).",
    "test_kernel": "Test × train kernel (M·S, N·S), array or stored, where predictions are judged.",
    "test_targets": "Targets of the test samples. A class that training does not have counts as wrong.",
    "initial_outputs": "Outputs f₀ of the train samples (N, O), subtracted from targets; default zero.",
    "test_initial_outputs": "Outputs f₀ of the test samples (M, O), added to predictions; default zero.",
    "ridge": "λ ≥ 0, added to the diagonal.",
    "ridge_scale": 'Unit of ridges. None is absolute, ``"mean_diagonal"`` the mean of the diagonal of K.',
    "task": "What targets are. ``auto``: integers, booleans and strings (N,) are labels, whose classes become one-hot "
    "columns; others are real targets. ``classification``: labels, also as floats, or one-hot columns. ``binary``: "
    "labels of two classes that share a column of -1 and +1. ``regression``: numbers, also integers. Targets of test "
    "samples are taken for the same.",
    "rank": "Rank of the preconditioner; default ``min(1000, n/10)``. Iterations fall as it grows.",
    "num_probes": "Number of random vectors, p ≥ 2. The Monte-Carlo error falls like ``1 / sqrt(p)``.",
    "memory_limit": 'Bytes that this process may have, or text such as ``"8GiB"``; default a share of what is free.',
    "seed": "Seed of everything that is random. Equal seeds give equal bits.",
    "monitor": "Called after each pass with a :class:`ntkpipe.solvers.result.Step`; what it raises ends the call.",
    "checkpoint": "Where finished parts are saved; another call for the same calculation goes on behind them.",
    "client": "A ``distributed.Client`` whose workers compute; default threads of this process.",
    "progress": "Show progress on standard error.",
    "model": "A module in eval mode; it is copied. Parameters with ``requires_grad=False`` are left out.",
    "inputs": "N samples: a tensor, array or frame (samples along the first axis), a dict of them (keyword arguments "
    "of the model), or a map-style data set of samples or (sample, target) pairs.",
    "kind": 'Kind of kernel: ``"pntk"``, ``"trace"``, ``"output:k"`` (N x N), ``"diagonal"`` (N x N for each output) '
    'or ``"ntk"`` (N*O x N*O). Conventions are in :mod:`ntkpipe.base.kinds`.',
    "forward": 'Picks the (batch, O) tensor: ``".logits"``, a function of what the model returns, or one of (model, '
    "inputs).",
    "parameters": 'Shell-style patterns of parameter names, such as ``"head.*"``; default all that require a gradient.',
    "compute_dtype": 'dtype of forward pass and Jacobians. ``"tf32"`` is float32 whose products on a GPU may be TF32.',
    "accumulate_dtype": "dtype of products and sums over parameters; default ``compute_dtype``, but at least float32. "
    "Never TF32.",
    "store_dtype": "dtype of the matrix; default ``accumulate_dtype``.",
    "device": 'Where to compute: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; default the first GPU if there is one.',
    "self_check": "Compare the engine with plain autograd on three samples before the first tile.",
    "code": "Folder whose Python files are sent to the workers; needed only for a model defined in one of them.",
    "workers": "Threads, each with single-threaded arithmetic; default one per core. Results do not depend on it.",
    "jacobian": 'How Jacobians are found: ``"structured"``, or ``"fallback"`` for plain ``torch.func`` throughout.',
}
# Entries of `Raises` of all that work on a matrix.
ERRORS = {
    "ConfigError": "If shapes do not fit, an option is out of range, or something is of another calculation.",
    "NonFiniteError": "If the matrix or another array holds NaN or infinity.",
    "ResourceError": "If what is needed does not fit the memory; the message has both numbers.",
    "StoreError": "If the checkpoint is damaged or cannot be written.",
    "TileError": "If a tile of a stored kernel is missing or damaged; the message names it.",
}

_HEADING = re.compile(r"^(\w[\w ]*)\n-{3,}\n", flags=re.M)
_ENTRY = re.compile(r"^(\S.*)\n((?:[ ]{4}.*\n?|\n(?=[ ]{4}))+)", flags=re.M)


def entries(body: str) -> dict[str, str]:
    """Entries of a section such as ``Parameters``: text by name."""
    return {name: " ".join(text.split()) for names, text in _ENTRY.findall(body) for name in names.split(", ")}


def sections(text: str) -> dict[str, str]:
    """Sections of a docstring by name; what precedes them by an empty one."""
    first, *parts = _HEADING.split(cleandoc(text))
    return {"": first, **dict(zip(parts[::2], parts[1::2], strict=True))}


def _filled(text: str) -> str:
    return fill(text, 116, initial_indent="    ", subsequent_indent="    ")


def completed(function: Callable[..., Any], errors: Mapping[str, str]) -> str | None:
    """The docstring of a function with the entries that are the same everywhere, in the order of its signature."""
    found = sections(function.__doc__ or "")
    names = dict.fromkeys(signature(function).parameters)
    if "Parameters" not in found and not names.keys() <= PARAMETERS.keys():
        return function.__doc__
    described = {name: body for name, body in _ENTRY.findall(found.pop("Parameters", ""))}
    blocks = [f"{name}\n{described.get(name) or _filled(PARAMETERS[name])}".rstrip() for name in names]
    raised = {name: body for name, body in _ENTRY.findall(found.pop("Raises", ""))}
    listed = {name for key in raised for name in key.split(", ")}
    missing = (name for name in errors if name not in listed and (name != "StoreError" or "checkpoint" in names))
    raised |= {name: _filled(errors[name]) for name in missing}
    first, returned = found.pop(""), found.pop("Returns", None)
    parts = {"Parameters": "\n".join(blocks)} | ({} if returned is None else {"Returns": returned})
    parts["Raises"] = "\n".join(f"{name}\n{body.rstrip()}" for name, body in raised.items())
    text = "\n\n".join(f"{name}\n{'-' * len(name)}\n{body.strip(chr(10))}" for name, body in (parts | found).items())
    return f"{first.rstrip()}\n\n{text}\n"
