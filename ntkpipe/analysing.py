"""Analyses applied to a store, each a step of a workflow file by its name."""

from collections.abc import Callable, Mapping

from ntkpipe.solvers.result import Result

# By the names of steps, which are those of results.
ANALYSES: Mapping[str, Callable[..., Result]] = {}
