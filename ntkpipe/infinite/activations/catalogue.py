"""Activations by name, or as a pair of functions."""

from collections.abc import Callable
from typing import Any, TypeAlias

from ntkpipe.base.errors import ConfigError, nearest
from ntkpipe.infinite.activations import closed
from ntkpipe.infinite.activations.dual import Dual

Function: TypeAlias = Callable[[Any], Any]
Given: TypeAlias = str | tuple[Function, Function]

# Name → its dual, from the parameter behind the colon, if any.
CLOSED: dict[str, Callable[..., Dual]] = {
    "relu": lambda: closed.Rectifier("relu", 0.0),
    "leaky_relu": lambda slope=0.01: closed.Rectifier(f"leaky_relu:{slope:g}", slope),
    "abs": lambda: closed.Rectifier("abs", -1.0),
    "erf": closed.Erf,
    "gelu": closed.Gelu,
    "sin": lambda: closed.Wave("sin"),
    "cos": lambda: closed.Wave("cos"),
    "identity": closed.Identity,
}


def dual_of(given: Given, kinks: tuple[float, ...], tolerance: float) -> Dual:
    """The dual of an activation; raises ConfigError for an unknown name."""
    name, _, parameter = str(given).partition(":")
    if name not in CLOSED:
        raise ConfigError(f"unknown activation {name!r}{nearest(name, CLOSED)} (known: {', '.join(CLOSED)})")
    return CLOSED[name](float(parameter)) if parameter else CLOSED[name]()
