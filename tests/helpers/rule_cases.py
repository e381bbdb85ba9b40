"""Small models around one operation each, by which rules are tested, and how a case is checked.

Sizes are chosen so that no two dimensions are equal unless that is what a case is about; batches have seven samples,
probes fewer. What a case's ``may_fall_back`` does not match has a rule; everything is exact, with or without one.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import FunctionType
from typing import Any

import pytest
import torch
from engines import check_every_parameter, fallback_of
from reference import Custom, redraw
from torch import nn

from ntkpipe.jacobian.tracing.rules.table import RULES

L = nn.Linear


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids_of(*shape, high=11, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


B = 7
X = drawn(B, 6)  # samples, features
T = drawn(B, 4, 6)  # samples, tokens, features
U = drawn(B, 2, 4, 6)  # samples, windows, tokens, features
SIGNAL, IMAGE, VOLUME = drawn(B, 4, 9), drawn(B, 4, 8, 9), drawn(B, 4, 5, 6, 8)  # samples, channels, positions
IDS = ids_of(B, 4)


@dataclass(frozen=True, eq=False)
class Case:
    """A model, its inputs, and shell patterns of the parameters that need not have a rule."""

    make: Any
    inputs: Any
    may_fall_back: tuple[str, ...] = ()


def case(function, inputs=X, /, may=(), **members):
    """A case of a forward pass over members: modules and parameters, or functions that make them."""

    def make():
        made = {name: value() if isinstance(value, FunctionType) else value for name, value in members.items()}
        return Custom(function, **made)

    return Case(make, inputs, (may,) if isinstance(may, str) else tuple(may))


def param(*shape):
    return nn.Parameter(torch.zeros(shape, dtype=torch.float64))


def frozen(module, *names):
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def read(values, outputs=5):
    """(samples, outputs) that depend on every entry, so that no position looks like another."""
    flat = torch.tanh(values).flatten(1)
    mix = torch.cos(torch.arange(flat.shape[1] * outputs, dtype=flat.dtype) * 1.3).view(-1, outputs)
    return flat @ (mix / math.sqrt(flat.shape[1]))


def time_first(m, x):
    return read(m.a(x.transpose(0, 1)).transpose(0, 1))


def folded(m, x):
    return read(m.a(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


def plain(m, x):
    return read(m.a(x))


def hidden(m, x):
    """The operation on something that requires a gradient."""
    return read(m.a(torch.tanh(m.h(x))))


def read_first(m, x):
    return read(m.a(x)[:, 0], 3)


def positions(x):
    return torch.arange(x.shape[1], device=x.device)


@functools.cache
def outcome(one):
    """The fallback's parameters of a case that is exact, and the functions whose rule applied; raises if it is not."""
    applied = set()

    def note(func, rule, *args, **kwargs):
        bound = rule(*args, **kwargs)
        if bound is not None:
            applied.add(func)
        return bound

    with pytest.MonkeyPatch.context() as patch:
        for func, rule in list(RULES.items()):
            patch.setitem(RULES, func, functools.partial(note, func, rule))
        engine = check_every_parameter(redraw(one.make().double()), one.inputs)
    return tuple(fallback_of(engine)), applied


def without_rule(one):
    """Parameters of a case that are in the fallback although they have a rule."""
    return [name for name in outcome(one)[0] if not any(fnmatchcase(name, pattern) for pattern in one.may_fall_back)]


def never_applied(rules, cases: Iterable[Case]):
    """Torch functions whose rule applies in none of the cases."""
    applied = set().union(*(outcome(one)[1] for one in cases))
    return [func for func in rules if func not in applied]
