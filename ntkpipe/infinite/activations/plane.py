"""E[f(u) f(v)] of one Gaussian pair by quadrature in two dimensions, for pairs that a series is too slow for."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from ntkpipe.base.arrays import runs
from ntkpipe.infinite.activations.dual import TINY
from ntkpipe.infinite.activations.rules import REACH, cut, panels, trapezoid

Function: TypeAlias = Callable[[Any], Any]

_WIDEST = 0.64  # step that integrates the density alone to 10⁻²⁰
_AT_ONCE = 1 << 17  # nodes, of 1 MiB
_LADDER = np.array([-8.0, -6.0, -4.5, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.5, 6.0, 8.0])


def smooth(functions: Sequence[Function], p: float, q: float, c: float, step: float) -> list[float]:
    """By the trapezoidal rule along u/√p + v/√q and u/√p − v/√q; ``step`` is one that suffices where c = 1."""
    along, across = math.sqrt((1.0 + c) / 2.0), math.sqrt((1.0 - c) / 2.0)
    first, second = (trapezoid(min(_WIDEST, step / scale) if scale > 0.0 else _WIDEST) for scale in (along, across))
    gap, found = across * second[0], np.zeros(len(functions))
    for run in runs(len(first[0]), max(1, _AT_ONCE // len(gap))):
        total, weights = along * first[0][run, None], first[1][run]
        u, v = math.sqrt(p) * (total + gap), math.sqrt(q) * (total - gap)
        found += [np.sum(np.sum(f(u) * f(v) * second[1], axis=1) * weights) for f in functions]
    return found.tolist()


def kinked(functions: Sequence[Function], kinks: Sequence[float], p: float, q: float, c: float) -> list[float]:
    """By panels between kinks: of v given u, and of u, where the former changes fast, too."""
    rest = math.sqrt((1.0 - c) * (1.0 + c))
    at = np.array(kinks)
    own, others = (at / math.sqrt(max(each, TINY)) for each in (p, q))
    # The mean over v given u changes where c u passes a kink, over the standard deviation of v given u.
    centres = others / c if abs(c) > 0.1 else np.zeros(0)
    steps = (centres[:, None] + rest * _LADDER).reshape(-1)
    nodes, weights = panels(cut(0.88, np.concatenate([own, steps])))
    if rest == 0.0:
        return [float(np.sum(f(math.sqrt(p) * nodes) * f(math.sqrt(q) * c * nodes) * weights)) for f in functions]
    borders = np.clip((others - c * nodes[:, None]) / rest, -REACH, REACH)
    ends = np.sort(np.concatenate([np.full((len(nodes), 1), -REACH), borders, np.full((len(nodes), 1), REACH)], axis=1))
    parts = np.linspace(0.0, 1.0, 13)
    edges = (ends[:, :-1, None] + np.diff(ends)[..., None] * parts[:-1]).reshape(len(nodes), -1)
    within, inner = panels(np.concatenate([edges, ends[:, -1:]], axis=1))
    v = math.sqrt(q) * (c * nodes[:, None] + rest * within)
    return [float(np.sum(f(math.sqrt(p) * nodes) * np.sum(f(v) * inner, axis=1) * weights)) for f in functions]
