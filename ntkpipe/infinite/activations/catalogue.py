"""Activations by name, or as a pair of functions."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError, nearest
from ntkpipe.infinite.activations import closed
from ntkpipe.infinite.activations.dual import Dual
from ntkpipe.infinite.activations.hermite import Function, Series

Given: TypeAlias = str | tuple[Function, Function]


def _sigmoid(x: FloatArray) -> FloatArray:
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * x))


def _silu_slope(x: FloatArray) -> FloatArray:
    share = _sigmoid(x)
    return share * (1.0 + x * (1.0 - share))


# Name → its dual, from the parameter behind the colon, if any.
CLOSED: dict[str, Callable[..., Dual]] = {
    "relu": lambda: closed.Rectifier("relu", 0.0),
    "leaky_relu": lambda slope=0.01: closed.Rectifier(f"leaky_relu:{slope!r}", slope),
    "abs": lambda: closed.Rectifier("abs", -1.0),
    "erf": closed.Erf,
    "gelu": closed.Gelu,
    "sin": lambda: closed.Wave("sin"),
    "cos": lambda: closed.Wave("cos"),
    "identity": closed.Identity,
}
# Name → function, derivative, kinks of either.
SERIES: dict[str, tuple[Function, Function, tuple[float, ...]]] = {
    "tanh": (np.tanh, lambda x: 1.0 - np.tanh(x) ** 2, ()),
    "sigmoid": (_sigmoid, lambda x: _sigmoid(x) * _sigmoid(-x), ()),
    "softplus": (lambda x: np.logaddexp(0.0, x), _sigmoid, ()),
    "silu": (lambda x: x * _sigmoid(x), _silu_slope, ()),
    "gaussian": (lambda x: np.exp(-x * x), lambda x: -2.0 * x * np.exp(-x * x), ()),
    "elu": (lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))), lambda x: np.exp(np.minimum(x, 0.0)), (0.0,)),
    "hardtanh": (lambda x: np.clip(x, -1.0, 1.0), lambda x: (np.abs(x) < 1.0) * 1.0, (-1.0, 1.0)),
}
KNOWN = (*CLOSED, *SERIES)


def dual_of(given: Given, kinks: Sequence[float], tolerance: float, name: str | None) -> Dual:
    """The dual of an activation; raises ConfigError for one that is unknown."""
    if not isinstance(given, str):
        if not (isinstance(given, tuple | list) and len(given) == 2 and all(map(callable, given))):
            raise ConfigError(f"activation={given!r}; needed a name ({', '.join(KNOWN)}), or functions (f, df)")
        return Series(name or "of a pair", *given, tuple(kinks), tolerance)
    known, _, parameter = given.partition(":")
    if known not in KNOWN:
        raise ConfigError(
            f"unknown activation {given!r}{nearest(known.lower(), KNOWN)} (known: {', '.join(KNOWN)}, or (f, df))"
        )
    if kinks:
        raise ConfigError(f"kinks={kinks} of {given!r}, whose kinks are known; give them with functions (f, df)")
    if known in SERIES and not parameter:
        function, derivative, places = SERIES[known]
        return Series(known, function, derivative, places, tolerance)
    try:
        slope = [check_number(f"slope of {given!r}", float(parameter), low=-1e100, high=1e100)] if parameter else []
        return CLOSED[known](*slope)
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"activation {given!r}; needed a name alone, or leaky_relu with its slope, 'leaky_relu:0.1'"
        ) from None
