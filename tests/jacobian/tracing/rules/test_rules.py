"""Every operation that has a rule, with all its options, against the slow reference, parameter by parameter.

Each case is a small model around one operation. Sizes are chosen so that no two dimensions are equal unless that is
what the case is about; batches have seven samples, probes fewer. What a case's ``may_fall_back`` does not match has a
rule; everything is exact, with or without one.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engines import check_every_parameter, fallback_of
from reference import Custom, draw_statistics, redraw
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from ntkpipe.jacobian.tracing.rules.table import RULES

# The fallback warns about its loop, torch about old-style hooks; none of it is tested here.
pytestmark = pytest.mark.filterwarnings("ignore")

# Whether parameters that have a rule must not go to the fallback.
CHECK_COVERAGE = True

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


@dataclass(frozen=True)
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


CASES = {}

# --- linear ---------------------------------------------------------------------------------------------------------

for bias in (True, False):
    b = "" if bias else ", no bias"
    CASES |= {
        f"linear, one row{b}": case(plain, X, a=L(6, 5, bias=bias)),
        f"linear, one output{b}": case(lambda m, x: torch.tanh(m.a(x)), X, a=L(6, 1, bias=bias)),
        f"linear, second layer{b}": case(hidden, X, h=L(6, 5), a=L(5, 3, bias=bias)),
        f"linear, batch first{b}": case(plain, T, a=L(6, 5, bias=bias)),
        f"linear, time first{b}": case(time_first, T, a=L(6, 5, bias=bias)),
        f"linear, folded{b}": case(folded, T, a=L(6, 5, bias=bias)),
        f"linear, windows{b}": case(plain, U, a=L(6, 5, bias=bias)),
        f"linear, windows first{b}": case(
            lambda m, x: read(m.a(x.transpose(0, 1)).transpose(0, 1)), U, a=L(6, 5, bias=bias)
        ),
        f"linear, windows folded{b}": case(folded, U, a=L(6, 5, bias=bias)),
        f"linear, samples in the middle{b}": case(
            lambda m, x: read(m.a(x.permute(1, 0, 2, 3)).permute(1, 0, 2, 3)), U, a=L(6, 5, bias=bias)
        ),
        f"linear, samples last but one{b}": case(
            lambda m, x: read(m.a(x.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)), U, a=L(6, 5, bias=bias)
        ),
        f"linear, first token read{b}": case(read_first, T, a=L(6, 5, bias=bias)),
        f"linear, channels of an image{b}": case(
            lambda m, x: read(m.a(x.permute(0, 2, 3, 1))), IMAGE, a=L(4, 5, bias=bias)
        ),
        f"linear, twice{b}": case(lambda m, x: read(m.a(torch.tanh(m.a(x)))), X, a=L(6, 6, bias=bias)),
        f"linear, twice, unlike positions{b}": case(
            lambda m, x: read(torch.cat([m.a(x), m.a(x.mean(1, keepdim=True)), m.a(x[:, :3])], 1)),
            T,
            a=L(6, 5, bias=bias),
        ),
        f"linear, batch and time first{b}": case(
            lambda m, x: read(m.a(x) + m.a(x.transpose(0, 1)).transpose(0, 1) ** 2), T, a=L(6, 5, bias=bias)
        ),
    }
    for tokens in (1, 3, 5, 7, 15, 35):  # as many as the batch, as the probes, as their least common multiple
        CASES |= {
            f"linear, batch first, {tokens} tokens{b}": case(plain, drawn(B, tokens, 2), a=L(2, 4, bias=bias)),
            f"linear, time first, {tokens} tokens{b}": case(time_first, drawn(B, tokens, 2), a=L(2, 4, bias=bias)),
            f"linear, folded, {tokens} tokens{b}": case(folded, drawn(B, tokens, 2), a=L(2, 4, bias=bias)),
        }
    CASES[f"linear, everything is seven{b}"] = case(
        lambda m, x: read(m.a(torch.tanh(m.a(x.transpose(0, 1)))).transpose(0, 1), 7), drawn(B, 7, 7), a=L(7, 7, bias)
    )


def gated(m, x):
    with torch.no_grad():
        gate = torch.sigmoid(m.a(x))
    return read(gate * torch.tanh(m.a(x)))


CASES |= {
    "linear, bias frozen": case(plain, X, a=frozen(L(6, 5), "bias")),
    "linear, weight frozen": case(plain, T, a=frozen(L(6, 5), "weight")),
    "linear, one bias for two weights": case(
        lambda m, x: read(F.linear(x, m.v, m.b) * F.linear(x, m.w, m.b)), T, v=param(5, 6), w=param(5, 6), b=param(5)
    ),
    "linear, one weight with two biases": case(
        lambda m, x: read(F.linear(x, m.w, m.b) * F.linear(x, m.w, m.c)), T, w=param(5, 6), b=param(5), c=param(5)
    ),
    "linear, one weight with and without bias": case(
        lambda m, x: read(F.linear(x, m.w, m.b) * F.linear(x, m.w)), T, w=param(5, 6), b=param(5)
    ),
    "linear, by name": case(lambda m, x: read(F.linear(bias=m.b, weight=m.w, input=x)), X, w=param(5, 6), b=param(5)),
    "linear, under no_grad too": case(gated, T, a=L(6, 5)),
    "linear, detached": case(lambda m, x: read(F.linear(x, m.w.detach(), m.b)), T, w=param(5, 6), b=param(5)),
    "linear, detached once": case(
        lambda m, x: read(F.linear(x, m.w.detach(), m.b) * F.linear(x, m.w)), T, w=param(5, 6), b=param(5)
    ),
    "linear, an unused layer": case(lambda m, x: read(m.a(x) + 0 * m.c(x).detach()), X, a=L(6, 5), c=L(6, 5)),
    "linear, in place after": case(lambda m, x: read(F.relu_(m.a(x))), T, a=L(6, 5)),
    "linear, residual in place": case(lambda m, x: read(m.a(x).add_(x)), T, a=L(6, 6)),
    "linear, rows overwritten": case(
        lambda m, x: read(torch.tanh(m.a(x)).index_fill(1, torch.tensor([1]), 0.5)), T, a=L(6, 5)
    ),
    "linear, strided input": case(lambda m, x: read(m.a(x[:, ::2, 1::2])), T, a=L(3, 5)),
    "linear, expanded input": case(lambda m, x: read(m.a(x[:, None].expand(-1, 3, -1))), X, a=L(6, 5)),
    "linear, flipped tokens": case(lambda m, x: read(m.a(x.flip(1)) * m.a(x)), T, a=L(6, 5)),
    "linear, checkpoint": case(
        lambda m, x: read(m.c(checkpoint(lambda v: torch.tanh(m.a(v)), x, use_reentrant=False))),
        T,
        a=L(6, 5),
        c=L(5, 3),
        may="*",
    ),
    "linear, constant rows": case(
        lambda m, x: read(m.p(m.e) + m.a(x)), T, a=L(6, 5), p=L(3, 5), e=param(4, 3), may=("p.*", "e")
    ),
    "linear, positions of a buffer": case(
        lambda m, x: read(m.a(x) + m.p(torch.ones_like(x[..., :3]))), T, a=L(6, 5), p=L(3, 5)
    ),
    "linear, each token its own call": case(
        lambda m, x: read(torch.stack([m.a(x[:, t]) for t in range(x.shape[1])], 1)), T, a=L(6, 5)
    ),
    "linear, each sample its own call": case(
        lambda m, x: read(torch.stack([m.a(row) for row in x])), T, a=L(6, 5), may="*"
    ),
    "linear, recurrence by hand": case(
        lambda m, x: read(functools.reduce(lambda h, t: torch.tanh(m.h(h) + m.a(x[:, t])), range(4), x[:, 0, :5])),
        T,
        h=L(5, 5, bias=False),
        a=L(6, 5),
    ),
    "linear, module list": case(
        lambda m, x: read(functools.reduce(lambda h, layer: torch.tanh(layer(h)), m.a, x)),
        X,
        a=nn.ModuleList([L(6, 5), L(5, 4), L(4, 3)]),
    ),
}

# --- products by other names ----------------------------------------------------------------------------------------

CASES |= {
    "addmm": case(lambda m, x: read(torch.addmm(m.b, x, m.w)), X, w=param(6, 5), b=param(5)),
    "addmm, folded": case(
        lambda m, x: read(torch.addmm(m.b, x.flatten(0, 1), m.w).view(-1, 4, 5)), T, w=param(6, 5), b=param(5)
    ),
    "addmm, alpha and beta": case(
        lambda m, x: read(torch.addmm(m.b, x, m.w, beta=0.3, alpha=-1.7)), X, w=param(6, 5), b=param(5)
    ),
    "addmm, alpha and beta, method": case(
        lambda m, x: read(m.b.addmm(x, m.w, beta=0.3, alpha=-1.7)), X, w=param(6, 5), b=param(5), may="*"
    ),
    "addmm, bias as a row": case(lambda m, x: read(torch.addmm(m.b, x, m.w)), X, w=param(6, 5), b=param(1, 5)),
    "addmm, transposed weight": case(lambda m, x: read(torch.addmm(m.b, x, m.w.t())), X, w=param(5, 6), b=param(5)),
    "addmm, twice": case(
        lambda m, x: read(torch.addmm(m.b, torch.tanh(torch.addmm(m.b, x, m.w)), m.w)), X, w=param(6, 6), b=param(6)
    ),
    "mm": case(lambda m, x: read(torch.mm(x, m.w)), X, w=param(6, 5)),
    "mm, method": case(lambda m, x: read(x.mm(m.w)), X, w=param(6, 5)),
    "matmul": case(lambda m, x: read(torch.matmul(x, m.w)), T, w=param(6, 5)),
    "matmul, method": case(lambda m, x: read(x.matmul(m.w)), U, w=param(6, 5)),
    "@": case(lambda m, x: read(x @ m.w), X, w=param(6, 5)),
    "@, tokens": case(lambda m, x: read(x @ m.w), T, w=param(6, 5)),
    "@, time first": case(lambda m, x: read((x.transpose(0, 1) @ m.w).transpose(0, 1)), T, w=param(6, 5)),
    "@, as many tokens as samples": case(
        lambda m, x: read((x.transpose(0, 1) @ m.w).transpose(0, 1)), drawn(B, 7, 6), w=param(6, 5)
    ),
    "@, windows": case(lambda m, x: read(x @ m.w), U, w=param(6, 5)),
    "@, then a bias": case(lambda m, x: read(x @ m.w + m.b), T, w=param(6, 5), b=param(5)),
    "@, w.T": case(lambda m, x: read(x @ m.w.T), T, w=param(5, 6)),
    "@, w.mT": case(lambda m, x: read(x @ m.w.mT), T, w=param(5, 6)),
    "@, w.t()": case(lambda m, x: read(x @ m.w.t()), X, w=param(5, 6)),
    "@, w.transpose": case(lambda m, x: read(x @ m.w.transpose(-1, -2)), T, w=param(5, 6)),
    "@, parameter on the left": case(lambda m, x: read(m.w @ x), T, w=param(5, 4)),
    "@, parameter on the left, windows": case(lambda m, x: read(m.w @ x), U, w=param(5, 4)),
    "@, parameter on the left, samples last": case(lambda m, x: read((m.w @ x.T).T), X, w=param(5, 6)),
    "@, parameter on the left, transposed": case(lambda m, x: read((m.w.T @ x.T).T), X, w=param(6, 5)),
    "@, parameter on the left, w.T": case(lambda m, x: read(m.w.T @ x), T, w=param(4, 5)),
    "@, parameter on the left, one column": case(lambda m, x: read(m.w @ x[..., None]), X, w=param(5, 6)),
    "@, parameter on both sides": case(lambda m, x: read(m.v @ x @ m.w), T, v=param(3, 4), w=param(6, 5)),
    "@, the same on both sides": case(lambda m, x: read(m.w @ x @ m.w), drawn(B, 6, 6), w=param(6, 6), may="*"),
    "@, vector on the right": case(lambda m, x: read(x @ m.w), T, w=param(6), may="*"),
    "@, vector on the left": case(lambda m, x: read(m.w @ x), T, w=param(4), may="*"),
    "@, mv": case(lambda m, x: read(torch.mv(x, m.w)[:, None]), X, w=param(6), may="*"),
    "@, one output": case(lambda m, x: x @ m.w, X, w=param(6, 1)),
    "@, a row of ones": case(lambda m, x: read(x[..., :1] @ m.w), T, w=param(1, 5)),
    "@, everything is seven": case(
        lambda m, x: read((m.v @ x).transpose(1, 2) @ m.w, 7),
        drawn(B, 7, 7),
        v=param(7, 7),
        w=param(7, 7),
        may="v",
    ),
    "@, stack of weights": case(lambda m, x: read(x[:, None] @ m.w), T, w=param(3, 6, 5), may="w"),
    "@, a weight for each window": case(lambda m, x: read(x @ m.w), U, w=param(2, 6, 5), may="w"),
    "@, low rank": case(lambda m, x: read(x @ m.v @ m.w), T, v=param(6, 2), w=param(2, 5)),
    "@, attention without projections": case(lambda m, x: read((x @ m.w @ x.mT).softmax(-1) @ x), T, w=param(6, 6)),
    "transformers' Conv1D": case(
        plain,
        T,
        a=Custom(
            lambda m, x: torch.addmm(m.bias, x.view(-1, x.size(-1)), m.weight).view(*x.shape[:-1], 5),
            weight=param(6, 5),
            bias=param(5),
        ),
    ),
    "bmm, experts": case(
        lambda m, x: read(torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1)), T, w=param(4, 6, 5), may="w"
    ),
    "bmm, as many experts as samples": case(
        lambda m, x: read(torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1)), drawn(B, 7, 6), w=param(7, 6, 5), may="w"
    ),
    "baddbmm, experts": case(
        lambda m, x: read(torch.baddbmm(m.b, x.transpose(0, 1), m.w).transpose(0, 1)),
        T,
        w=param(4, 6, 5),
        b=param(4, 1, 5),
        may="*",
    ),
    "bmm, expanded parameter": case(
        lambda m, x: read(torch.bmm(x, m.w.expand(len(x), -1, -1))), T, w=param(1, 6, 5), may="w"
    ),
    "chain_matmul of parameters": case(
        lambda m, x: read(torch.linalg.multi_dot([x, m.v, m.w])), X, v=param(6, 2), w=param(2, 5), may="*"
    ),
    "tensordot": case(lambda m, x: read(torch.tensordot(x, m.w, ([2], [1]))), T, w=param(5, 6), may="w"),
    "inner": case(lambda m, x: read(torch.inner(x, m.w)), T, w=param(5, 6), may="w"),
}

for bias in (True, False):
    b = "" if bias else ", no bias"
    CASES |= {
        f"bilinear{b}": case(lambda m, x: read(m.a(x[:, :2], x[:, 2:])), X, a=nn.Bilinear(2, 4, 5, bias=bias)),
        f"bilinear, tokens{b}": case(
            lambda m, x: read(m.a(x[..., :2], x[..., 2:])), T, a=nn.Bilinear(2, 4, 5, bias=bias)
        ),
        f"bilinear, time first{b}": case(
            lambda m, x: read(m.a(x.transpose(0, 1)[..., :2], x.transpose(0, 1)[..., 2:]).transpose(0, 1)),
            T,
            a=nn.Bilinear(2, 4, 5, bias=bias),
        ),
        f"bilinear, of one layer's outputs{b}": case(
            lambda m, x: read(m.a(m.h(x), torch.tanh(m.h(x)))), T, h=L(6, 3), a=nn.Bilinear(3, 3, 5, bias=bias)
        ),
    }

# --- einsum ---------------------------------------------------------------------------------------------------------

# Equation → (inputs, shape of the parameter); the parameter comes second, or first if the equation says so below.
EINSUMS = {
    "bi,oi->bo": (X, (5, 6)),
    "bi,io->bo": (X, (6, 5)),
    "btd,de->bte": (T, (6, 5)),
    "btd,ed->bet": (T, (5, 6)),
    "btd,ed->tbe": (T, (5, 6)),
    "bti,hio->bhto": (T, (2, 6, 5)),
    "bti,iho->bhto": (T, (6, 2, 5)),
    "bti,hoi->btho": (T, (2, 5, 6)),
    "btd,ts->bsd": (T, (4, 3)),
    "btd,dts->bs": (T, (6, 4, 3)),
    "bhtd,hde->bhte": (U, (2, 6, 5)),
    "bhtd,hde->bte": (U, (2, 6, 5)),
    "bhtd,hdeo->bhteo": (U, (2, 6, 3, 5)),
    "btd,td->bt": (T, (4, 6)),
    "btd,td->btd": (T, (4, 6)),
    "btd,d->bt": (T, (6,)),
    "btd,d->btd": (T, (6,)),
    "btd,te->btde": (T, (4, 5)),
    "btd,e->btde": (T, (5,)),
    "b...d,de->b...e": (U, (6, 5)),
    "...d,ed->...e": (U, (5, 6)),
    "...d,de": (U, (6, 5)),
    "btd,de": (T, (6, 5)),
    "btd,ee->bte": (T, (5, 5)),
    "btt,te->be": (drawn(B, 4, 4), (4, 5)),
    "btd,xe->bte": (T, (3, 5)),
    "btd,de->be": (T, (6, 5)),
}
# No product of matrices, or with a diagonal or sum in it.
UNREDUCED = {
    "btd,td->bt", "btd,td->btd", "btd,d->bt", "btd,d->btd", "btd,te->btde", "btd,e->btde", "btd,ee->bte",
    "btt,te->be", "btd,xe->bte", "btd,de->be", "btd,dts->bs", "bhtd,hde->bte", "btd,de", "...d,de", "btd,ed->tbe",
}  # fmt: skip


def einsum_case(equation, inputs, shape):
    def forward(m, x):
        values = torch.einsum(equation, x, m.w)
        result = equation.partition("->")[2]
        return read(values if "b" not in result else values.movedim(result.index("b"), 0))

    return case(forward, inputs, w=param(*shape), may="w" if equation in UNREDUCED else ())


CASES |= {f"einsum {equation}": einsum_case(equation, *rest) for equation, rest in EINSUMS.items()}
CASES |= {
    "einsum oi,bi->bo": case(lambda m, x: read(torch.einsum("oi,bi->bo", m.w, x)), X, w=param(5, 6)),
    "einsum hio,bti->bhto": case(lambda m, x: read(torch.einsum("hio,bti->bhto", m.w, x)), T, w=param(2, 6, 5)),
    "einsum, spaces and list": case(
        lambda m, x: read(torch.einsum("b t d, d e -> b t e", [x, m.w])), T, w=param(6, 5), may="w"
    ),
    "einsum, sublists": case(
        lambda m, x: read(torch.einsum(x, [0, 1, 2], m.w, [2, 3], [0, 1, 3])), T, w=param(6, 5), may="w"
    ),
    "einsum, letters as torch likes them": case(
        lambda m, x: read(torch.einsum("zAq,qB->zAB", x, m.w)), T, w=param(6, 5)
    ),
    "einsum, as many tokens as samples": case(
        lambda m, x: read(torch.einsum("tbd,de->bte", x.transpose(0, 1), m.w)), drawn(B, 7, 6), w=param(6, 5)
    ),
    "einsum, grouped, as many groups as samples": case(
        lambda m, x: read(torch.einsum("bhd,hde->bhe", x, m.w)), drawn(B, 7, 6), w=param(7, 6, 5)
    ),
    "einsum, grouped, groups first": case(
        lambda m, x: read(torch.einsum("hbd,hde->hbe", x.transpose(0, 1), m.w).transpose(0, 1)), T, w=param(4, 6, 5)
    ),
    "einsum, everything is seven": case(
        lambda m, x: read(torch.einsum("btd,de->bte", x, m.w), 7), drawn(B, 7, 7), w=param(7, 7)
    ),
    "einsum, two parameters": case(
        lambda m, x: read(torch.einsum("btd,dr,re->bte", x, m.v, m.w)), T, v=param(6, 2), w=param(2, 5), may="*"
    ),
    "einsum, two samples and a parameter": case(
        lambda m, x: read(torch.einsum("bi,oij,bj->bo", x, m.w, x)), X, w=param(5, 6, 6), may="w"
    ),
    "einsum, tensor of one parameter": case(
        lambda m, x: read(x[..., None] + torch.einsum("ij->ji", m.w)), X, w=param(5, 6), may="w"
    ),
    "einsum, twice": case(
        lambda m, x: read(torch.einsum("btd,de->bte", torch.tanh(torch.einsum("btd,de->bte", x, m.w)), m.w)),
        T,
        w=param(6, 6),
    ),
    "einsum, twice, two equations": case(
        lambda m, x: read(torch.einsum("btd,ed->bte", torch.tanh(torch.einsum("btd,de->bte", x, m.w)), m.w)),
        T,
        w=param(6, 6),
        may="w",
    ),
    "einsum, Kolmogorov-Arnold": case(
        lambda m, x: read(torch.einsum("big,oig->bo", torch.exp(-((x[..., None] - m.grid) ** 2)), m.w)),
        X,
        w=param(5, 6, 3),
        grid=nn.Parameter(torch.tensor([-1.0, 0.0, 1.5], dtype=torch.float64), requires_grad=False),
        may="w",
    ),
}

# --- convolutions ---------------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    1: (nn.Conv1d, SIGNAL, (3,), (2,), (1,)),
    2: (nn.Conv2d, IMAGE, (3, 2), (2, 3), (1, 0)),
    3: (nn.Conv3d, VOLUME, (2, 3, 1), (1, 2, 3), (1, 0, 2)),
}
for n, (layer, inputs, kernel, stride, padding) in CONVOLUTIONS.items():
    every = {
        "plain": {},
        "no bias": {"bias": False},
        "square kernel": {"kernel_size": 3},
        "stride": {"stride": stride},
        "padding": {"padding": padding},
        "stride and padding": {"stride": stride, "padding": 1, "kernel_size": 3},
        "rows left over": {"stride": 3, "kernel_size": 2},
        "stride beyond the kernel": {"stride": 3, "kernel_size": 1, "bias": False},
        "same": {"padding": "same"},
        "same, even kernel": {"padding": "same", "kernel_size": 2},
        "same, dilation": {"padding": "same", "kernel_size": 2, "dilation": 2, "groups": 2, "out_channels": 6},
        "valid": {"padding": "valid", "stride": 2},
        "dilation": {"dilation": 2, "kernel_size": 2},
        "dilation, stride, padding": {"dilation": 2, "kernel_size": 2, "stride": 2, "padding": 1, "bias": False},
        "groups": {"groups": 2, "out_channels": 6},
        "groups, no bias, stride": {"groups": 2, "out_channels": 10, "bias": False, "stride": 2},
        "depthwise": {"groups": 4, "out_channels": 4, "padding": "same"},
        "depthwise, no bias": {"groups": 4, "out_channels": 4, "bias": False},
        "depthwise, two each": {"groups": 4, "out_channels": 8, "stride": 2, "padding": 1, "kernel_size": 3},
        "depthwise, dilation": {"groups": 4, "out_channels": 4, "dilation": 2, "kernel_size": 2, "padding": 1},
        "1x1": {"kernel_size": 1},
        "1x1, no bias": {"kernel_size": 1, "bias": False},
        "1x1, stride": {"kernel_size": 1, "stride": 2},
        "1x1, padding": {"kernel_size": 1, "padding": 1},
        "1x1, groups": {"kernel_size": 1, "groups": 2, "out_channels": 6},
        "1x1, depthwise": {"kernel_size": 1, "groups": 4, "out_channels": 4},
        "patches": {"kernel_size": 2, "stride": 2},
        "reflect": {"padding_mode": "reflect", "padding": 1, "kernel_size": 3},
        "circular": {"padding_mode": "circular", "padding": 1, "kernel_size": 3, "stride": 2},
        "replicate": {"padding_mode": "replicate", "padding": 2, "kernel_size": 3, "groups": 2, "out_channels": 6},
        "same, reflect": {"padding_mode": "reflect", "padding": "same", "kernel_size": 3, "bias": False},
        "as wide as the input": {"kernel_size": tuple(inputs.shape[2:])},
        "one channel out": {"out_channels": 1},
    }
    for name, options in every.items():
        options = {"in_channels": 4, "out_channels": 5, "kernel_size": kernel, **options}
        CASES[f"conv{n}d, {name}"] = case(plain, inputs, a=layer(**options))
    last = next(iter(inputs.shape[2:]))
    square = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1}
    CASES |= {
        f"conv{n}d, second layer": case(hidden, inputs, h=layer(4, 3, 2), a=layer(3, 5, 2)),
        f"conv{n}d, second layer, depthwise": case(hidden, inputs, h=layer(4, 3, 2), a=layer(3, 3, 2, groups=3)),
        f"conv{n}d, twice": case(lambda m, x: read(m.a(torch.tanh(m.a(x)))), inputs, a=layer(**square)),
        f"conv{n}d, twice, unlike sizes": case(
            lambda m, x: read(torch.cat([m.a(x).flatten(2), m.a(x[..., ::2]).flatten(2)], 2)), inputs, a=layer(**square)
        ),
        f"conv{n}d, depthwise, twice": case(
            lambda m, x: read(m.a(torch.tanh(m.a(x)))), inputs, a=layer(**square, groups=4)
        ),
        f"conv{n}d, weight frozen": case(plain, inputs, a=frozen(layer(4, 5, kernel), "weight")),
        f"conv{n}d, bias frozen": case(plain, inputs, a=frozen(layer(4, 5, kernel), "bias")),
        f"conv{n}d, one channel in": case(lambda m, x: read(m.a(x[:, :1])), inputs, a=layer(1, 5, kernel)),
        f"conv{n}d, as many channels as samples": case(
            lambda m, x: read(m.a(x.repeat_interleave(2, 1)[:, :7])), inputs, a=layer(7, 7, 2)
        ),
        f"conv{n}d, depthwise, as many channels as samples": case(
            lambda m, x: read(m.a(x.repeat_interleave(2, 1)[:, :7])), inputs, a=layer(7, 7, 2, groups=7)
        ),
        f"conv{n}d, spatial mean": case(lambda m, x: read(F.relu(m.a(x)).flatten(2).mean(2)), inputs, a=layer(4, 5, 2)),
        f"conv{n}d, frames folded into the batch": case(
            lambda m, x: read(m.a(torch.stack([x, x.flip(-1), x * x], 1).flatten(0, 1)).unflatten(0, (-1, 3))),
            inputs[:, :, :6],
            a=layer(4, 5, 2),
        ),
        f"conv{n}d, frames folded, frames first": case(
            lambda m, x: read(
                m.a(torch.stack([x, x.flip(-1), x * x], 0).flatten(0, 1)).unflatten(0, (3, -1)).transpose(0, 1)
            ),
            inputs[:, :, :6],
            a=layer(4, 5, 2, groups=1, bias=False),
        ),
        f"conv{n}d, depthwise, frames folded": case(
            lambda m, x: read(m.a(torch.stack([x, x.flip(-1), x * x], 1).flatten(0, 1)).unflatten(0, (-1, 3))),
            inputs[:, :, :6],
            a=layer(4, 4, 2, groups=4),
        ),
    }

CASES |= {
    "conv1d, functional": case(
        lambda m, x: read(F.conv1d(x, m.w, m.b, 2, 1, 1, 2)), SIGNAL, w=param(6, 2, 3), b=param(6)
    ),
    "conv2d, functional, by name": case(
        lambda m, x: read(F.conv2d(input=x, weight=m.w, bias=None, groups=2, dilation=(1, 2), padding=(0, 1))),
        IMAGE,
        w=param(6, 2, 3, 3),
    ),
    "conv2d, torch.conv2d": case(lambda m, x: read(torch.conv2d(x, m.w)), IMAGE, w=param(5, 4, 3, 3)),
    "conv2d, torch.convolution": case(
        lambda m, x: read(torch.convolution(x, m.w, m.b, (2, 1), (1, 0), (1, 1), False, (0, 0), 1)),
        IMAGE,
        w=param(5, 4, 3, 3),
        b=param(5),
        may="*",
    ),
    "conv2d, explicit padding": case(
        lambda m, x: read(m.a(F.pad(x, (1, 2, 0, 1), value=0.5))), IMAGE, a=nn.Conv2d(4, 5, 3)
    ),
    "conv1d, causal": case(lambda m, x: read(m.a(F.pad(x, (4, 0)))), SIGNAL, a=nn.Conv1d(4, 5, 3, dilation=2)),
    "conv1d, cut after": case(lambda m, x: read(m.a(x)[..., :-2]), SIGNAL, a=nn.Conv1d(4, 5, 3, padding=2)),
    "conv1d, tokens": case(
        lambda m, x: read(m.a(x.transpose(1, 2)).transpose(1, 2)), T, a=nn.Conv1d(6, 5, 3, padding=1)
    ),
    "conv2d, channels last": case(
        lambda m, x: read(m.a(x.to(memory_format=torch.channels_last))), IMAGE, a=nn.Conv2d(4, 5, 3)
    ),
    "conv2d, in place after": case(lambda m, x: read(F.relu_(m.a(x))), IMAGE, a=nn.Conv2d(4, 5, 3)),
    "conv2d, unbatched, each sample its own call": case(
        lambda m, x: read(torch.stack([m.a(row) for row in x])), IMAGE, a=nn.Conv2d(4, 5, 3), may="*"
    ),
    "conv2d, weight as a linear": case(
        lambda m, x: read(F.linear(x.flatten(1), m.a.weight.flatten(1), m.a.bias)),
        drawn(B, 2, 3, 3),
        a=nn.Conv2d(2, 5, 3),
    ),
    "conv1d, weight as a linear, squeezed": case(
        lambda m, x: read(F.linear(x, m.a.weight.squeeze(-1), m.a.bias)), T, a=nn.Conv1d(6, 5, 1)
    ),
    "conv2d, linear's weight as a filter": case(
        lambda m, x: read(F.conv2d(x, m.a.weight[:, :, None, None], m.a.bias)), IMAGE, a=L(4, 5)
    ),
    "conv2d, standardised weight": case(
        lambda m, x: read(F.conv2d(x, (m.w - m.w.mean((1, 2, 3), True)) / m.w.std((1, 2, 3), keepdim=True))),
        IMAGE,
        w=param(5, 4, 3, 3),
    ),
    "conv2d, separable": case(
        lambda m, x: read(m.c(torch.tanh(m.a(x)))), IMAGE, a=nn.Conv2d(4, 4, 3, groups=4), c=nn.Conv2d(4, 5, 1)
    ),
    "conv2d, dense block": case(
        lambda m, x: read(m.c(torch.cat([x, F.relu(m.a(x))], 1))),
        IMAGE,
        a=nn.Conv2d(4, 3, 3, padding=1),
        c=nn.Conv2d(7, 5, 3),
    ),
    "conv2d, shuffled channels": case(
        lambda m, x: read(m.c(F.channel_shuffle(m.a(x), 2))),
        IMAGE,
        a=nn.Conv2d(4, 6, 1, groups=2),
        c=nn.Conv2d(6, 4, 3, groups=2),
    ),
    "conv2d, pixel shuffle": case(lambda m, x: read(F.pixel_shuffle(m.a(x), 2)), IMAGE, a=nn.Conv2d(4, 8, 3)),
    "conv2d, squeeze and excite": case(
        lambda m, x: read(m.a(x) * torch.sigmoid(m.c(F.adaptive_avg_pool2d(m.a(x), 1)))),
        IMAGE,
        a=nn.Conv2d(4, 5, 3),
        c=nn.Conv2d(5, 5, 1),
    ),
    "conv2d, by unfold": case(lambda m, x: read(m.w @ F.unfold(x, (3, 2), stride=2)), IMAGE, w=param(5, 24)),
    "conv2d, max pool": case(lambda m, x: read(F.max_pool2d(m.a(x), 2)), IMAGE, a=nn.Conv2d(4, 5, 3)),
    "conv1d, windows that overlap": case(
        lambda m, x: read(m.a(x.unfold(2, 4, 2).transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1))),
        SIGNAL,
        a=nn.Conv1d(4, 5, 3),
    ),
}

TRANSPOSED = {
    1: (nn.ConvTranspose1d, SIGNAL),
    2: (nn.ConvTranspose2d, IMAGE[..., :4, :5]),
    3: (nn.ConvTranspose3d, VOLUME[..., :2, :3, :4]),
}
for n, (layer, inputs) in TRANSPOSED.items():
    every = {
        "plain": {},
        "no bias": {"bias": False},
        "stride": {"stride": 2},
        "stride and padding": {"stride": 2, "padding": 1},
        "output padding": {"stride": 3, "padding": 1, "output_padding": 1, "bias": False},
        "dilation": {"dilation": 2, "kernel_size": 2},
        "dilation, stride": {"dilation": 2, "kernel_size": 2, "stride": 2, "output_padding": 1},
        "groups": {"groups": 2, "out_channels": 6},
        "groups, stride, no bias": {"groups": 2, "out_channels": 6, "stride": 2, "bias": False, "padding": 1},
        "depthwise": {"groups": 4, "out_channels": 4},
        "depthwise, stride": {"groups": 4, "out_channels": 8, "stride": 2, "padding": 1},
        "1x1": {"kernel_size": 1},
        "upsampling": {"kernel_size": 2, "stride": 2},
        "one channel out": {"out_channels": 1, "stride": 2},
    }
    for name, options in every.items():
        CASES[f"conv_transpose{n}d, {name}"] = case(
            plain, inputs, a=layer(**{"in_channels": 4, "out_channels": 5, "kernel_size": 3, **options})
        )
    CASES |= {
        f"conv_transpose{n}d, second layer": case(
            hidden, inputs, h=getattr(nn, f"Conv{n}d")(4, 3, 1), a=layer(3, 5, 2, stride=2)
        ),
        f"conv_transpose{n}d, twice": case(
            lambda m, x: read(m.a(torch.tanh(m.a(x)))), inputs, a=layer(4, 4, 3, padding=1)
        ),
        f"conv_transpose{n}d, output size": case(
            lambda m, x, n=n: read(m.a(x, output_size=[2 * s for s in x.shape[-n:]])),
            inputs,
            a=layer(4, 5, 3, stride=2, padding=1),
        ),
        f"conv_transpose{n}d, frames folded": case(
            lambda m, x: read(m.a(torch.stack([x, x * x], 1).flatten(0, 1)).unflatten(0, (-1, 2))),
            inputs,
            a=layer(4, 5, 2, stride=2),
        ),
        f"conv_transpose{n}d, tied to a convolution": case(
            lambda m, x, n=n: read(getattr(F, f"conv_transpose{n}d")(torch.tanh(m.a(x)), m.a.weight)),
            inputs,
            a=getattr(nn, f"Conv{n}d")(4, 5, 2, bias=False),
            may="a.weight",
        ),
    }
CASES["conv_transpose2d, asymmetric"] = case(
    plain, IMAGE[..., :4, :5], a=nn.ConvTranspose2d(4, 5, (3, 2), stride=(1, 2), padding=(1, 0), output_padding=(0, 1))
)

# --- embeddings -----------------------------------------------------------------------------------------------------

REPEATED = torch.tensor(
    [[1, 1, 1, 1], [0, 2, 0, 2], [3, 3, 0, 0], [5, 4, 3, 2], [10, 10, 10, 0], [1, 2, 3, 4], [9, 8, 9, 8]]
)


def positions(x):
    return torch.arange(x.shape[1], device=x.device)


CASES |= {
    "embedding": case(plain, IDS, a=nn.Embedding(11, 5)),
    "embedding, one id": case(plain, IDS[:, 0], a=nn.Embedding(11, 5)),
    "embedding, repeated ids": case(plain, REPEATED, a=nn.Embedding(11, 5)),
    "embedding, the same ids": case(plain, torch.full((B, 4), 3), a=nn.Embedding(11, 5)),
    "embedding, summed": case(lambda m, x: read(m.a(x).sum(1)), REPEATED, a=nn.Embedding(11, 5)),
    "embedding, padding": case(plain, REPEATED, a=nn.Embedding(11, 5, padding_idx=0)),
    "embedding, padding from the end": case(plain, REPEATED, a=nn.Embedding(11, 5, padding_idx=-1)),
    "embedding, functional": case(
        lambda m, x: read(F.embedding(x, m.w, 0, None, 2.0, False, False)), REPEATED, w=param(11, 5)
    ),
    "embedding, by name": case(
        lambda m, x: read(F.embedding(weight=m.w, input=x, padding_idx=3)), REPEATED, w=param(11, 5)
    ),
    "embedding, sparse": case(plain, REPEATED, a=nn.Embedding(11, 5, sparse=True), may="*"),
    "embedding, scaled": case(lambda m, x: read(m.a(x) * math.sqrt(5)), IDS, a=nn.Embedding(11, 5)),
    "embedding, time first": case(time_first, IDS, a=nn.Embedding(11, 5)),
    "embedding, as many tokens as samples": case(time_first, ids_of(B, 7), a=nn.Embedding(11, 5)),
    "embedding, folded": case(folded, IDS, a=nn.Embedding(11, 5)),
    "embedding, windows": case(plain, ids_of(B, 2, 3), a=nn.Embedding(11, 5)),
    "embedding, 32 bit ids": case(plain, IDS.int(), a=nn.Embedding(11, 5)),
    "embedding, first token read": case(read_first, IDS, a=nn.Embedding(11, 5)),
    "embedding, twice": case(lambda m, x: read(m.a(x) * m.a((x + 1) % 11)), IDS, a=nn.Embedding(11, 5)),
    "embedding, twice, unlike positions": case(
        lambda m, x: read(torch.cat([m.a(x), m.a(x[:, :2] // 2)], 1)), IDS, a=nn.Embedding(11, 5)
    ),
    "embedding, then a linear": case(lambda m, x: read(m.h(m.a(x))), IDS, a=nn.Embedding(11, 5), h=L(5, 3)),
    "embedding, tied to the head": case(
        lambda m, x: F.linear(torch.tanh(m.a(x)).mean(1), m.a.weight)[:, :7], IDS, a=nn.Embedding(11, 5), may="a.weight"
    ),
    "embedding, of positions": case(
        lambda m, x: read(m.a(x) + m.p(positions(x))), IDS, a=nn.Embedding(11, 5), p=nn.Embedding(4, 5)
    ),
    "embedding, of positions, as a row": case(
        lambda m, x: read(m.a(x) + m.p(positions(x)[None])), IDS, a=nn.Embedding(11, 5), p=nn.Embedding(9, 5)
    ),
    "embedding, of positions, for each sample": case(
        lambda m, x: read(m.a(x) + m.p(positions(x).expand_as(x))), IDS, a=nn.Embedding(11, 5), p=nn.Embedding(9, 5)
    ),
    "embedding, of positions, with an offset": case(
        lambda m, x: read(m.a(x) + m.p(positions(x) + 2)), IDS, a=nn.Embedding(11, 5), p=nn.Embedding(9, 5)
    ),
    "embedding, of positions, as many as samples": case(
        lambda m, x: read(m.a(x) + m.p(positions(x))), ids_of(B, 7), a=nn.Embedding(11, 5), p=nn.Embedding(7, 5)
    ),
    "embedding, of types": case(
        lambda m, x: read(m.a(x) + m.p(torch.zeros_like(x))), IDS, a=nn.Embedding(11, 5), p=nn.Embedding(2, 5)
    ),
    "embedding, of a mask's sums": case(
        lambda m, x: read(m.a(x) + m.p((x > 3).cumsum(1))), IDS, a=nn.Embedding(11, 5), p=nn.Embedding(9, 5)
    ),
    "embedding, by index": case(lambda m, x: read(m.w[x]), IDS, w=param(11, 5), may="w"),
    "embedding, index_select": case(
        lambda m, x: read(m.w.index_select(0, x.flatten()).view(-1, 4, 5)), IDS, w=param(11, 5), may="w"
    ),
    "embedding, one-hot": case(lambda m, x: read(F.one_hot(x, 11).to(m.w.dtype) @ m.w), IDS, w=param(11, 5)),
    "embedding, of two inputs": case(
        lambda m, ids, types: read(m.a(ids) + m.p(types)),
        {"ids": IDS, "types": (IDS > 4).long()},
        a=nn.Embedding(11, 5),
        p=nn.Embedding(2, 5),
    ),
    "embedding_bag": case(plain, REPEATED, a=nn.EmbeddingBag(11, 5, mode="sum"), may="*"),
    "embedding_bag, mean and padding": case(
        plain, REPEATED[:5].repeat(2, 1)[:7], a=nn.EmbeddingBag(11, 5, mode="mean", padding_idx=0), may="*"
    ),
    "embedding, relative positions as in T5": case(
        lambda m, x: read(
            (
                (x @ x.mT)[:, None] + m.p(3 + positions(x)[:, None] - positions(x)[None]).permute(2, 0, 1).unsqueeze(0)
            ).softmax(-1)
            @ m.a(x)[:, None]
        ),
        T,
        p=nn.Embedding(7, 2),
        a=L(6, 5),
    ),
    "embedding, relative positions as in Swin": case(
        lambda m, x: read(
            (
                (x @ x.mT)[:, None]
                + m.p[(3 + positions(x)[:, None] - positions(x)[None]).view(-1)].view(4, 4, -1).permute(2, 0, 1)
            ).softmax(-1)
            @ m.a(x)[:, None]
        ),
        T,
        p=param(7, 2),
        a=L(6, 5),
    ),
}

# --- norms ----------------------------------------------------------------------------------------------------------

for inputs, name in ((X, "one row"), (T, "tokens"), (U, "windows"), (drawn(B, 7, 6), "as many tokens as samples")):
    CASES |= {
        f"layer_norm, {name}": case(plain, inputs, a=nn.LayerNorm(6)),
        f"layer_norm, no bias, {name}": case(plain, inputs, a=nn.LayerNorm(6, bias=False)),
        f"rms_norm, {name}": case(plain, inputs, a=nn.RMSNorm(6)),
    }
CASES |= {
    "layer_norm, no parameters": case(
        lambda m, x: read(m.n(m.a(x))), T, a=L(6, 5), n=nn.LayerNorm(5, elementwise_affine=False)
    ),
    "layer_norm, bias only": case(plain, T, a=frozen(nn.LayerNorm(6), "weight")),
    "layer_norm, over two dimensions": case(plain, U, a=nn.LayerNorm((4, 6))),
    "layer_norm, over all but samples": case(plain, U, a=nn.LayerNorm((2, 4, 6), bias=False)),
    "layer_norm, time first": case(time_first, T, a=nn.LayerNorm(6)),
    "layer_norm, time first, as many tokens as samples": case(time_first, drawn(B, 7, 7), a=nn.LayerNorm(7)),
    "layer_norm, folded": case(folded, T, a=nn.LayerNorm(6)),
    "layer_norm, of a layer": case(hidden, T, h=L(6, 5), a=nn.LayerNorm(5, eps=0.1)),
    "layer_norm, twice": case(lambda m, x: read(m.a(x + torch.tanh(m.a(x)))), T, a=nn.LayerNorm(6)),
    "layer_norm, functional": case(lambda m, x: read(F.layer_norm(x, (6,), m.w, None, 1e-3)), T, w=param(6)),
    "layer_norm, by name": case(
        lambda m, x: read(F.layer_norm(weight=m.w, bias=m.b, normalized_shape=[6], input=x)), T, w=param(6), b=param(6)
    ),
    "layer_norm, by hand": case(
        lambda m, x: read((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) * m.g + m.b),
        T,
        g=param(6),
        b=param(6),
    ),
    "layer_norm, channels first": case(
        lambda m, x: read(m.a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), IMAGE, a=nn.LayerNorm(4)
    ),
    "rms_norm, over two dimensions": case(plain, U, a=nn.RMSNorm((4, 6))),
    "rms_norm, no parameters": case(
        lambda m, x: read(m.n(m.a(x))), T, a=L(6, 5), n=nn.RMSNorm(5, elementwise_affine=False)
    ),
    "rms_norm, time first": case(time_first, T, a=nn.RMSNorm(6, eps=1e-3)),
    "rms_norm, twice": case(lambda m, x: read(m.a(x + torch.tanh(m.a(x)))), T, a=nn.RMSNorm(6)),
    "rms_norm, functional": case(lambda m, x: read(F.rms_norm(x, (6,), m.w)), T, w=param(6)),
    "rms_norm, as in Llama": case(
        lambda m, x: read(m.g * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)), T, g=param(6)
    ),
    "rms_norm, as in Gemma": case(
        lambda m, x: read(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + m.g)), T, g=param(6)
    ),
}
for n, inputs in ((0, drawn(B, 4)), (1, SIGNAL), (2, IMAGE), (3, VOLUME)):
    CASES |= {
        f"group_norm, {n}d": case(plain, drawn(B, 4, seed=1) if n == 0 else inputs, a=nn.GroupNorm(2, 4)),
        f"batch_norm, {n}d": case(plain, inputs, a=draw_statistics(getattr(nn, f"BatchNorm{n or 1}d")(4))),
        f"batch_norm, no parameters, {n}d": case(
            lambda m, x: read(m.n(x * m.a)),
            inputs,
            a=nn.Parameter(torch.ones(4, *[1] * n, dtype=torch.float64)),
            n=draw_statistics(getattr(nn, f"BatchNorm{n or 1}d")(4, affine=False)),
        ),
        f"batch_norm, twice, {n}d": case(
            lambda m, x: read(m.a(torch.tanh(m.a(x)))),
            inputs,
            a=draw_statistics(getattr(nn, f"BatchNorm{n or 1}d")(4)),
        ),
    }
    if n:
        conv = getattr(nn, f"Conv{n}d")
        norm = getattr(nn, f"InstanceNorm{n}d")
        batch_norm = getattr(nn, f"BatchNorm{n}d")
        CASES |= {
            f"group_norm, one group, {n}d": case(plain, inputs, a=nn.GroupNorm(1, 4)),
            f"group_norm, a group a channel, {n}d": case(plain, inputs, a=nn.GroupNorm(4, 4)),
            f"group_norm, no parameters, {n}d": case(
                hidden, inputs, h=conv(4, 6, 2), a=nn.GroupNorm(3, 6, affine=False)
            ),
            f"group_norm, of a layer, {n}d": case(hidden, inputs, h=conv(4, 6, 2), a=nn.GroupNorm(3, 6)),
            f"group_norm, as many channels as samples, {n}d": case(
                hidden, inputs, h=conv(4, 7, 2), a=nn.GroupNorm(7, 7)
            ),
            f"instance_norm, {n}d": case(plain, inputs, a=norm(4, affine=True)),
            f"instance_norm, of a layer, {n}d": case(hidden, inputs, h=conv(4, 5, 2), a=norm(5, affine=True)),
            f"instance_norm, no parameters, {n}d": case(hidden, inputs, h=conv(4, 5, 2), a=norm(5)),
            f"instance_norm, running statistics, {n}d": case(
                plain, inputs, a=draw_statistics(norm(4, affine=True, track_running_stats=True))
            ),
            f"instance_norm, as many channels as samples, {n}d": case(
                hidden, inputs, h=conv(4, 7, 2), a=norm(7, affine=True)
            ),
            f"batch_norm, of a layer, {n}d": case(
                hidden, inputs, h=conv(4, 5, 2, bias=False), a=draw_statistics(batch_norm(5))
            ),
            f"batch_norm, as many channels as samples, {n}d": case(
                hidden, inputs, h=conv(4, 7, 2, bias=False), a=draw_statistics(batch_norm(7))
            ),
            f"batch_norm, frames folded, {n}d": case(
                lambda m, x: read(m.a(torch.stack([x, x * x], 1).flatten(0, 1)).unflatten(0, (-1, 2))),
                inputs,
                a=draw_statistics(batch_norm(4)),
            ),
        }
CASES |= {
    "group_norm, functional": case(lambda m, x: read(F.group_norm(x, 2, m.w, None)), IMAGE, w=param(4)),
    "group_norm, folded": case(folded, drawn(B, 3, 4, 5), a=nn.GroupNorm(2, 4)),
    "instance_norm, functional": case(
        lambda m, x: read(F.instance_norm(x, weight=m.w, bias=m.b, use_input_stats=True)), IMAGE, w=param(4), b=param(4)
    ),
    "batch_norm, functional": case(
        lambda m, x: read(F.batch_norm(x, m.mean, m.var, m.w, m.b, False, 0.1, 1e-3)),
        IMAGE,
        w=param(4),
        b=param(4),
        mean=drawn(4),
        var=drawn(4) ** 2,
        may="*",
    ),
    "batch_norm, weight frozen": case(plain, IMAGE, a=frozen(draw_statistics(nn.BatchNorm2d(4)), "weight")),
    "batch_norm, bias frozen": case(plain, IMAGE, a=frozen(draw_statistics(nn.BatchNorm2d(4)), "bias")),
    "batch_norm, tokens folded": case(folded, T, a=draw_statistics(nn.BatchNorm1d(6))),
    "batch_norm, channels last": case(
        lambda m, x: read(m.a(x.to(memory_format=torch.channels_last))), IMAGE, a=draw_statistics(nn.BatchNorm2d(4))
    ),
    "batch_norm, tokens as positions": case(
        lambda m, x: read(m.a(x.transpose(1, 2)).transpose(1, 2)), T, a=draw_statistics(nn.BatchNorm1d(6))
    ),
}

# --- elementwise ----------------------------------------------------------------------------------------------------

for shape in ((6,), (1, 6), (4, 6), (1, 4, 6), (4, 1), (1, 1, 6), (1, 1, 1), (1,), ()):
    CASES |= {
        f"x * p, {shape}": case(lambda m, x: read(x * m.p), T, p=param(*shape)),
        f"x + p, {shape}": case(lambda m, x: read(x + m.p), T, p=param(*shape)),
        f"p - x, {shape}": case(lambda m, x: read(m.p - x), T, p=param(*shape)),
    }
SEVEN = drawn(B, 7, 7)
CASES |= {
    "p * x": case(lambda m, x: read(m.p * x), T, p=param(6)),
    "p + x": case(lambda m, x: read(m.p + x), T, p=param(4, 6)),
    "x - p": case(lambda m, x: read(x - m.p), T, p=param(6)),
    "torch.mul": case(lambda m, x: read(torch.mul(m.p, x)), T, p=param(6)),
    "torch.mul, by name": case(lambda m, x: read(torch.mul(input=x, other=m.p)), T, p=param(6)),
    "x.mul": case(lambda m, x: read(x.mul(m.p)), T, p=param(6)),
    "x.mul_": case(lambda m, x: read(torch.tanh(x).mul_(m.p)), T, p=param(6), may="p"),
    "x *= p, of a layer": case(lambda m, x: read(m.a(x).mul_(m.p)), T, a=L(6, 5), p=param(5), may="p"),
    "torch.add": case(lambda m, x: read(torch.add(x, m.p)), T, p=param(6)),
    "torch.add, alpha": case(lambda m, x: read(torch.add(x, m.p, alpha=-1.7)), T, p=param(6)),
    "torch.add, alpha, parameter first": case(lambda m, x: read(torch.add(m.p, x, alpha=-1.7)), T, p=param(6)),
    "torch.sub, alpha": case(lambda m, x: read(torch.sub(x, m.p, alpha=0.3)), T, p=param(6)),
    "torch.sub, alpha, parameter first": case(lambda m, x: read(torch.sub(m.p, x, alpha=0.3)), T, p=param(6)),
    "x.add_": case(lambda m, x: read(torch.tanh(x).add_(m.p)), T, p=param(6), may="p"),
    "x.add_, of a layer": case(lambda m, x: read(m.a(x).add_(m.p)), T, a=L(6, 5), p=param(5), may="p"),
    "torch.rsub": case(lambda m, x: read(torch.rsub(x, m.p)), T, p=param(6), may="p"),
    "x / p": case(lambda m, x: read(x / m.p.exp()), T, p=param(6), may="p"),
    "p / x": case(lambda m, x: read(m.p / (1 + x**2)), T, p=param(6), may="p"),
    "x ** p": case(lambda m, x: read((1 + x**2) ** m.p), T, p=param(6), may="p"),
    "addcmul": case(lambda m, x: read(torch.addcmul(x, m.p, x, value=0.3)), T, p=param(6), may="p"),
    "addcmul, shift and scale": case(lambda m, x: read(torch.addcmul(m.b, m.g, x)), T, b=param(6), g=param(6), may="*"),
    "lerp": case(lambda m, x: read(torch.lerp(x, x.flip(1), m.p)), T, p=param(6), may="p"),
    "where": case(lambda m, x: read(torch.where(x > 0, x, m.p)), T, p=param(6), may="p"),
    "maximum": case(lambda m, x: read(torch.maximum(x, m.p)), T, p=param(6), may="p"),
    "prelu": case(plain, IMAGE, a=nn.PReLU(4), may="*"),
    "prelu, one slope": case(plain, T, a=nn.PReLU(), may="*"),
    "snake": case(lambda m, x: read(x + torch.sin(m.p * x) ** 2), T, p=param(6)),
    "swish with a slope": case(lambda m, x: read(x * torch.sigmoid(m.p * x)), T, p=param(1)),
    "temperature": case(lambda m, x: read((x @ x.mT * m.p.exp()).softmax(-1)), T, p=param()),
    "scale of channels": case(lambda m, x: read(x * m.p), IMAGE, p=param(4, 1, 1)),
    "scale of channels, viewed": case(lambda m, x: read(x * m.p.view(1, -1, 1, 1)), IMAGE, p=param(4)),
    "scale of channels, indexed": case(lambda m, x: read(x * m.p[:, None, None]), IMAGE, p=param(4)),
    "scale of a map": case(lambda m, x: read(x * m.p), IMAGE, p=param(1, 8, 9)),
    "scale and shift": case(lambda m, x: read(x * m.g + m.b), T, g=param(6), b=param(6)),
    "scale and shift, of a layer": case(lambda m, x: read(m.a(x) * m.g + m.b), T, a=L(6, 5), g=param(5), b=param(5)),
    "x * p * q": case(lambda m, x: read(x * m.p * m.q), T, p=param(6), q=param(4, 1)),
    "x * p, twice": case(lambda m, x: read(m.p * torch.tanh(x * m.p)), T, p=param(6)),
    "x * p + p": case(lambda m, x: read(torch.sin(x * m.p) + m.p), T, p=param(6), may="p"),
    "x * (p * q)": case(lambda m, x: read(x * (m.p * m.q)), T, p=param(6), q=param(4, 1)),
    "x + p + q": case(lambda m, x: read(x + m.p + m.q), T, p=param(6), q=param(4, 1)),
    "x + (p + q)": case(lambda m, x: read(x + (m.p + m.q)), T, p=param(6), q=param(4, 1)),
    "x * p, wider than x": case(lambda m, x: read(x[:, :1] * m.p), T, p=param(4, 6)),
    "x + p, wider than x": case(lambda m, x: read(x[:, None] + m.p), X, p=param(4, 6)),
    "x * p, x without features": case(lambda m, x: read(x[:, :1] * m.p), X, p=param(5)),
    "x + p, time first": case(lambda m, x: read((x.transpose(0, 1) + m.p).transpose(0, 1)), T, p=param(4, 1, 6)),
    "x * p, time first": case(lambda m, x: read((x.transpose(0, 1) * m.p).transpose(0, 1)), T, p=param(6)),
    "x * p, samples last": case(lambda m, x: read((x.T * m.p).T), X, p=param(6, 1)),
    "x + p, folded": case(lambda m, x: read((x.flatten(0, 1) + m.p).unflatten(0, (-1, 4))), T, p=param(6)),
    "x + p, everything is seven": case(lambda m, x: read(x + m.p, 7), SEVEN, p=param(7, 7)),
    "x * p, everything is seven": case(lambda m, x: read(x * m.p, 7), SEVEN, p=param(7)),
    "x * p, everything is seven, time first": case(
        lambda m, x: read((x.transpose(0, 1) * m.p).transpose(0, 1), 7), SEVEN, p=param(7, 1, 7)
    ),
    "layer scale": case(lambda m, x: read(x + m.gamma * m.a(x)), T, a=L(6, 6), gamma=param(6)),
    "layer scale, channels first": case(
        lambda m, x: read(x + m.layer_scale * m.a(x)),
        IMAGE,
        a=nn.Conv2d(4, 4, 3, padding=1),
        layer_scale=param(4, 1, 1),
    ),
    "gate from zero": case(lambda m, x: read(x + m.gate.tanh() * m.a(x)), T, a=L(6, 6), gate=param(1)),
    "parameter alone": case(lambda m, x: read(m.a(x)) + m.p, T, a=L(6, 5), p=param(5)),
    "parameter alone, expanded": case(lambda m, x: read(m.a(x)) + m.p.expand(len(x), 5), T, a=L(6, 5), p=param(5)),
    "token shift": case(
        lambda m, x: read(m.a(x * m.mix + F.pad(x, (0, 0, 1, -1)) * (1 - m.mix))), T, a=L(6, 5), mix=param(6)
    ),
    "mixture of layers": case(
        lambda m, x: read((torch.stack([x, m.a(x)], 0) * m.mix.softmax(0)[:, None, None, None]).sum(0)),
        T,
        a=L(6, 6),
        mix=param(2),
    ),
    "Fourier features": case(lambda m, x: read(torch.cat([(x @ m.w).sin(), (x @ m.w).cos()], -1)), X, w=param(6, 5)),
    "radial basis": case(
        lambda m, x: read(torch.exp(-((x[:, None] - m.centres) ** 2).sum(-1) * m.widths.exp())),
        X,
        centres=param(5, 6),
        widths=param(5),
    ),
    "cdist": case(lambda m, x: read(torch.cdist(x, m.p)), X, p=param(5, 6), may="p"),
}

# --- tokens and positions -------------------------------------------------------------------------------------------


def token(join, read_out=read):
    return lambda m, x: read_out(m.c(torch.tanh(join(m, m.a(x)))))


def mixed(values):
    """Attention without parameters, then the first token."""
    return read(((values @ values.mT).softmax(-1) @ values)[:, 0])


def tokens_case(join, read_out=read, inputs=T, may=(), **members):
    return case(token(join, read_out), inputs, a=L(6, 5), c=L(5, 3), may=may, **members)


CASES |= {
    "class token, expand": tokens_case(lambda m, x: torch.cat([m.t.expand(len(x), -1, -1), x], 1), t=param(1, 1, 5)),
    "class token, first read": tokens_case(
        lambda m, x: torch.cat([m.t.expand(len(x), -1, -1), x], 1), mixed, t=param(1, 1, 5)
    ),
    "class token, last": tokens_case(lambda m, x: torch.cat([x, m.t.expand(len(x), -1, -1)], 1), t=param(1, 1, 5)),
    "class token, repeat": tokens_case(
        lambda m, x: torch.cat([m.t.repeat(len(x), 1, 1), x], 1), t=param(1, 1, 5), may="t"
    ),
    "class token, expand_as": tokens_case(
        lambda m, x: torch.cat([m.t.expand_as(x[:, :1]), x], 1), t=param(1, 1, 5), may="t"
    ),
    "class token, broadcast_to": tokens_case(
        lambda m, x: torch.cat([torch.broadcast_to(m.t, (len(x), 1, 5)), x], 1), t=param(5), may="t"
    ),
    "class token, a vector": tokens_case(
        lambda m, x: torch.cat([m.t[None, None].expand(len(x), -1, -1), x], 1), t=param(5)
    ),
    "class token, plus its position": tokens_case(
        lambda m, x: torch.cat([(m.t + m.p[:, :1]).expand(len(x), -1, -1), x + m.p[:, 1:]], 1),
        mixed,
        t=param(1, 1, 5),
        p=param(1, 5, 5),
    ),
    "class token, then positions": tokens_case(
        lambda m, x: torch.cat([m.t.expand(len(x), -1, -1), x], 1) + m.p, mixed, t=param(1, 1, 5), p=param(1, 5, 5)
    ),
    "class token and registers": tokens_case(
        lambda m, x: torch.cat([m.t.expand(len(x), -1, -1), m.r.expand(len(x), -1, -1), x], 1),
        mixed,
        t=param(1, 1, 5),
        r=param(1, 3, 5),
    ),
    "class token, time first": tokens_case(
        lambda m, x: torch.cat([m.t.expand(-1, len(x), -1), x.transpose(0, 1)], 0).transpose(0, 1), t=param(1, 1, 5)
    ),
    "class token, as many tokens as samples": tokens_case(
        lambda m, x: torch.cat([m.t.expand(-1, len(x), -1), x.transpose(0, 1)], 0).transpose(0, 1),
        inputs=drawn(B, 7, 6),
        t=param(3, 1, 5),
    ),
    "class token, stack": tokens_case(
        lambda m, x: torch.stack([m.t.expand(len(x), -1), x[:, 0], x[:, 1]], 1), t=param(5)
    ),
    "mask token": tokens_case(
        lambda m, x: torch.where(x[..., :1] > 0, m.t.expand(len(x), 4, -1), x), t=param(1, 1, 5), may="t"
    ),
    "mask token, by products": tokens_case(
        lambda m, x: x * (x[..., :1] > 0) + m.t * (x[..., :1] <= 0), t=param(1, 1, 5)
    ),
    "learned queries": tokens_case(lambda m, x: (m.q.expand(len(x), -1, -1) @ x.mT).softmax(-1) @ x, q=param(1, 3, 5)),
    "learned queries, repeated": tokens_case(
        lambda m, x: (m.q.unsqueeze(0).repeat(len(x), 1, 1) @ x.mT).softmax(-1) @ x, q=param(3, 5), may="q"
    ),
    "learned queries, by a product": tokens_case(lambda m, x: (m.q @ x.mT).softmax(-1) @ x, q=param(3, 5)),
    "learned state": case(
        lambda m, x: read(
            functools.reduce(lambda h, t: torch.tanh(m.a(x[:, t]) + m.h(h)), range(4), m.s.expand(len(x), -1))
        ),
        T,
        a=L(6, 5),
        h=L(5, 5),
        s=param(1, 5),
    ),
    "positions, whole": tokens_case(lambda m, x: x + m.p, p=param(1, 4, 5)),
    "positions, without a sample axis": tokens_case(lambda m, x: x + m.p, p=param(4, 5)),
    "positions, sliced": tokens_case(lambda m, x: x + m.p[:, : x.shape[1]], p=param(1, 9, 5)),
    "positions, sliced, rows": tokens_case(lambda m, x: x + m.p[: x.shape[1]], p=param(9, 5)),
    "positions, from the second": tokens_case(lambda m, x: x + m.p[:, 1:], p=param(1, 5, 5)),
    "positions, narrow": tokens_case(lambda m, x: x + m.p.narrow(0, 2, 4), p=param(9, 5)),
    "positions, gathered": tokens_case(lambda m, x: x + F.embedding(positions(x), m.p), p=param(9, 5)),
    "positions, gathered by index": tokens_case(lambda m, x: x + m.p[positions(x)], p=param(9, 5)),
    "positions, index_select": tokens_case(lambda m, x: x + m.p.index_select(0, positions(x)), p=param(9, 5)),
    "positions, gathered for each sample": tokens_case(
        lambda m, x: x + F.embedding(positions(x).expand(len(x), -1), m.p), p=param(9, 5)
    ),
    "positions, expanded": tokens_case(lambda m, x: x + m.p.expand(len(x), -1, -1), p=param(1, 4, 5)),
    "positions, repeated": tokens_case(lambda m, x: x + m.p.repeat(len(x), 1, 1), p=param(1, 4, 5), may="p"),
    "positions, rows and columns": case(
        lambda m, x: read(m.c(torch.tanh(m.a(x.permute(0, 2, 3, 1)) + m.r[:, None] + m.s[None]))),
        IMAGE,
        a=L(4, 5),
        c=L(5, 3),
        r=param(8, 5),
        s=param(9, 5),
    ),
    "positions, interpolated": tokens_case(
        lambda m, x: x + F.interpolate(m.p.permute(0, 2, 1), size=4, mode="linear").permute(0, 2, 1), p=param(1, 3, 5)
    ),
    "positions, joined to the features": tokens_case(
        lambda m, x: torch.cat([x[..., :2], m.p.expand(len(x), -1, -1)], -1), p=param(1, 4, 3)
    ),
    "positions, as many as samples": tokens_case(lambda m, x: x + m.p, inputs=drawn(B, 7, 6), p=param(7, 5)),
    "positions, time first": tokens_case(
        lambda m, x: (x.transpose(0, 1) + m.p[:, None]).transpose(0, 1), p=param(4, 5)
    ),
    "positions, time first, as many as samples": tokens_case(
        lambda m, x: (x.transpose(0, 1) + m.p[:, None]).transpose(0, 1), inputs=drawn(B, 7, 6), p=param(7, 5)
    ),
    "positions, used twice": tokens_case(lambda m, x: torch.tanh(x + m.p) + m.p, p=param(4, 5)),
    "bias of attention": tokens_case(lambda m, x: (x @ x.mT + m.p).softmax(-1) @ x, p=param(4, 4)),
    "bias of attention, of heads": tokens_case(
        lambda m, x: ((x @ x.mT)[:, None] + m.p).softmax(-1).mean(1) @ x, p=param(1, 3, 4, 4)
    ),
    "bias of scaled_dot_product_attention": tokens_case(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.p.expand(len(x), -1, -1)), p=param(1, 4, 4)
    ),
}

# --- views of parameters --------------------------------------------------------------------------------------------


def halves(m, x):
    q, k = m.w.chunk(2)
    return read(F.linear(x, q) * F.linear(x, k))


def thirds(m, x):
    q, k, v = (F.linear(x, w, b) for w, b in zip(m.w.split(5), m.b.split(5), strict=True))
    return read((q @ k.mT).softmax(-1) @ v)


VIEWS = {
    "w[:3]": (lambda w: w[:3], (5, 6)),
    "w[1:4]": (lambda w: w[1:4], (5, 6)),
    "w[::2]": (lambda w: w[::2], (5, 6)),
    "w[:, 1:7]": (lambda w: w[:, 1:7], (5, 9)),
    "w[:, ::2]": (lambda w: w[:, ::2], (5, 12)),
    "w[2]": (lambda w: w[2], (3, 5, 6)),
    "w.t()": (lambda w: w.t(), (6, 5)),
    "w.T": (lambda w: w.T, (6, 5)),
    "w.mT": (lambda w: w.mT, (6, 5)),
    "w.transpose(0, 1)": (lambda w: w.transpose(0, 1), (6, 5)),
    "w.permute": (lambda w: w.permute(1, 0), (6, 5)),
    "w.view": (lambda w: w.view(5, 6), (3, 10)),
    "w.reshape": (lambda w: w.reshape(5, 6), (30,)),
    "w.flatten": (lambda w: w.flatten(1), (5, 2, 3)),
    "w.unflatten": (lambda w: w.unflatten(0, (5, 6)), (30,)),
    "w.squeeze": (lambda w: w.squeeze(-1), (5, 6, 1)),
    "w.T.reshape": (lambda w: w.T.reshape(5, 6), (3, 10)),
    "w.T[:5]": (lambda w: w.T[:5], (6, 9)),
    "w.narrow": (lambda w: w.narrow(0, 1, 4), (7, 6)),
    "w.select": (lambda w: w.select(1, 0), (5, 2, 6)),
    "w.unbind": (lambda w: w.unbind(0)[1], (3, 5, 6)),
    "w.movedim": (lambda w: w.movedim(0, 1), (6, 5)),
    "w.swapaxes": (lambda w: w.swapaxes(0, 1), (6, 5)),
    "w.contiguous": (lambda w: w.t().contiguous(), (6, 5)),
    "w.clone": (lambda w: w.clone(), (5, 6)),
    "w.to(dtype)": (lambda w: w.to(torch.float64), (5, 6)),
    "w.type_as": (lambda w: w.type_as(w), (5, 6)),
    "w.double()": (lambda w: w.double(), (5, 6)),
    "w.expand": (lambda w: w.expand(5, 6), (1, 6)),
    "w.diagonal": (lambda w: torch.diag_embed(w)[:5], (6,)),
    "w.flip": (lambda w: w.flip(0), (5, 6)),
    "w.roll": (lambda w: w.roll(2, 1), (5, 6)),
    "w[rows]": (lambda w: w[[4, 0, 0, 2]], (5, 6)),
    "w.repeat": (lambda w: w.repeat(2, 1), (5, 6)),
    "w.repeat_interleave": (lambda w: w.repeat_interleave(2, 0), (5, 6)),
    "as_strided": (lambda w: w.as_strided((5, 6), (5, 1)), (36,)),
}
for name, (view, shape) in VIEWS.items():
    CASES |= {
        f"view {name}, linear": case(lambda m, x, view=view: read(F.linear(x, view(m.w))), T, w=param(*shape)),
        f"view {name}, @": case(lambda m, x, view=view: read(view(m.w) @ x.mT), T, w=param(*shape)),
        f"view {name}, x * p": case(lambda m, x, view=view: read(x[:, 0, None] * view(m.w)), T, w=param(*shape)),
    }
CASES |= {
    "view, chunks": case(halves, T, w=param(10, 6)),
    "view, split with biases": case(thirds, T, w=param(15, 6), b=param(15)),
    "view, slices that overlap": case(
        lambda m, x: read(F.linear(x, m.w[:4]) * F.linear(x, m.w[2:6])), T, w=param(6, 6)
    ),
    "view, whole and slice": case(
        lambda m, x: read(torch.cat([F.linear(x, m.w), F.linear(x, m.w[:3])], -1)), T, w=param(6, 6)
    ),
    "view, whole and transposed": case(
        lambda m, x: read(F.linear(torch.tanh(F.linear(x, m.w)), m.w.t())), T, w=param(5, 6)
    ),
    "view, bias sliced": case(lambda m, x: read(F.linear(x, m.w, m.b[1:6])), T, w=param(5, 6), b=param(9)),
    "view, one vector holds all": case(
        lambda m, x: read(F.linear(x, m.w[:30].view(5, 6), m.w[30:])), T, w=param(35), may="w"
    ),
    "view, filters sliced": case(
        lambda m, x: read(F.conv2d(x[:, :3], m.w[:5, :3], m.b[:5])), IMAGE, w=param(6, 4, 3, 3), b=param(6)
    ),
    "view, filters of a vector": case(lambda m, x: read(F.conv1d(x, m.w.view(5, 4, 3))), SIGNAL, w=param(60)),
    "view, table sliced": case(lambda m, x: read(F.embedding(x, m.w[:11])), IDS, w=param(13, 5)),
    "view, gain sliced": case(lambda m, x: read(F.layer_norm(x, (6,), m.w[:6], m.w[6:])), T, w=param(12), may="w"),
    "view, used by unlike operations": case(
        lambda m, x: read(F.linear(x, m.w) + x.mean(-1, keepdim=True) * m.w[:, 0]), T, w=param(5, 6), may="w"
    ),
    "weight as bias": case(
        lambda m, x: read(F.linear(F.linear(x, m.w, m.v), m.w) + F.linear(m.v.expand(len(x), 6), m.w)),
        X,
        w=param(6, 6),
        v=param(6),
        may="*",
    ),
}

# --- parameters that depend on parameters only ----------------------------------------------------------------------


class Positive(nn.Module):
    def forward(self, w):
        return F.softplus(w)


class Skew(nn.Module):
    def forward(self, w):
        return w.triu(1) - w.triu(1).mT


def parametrised(module, transform):
    parametrize.register_parametrization(module, "weight", transform)
    return module


def spectral(module):
    """New spectral norm, with vectors that are not drawn anew in every process."""
    torch.manual_seed(0)
    return parametrizations.spectral_norm(module)


NORMED = {
    "linear": (lambda: L(6, 5), T),
    "conv1d": (lambda: nn.Conv1d(4, 5, 3), SIGNAL),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), IMAGE),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 5, 2, stride=2), IMAGE[..., :4, :5]),
    "embedding": (lambda: nn.Embedding(11, 5), IDS),
}
for name, (make, inputs) in NORMED.items():
    CASES |= {
        f"weight_norm, old, {name}": case(plain, inputs, a=lambda make=make: nn.utils.weight_norm(make())),
        f"weight_norm, new, {name}": case(plain, inputs, a=parametrizations.weight_norm(make())),
        f"weight_norm, new, over dim 1, {name}": case(plain, inputs, a=parametrizations.weight_norm(make(), dim=1)),
        f"weight_norm, whole, {name}": case(plain, inputs, a=parametrizations.weight_norm(make(), dim=None)),
        f"pruned, {name}": case(plain, inputs, a=prune.l1_unstructured(make(), "weight", 0.4)),
        f"positive, {name}": case(plain, inputs, a=parametrised(make(), Positive())),
    }
CASES |= {
    "weight_norm, twice": case(lambda m, x: read(m.a(torch.tanh(m.a(x)))), T, a=parametrizations.weight_norm(L(6, 6))),
    "weight_norm, old, twice": case(
        lambda m, x: read(m.a(torch.tanh(m.a(x)))), T, a=lambda: nn.utils.weight_norm(L(6, 6))
    ),
    "spectral_norm, new, linear": case(plain, T, a=spectral(L(6, 5))),
    "spectral_norm, new, conv2d": case(plain, IMAGE, a=spectral(nn.Conv2d(4, 5, 3))),
    "orthogonal": case(plain, T, a=parametrizations.orthogonal(L(6, 6, bias=False), "weight", "cayley")),
    "skew": case(plain, T, a=parametrised(L(6, 6), Skew())),
    "masked": case(lambda m, x: read(F.linear(x, m.w * (m.w > 0))), T, w=param(5, 6)),
    "masked by a buffer": case(
        lambda m, x: read(F.linear(x, m.w * torch.ones(5, 6, dtype=x.dtype).tril())), T, w=param(5, 6)
    ),
    "low rank, merged": case(
        lambda m, x: read(F.linear(x, m.w + m.u @ m.v)), T, w=param(5, 6), u=param(5, 2), v=param(2, 6)
    ),
    "low rank, merged, weight frozen": case(
        lambda m, x: read(F.linear(x, m.a.weight + 0.5 * m.u @ m.v, m.a.bias)),
        T,
        a=frozen(L(6, 5), "weight"),
        u=param(5, 2),
        v=param(2, 6),
    ),
    "low rank, beside": case(
        lambda m, x: read(m.a(x) + 2 * m.u(m.v(x))), T, a=L(6, 5), u=L(2, 5, bias=False), v=L(6, 2, bias=False)
    ),
    "stacked": case(lambda m, x: read(F.linear(x, torch.cat([m.v, m.w]))), T, v=param(2, 6), w=param(3, 6)),
    "stacked, experts": case(
        lambda m, x: read(torch.einsum("btd,hde->bhte", x, torch.stack([m.v, m.w]))), T, v=param(6, 5), w=param(6, 5)
    ),
    "normalised": case(lambda m, x: read(F.linear(x, F.normalize(m.w, dim=-1))), T, w=param(5, 6)),
    "softmax": case(lambda m, x: read(m.w.softmax(-1) @ x), T, w=param(5, 4)),
    "exponential decay": case(lambda m, x: read(x * torch.exp(-m.w.exp())), T, w=param(6)),
    "Kronecker": case(lambda m, x: read(F.linear(x, torch.kron(m.v, m.w))), T, v=param(5, 2), w=param(1, 3)),
    "filters by frequency": case(
        lambda m, x: read(F.conv1d(x, torch.fft.irfft(torch.view_as_complex(m.w), n=3))),
        SIGNAL,
        w=param(5, 4, 2, 2),
    ),
    "derived and plain": case(lambda m, x: read(F.linear(torch.tanh(F.linear(x, m.w)), m.w * m.w)), T, w=param(6, 6)),
    "weight through a linear": case(
        lambda m, x: read(F.linear(x, F.linear(m.a, m.b.weight))), T, a=param(5, 3), b=L(3, 6, bias=False), may="*"
    ),
    "hypernetwork of samples": case(
        lambda m, x: read(torch.einsum("bd,bde->be", x, m.h(x).view(-1, 6, 5))), X, h=L(6, 30)
    ),
}

# --- attention ------------------------------------------------------------------------------------------------------


def attend(m, x):
    return read(m.a(x, x, x, need_weights=False)[0])


def attend_weights(m, x):
    values, weights = m.a(x, x, x, need_weights=True)
    return read(torch.cat([values, weights], -1))


def attend_time_first(m, x):
    x = x.transpose(0, 1)
    return read(m.a(x, x, x, need_weights=False)[0].transpose(0, 1))


def cross(m, x):
    memory = torch.tanh(m.h(x[:, :3]))
    return read(m.a(x, memory, memory.flip(1), need_weights=False)[0])


def cross_wide(m, x):
    return read(m.a(x, torch.tanh(m.h(x[:, :3])), torch.tanh(m.g(x[:, 1:])))[0])


def masked_attention(m, x, mask):
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
    return read(m.a(x, x, x, attn_mask=causal, key_padding_mask=mask, need_weights=False)[0])


PADDED = torch.zeros(B, 4, dtype=torch.bool)
PADDED[1, 3] = PADDED[4, 2:] = True

for bias, kv in itertools.product((True, False), (False, True)):
    name = f"{'' if bias else ', no bias'}{', add_bias_kv' if kv else ''}"
    options = {"embed_dim": 6, "num_heads": 2, "bias": bias, "add_bias_kv": kv}
    may = ("a.bias_k", "a.bias_v")
    CASES |= {
        f"attention, self{name}": case(attend, T, a=nn.MultiheadAttention(**options, batch_first=True), may=may),
        f"attention, self, weights{name}": case(
            attend_weights, T, a=nn.MultiheadAttention(**options, batch_first=True), may=may
        ),
        f"attention, self, time first{name}": case(attend_time_first, T, a=nn.MultiheadAttention(**options), may=may),
        f"attention, self, as many tokens as samples{name}": case(
            attend_time_first, drawn(B, 7, 6), a=nn.MultiheadAttention(**options), may=may
        ),
        f"attention, cross{name}": case(
            cross, T, a=nn.MultiheadAttention(**options, batch_first=True), h=L(6, 6), may=may
        ),
        f"attention, cross, other widths{name}": case(
            cross_wide,
            T,
            a=nn.MultiheadAttention(**options, kdim=3, vdim=5, batch_first=True),
            h=L(6, 3),
            g=L(6, 5),
            may=may,
        )
        if not kv
        else case(
            lambda m, x: read(m.a(x, torch.tanh(m.h(x)), torch.tanh(m.g(x)))[0]),
            T,
            a=nn.MultiheadAttention(**options, kdim=3, vdim=5, batch_first=True),
            h=L(6, 3),
            g=L(6, 5),
            may=may,
        ),
    }
CASES |= {
    "attention, masked": case(
        masked_attention,
        {"x": T, "mask": PADDED},
        a=nn.MultiheadAttention(6, 2, batch_first=True),
    ),
    "attention, add_zero_attn": case(attend, T, a=nn.MultiheadAttention(6, 3, add_zero_attn=True, batch_first=True)),
    "attention, of a layer": case(
        lambda m, x: attend(m, torch.tanh(m.h(x))), T, h=L(6, 6), a=nn.MultiheadAttention(6, 2, batch_first=True)
    ),
    "attention, twice": case(
        lambda m, x: attend(m, attend_only(m, x)), T, a=nn.MultiheadAttention(6, 2, batch_first=True)
    ),
    "attention, learned queries": case(
        lambda m, x: read(m.a(m.q.expand(len(x), -1, -1), x, x)[0]),
        T,
        q=param(1, 3, 6),
        a=nn.MultiheadAttention(6, 2, batch_first=True),
    ),
    "attention, by hand": case(
        lambda m, x: read(
            F.scaled_dot_product_attention(
                *(w(x).unflatten(-1, (2, 3)).transpose(1, 2) for w in (m.q, m.k, m.v)), is_causal=True
            )
            .transpose(1, 2)
            .flatten(2)
        ),
        T,
        q=L(6, 6),
        k=L(6, 6),
        v=L(6, 6, bias=False),
    ),
    "attention, shared key": case(
        lambda m, x: read(
            F.scaled_dot_product_attention(
                m.q(x).unflatten(-1, (2, 3)).transpose(1, 2), m.k(x)[:, None], m.k(x)[:, None].expand(-1, 2, -1, -1)
            )
        ),
        T,
        q=L(6, 6),
        k=L(6, 3),
    ),
    "attention, einsum heads": case(
        lambda m, x: read(
            torch.einsum(
                "bhts,bshe->bthe",
                torch.einsum(
                    "bthe,bshe->bhts",
                    torch.einsum("btd,dhe->bthe", x, m.q),
                    torch.einsum("btd,dhe->bthe", x, m.k),
                ).softmax(-1),
                torch.einsum("btd,dhe->bthe", x, m.v),
            )
        ),
        T,
        q=param(6, 2, 3),
        k=param(6, 2, 3),
        v=param(6, 2, 3),
    ),
}


def attend_only(m, x):
    return m.a(x, x, x, need_weights=False)[0]


for norm_first, batch_first in itertools.product((False, True), (False, True)):
    name = f"{', norm first' if norm_first else ''}{', batch first' if batch_first else ''}"
    options = {"d_model": 6, "nhead": 2, "dim_feedforward": 5, "norm_first": norm_first, "batch_first": batch_first}

    def run(m, x, batch_first=batch_first):
        return read(m.a(x) if batch_first else m.a(x.transpose(0, 1)).transpose(0, 1))

    def decode(m, x, batch_first=batch_first):
        memory, target = (x[:, :3], x) if batch_first else (x[:, :3].transpose(0, 1), x.transpose(0, 1))
        values = m.a(target, memory)
        return read(values if batch_first else values.transpose(0, 1))

    CASES |= {
        f"nn.TransformerEncoder{name}": case(
            run, T, a=nn.TransformerEncoder(nn.TransformerEncoderLayer(**options), 2, enable_nested_tensor=False)
        ),
        f"nn.TransformerDecoder{name}": case(
            decode, T, a=nn.TransformerDecoder(nn.TransformerDecoderLayer(**options), 1)
        ),
    }
CASES |= {
    "nn.TransformerEncoder, no bias, final norm": case(
        plain,
        T,
        a=nn.TransformerEncoder(
            nn.TransformerEncoderLayer(6, 2, 5, bias=False, batch_first=True, activation="gelu"),
            1,
            norm=nn.LayerNorm(6),
            enable_nested_tensor=False,
        ),
    ),
    "nn.TransformerEncoder, masked": case(
        lambda m, x, mask: read(m.a(x, src_key_padding_mask=mask)),
        {"x": T, "mask": PADDED},
        a=nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 5, batch_first=True), 1, enable_nested_tensor=False),
    ),
    "nn.Transformer": case(lambda m, x: read(m.a(x, x[:, :3])), T, a=nn.Transformer(6, 2, 1, 1, 5, batch_first=True)),
}

# --- what has no rule -----------------------------------------------------------------------------------------------


class Plain(torch.autograd.Function):
    """An operation of the user's own, which vmap can run."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight):
        return F.linear(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


class Stubborn(torch.autograd.Function):
    """The same in the old style, which vmap cannot run; its backward is not what its forward says."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, 2 * grad.flatten(0, -2).T @ x.flatten(0, -2)


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = L(6, 5, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh(self.a(x))


def energy(m, x):
    with torch.enable_grad():
        x = x.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(m.b(torch.tanh(m.a(x))).sum(), x, create_graph=True)
    return slope


def routed(m, x):
    out = x.new_zeros(len(x), 5)
    for sign, expert in zip((True, False), m.experts, strict=True):
        mine = (x[:, 0] > 0) == sign
        out[mine] = torch.tanh(expert(x[mine]))
    return read(out)


def mixture(m, x):
    weights = m.gate(x).softmax(-1)
    return read(sum(weights[:, i, None] * torch.tanh(e(x)) for i, e in enumerate(m.experts)))


def sorted_inside(m, x):
    order = torch.argsort(x[:, 0])
    return read(m.a(x[order])[torch.argsort(order)])


def in_a_list():
    model = Custom(lambda m, x: read(torch.tanh(x @ m.kept[0].T) @ m.b.T), a=param(5, 6), b=param(3, 5))
    model.kept = [model.a]
    return model


def rotated(m, x):
    turned = torch.view_as_complex(m.a(x).unflatten(-1, (3, 2)).contiguous()) * torch.polar(
        torch.ones(4, 3, dtype=x.dtype), torch.arange(12.0, dtype=x.dtype).view(4, 3)
    )
    return read(torch.view_as_real(turned).flatten(2))


for rnn, many in itertools.product((nn.RNN, nn.LSTM, nn.GRU), (False, True)):
    CASES[f"{rnn.__name__}{', two layers, both ways' if many else ''}"] = case(
        lambda m, x: read(m.a(x)[0]), T, a=rnn(6, 3, num_layers=1 + many, bidirectional=many, batch_first=True), may="*"
    )
CASES |= {
    "LSTM, time first, no bias": case(
        lambda m, x: read(m.a(x.transpose(0, 1))[0].transpose(0, 1)), T, a=nn.LSTM(6, 3, bias=False), may="*"
    ),
    "LSTM, projected": case(lambda m, x: read(m.a(x)[0]), T, a=nn.LSTM(6, 3, proj_size=2, batch_first=True), may="*"),
    "LSTMCell": case(
        lambda m, x: read(functools.reduce(lambda h, t: m.a(x[:, t], h), range(4), None)[0]),
        T,
        a=nn.LSTMCell(6, 3),
        may="*",
    ),
    "GRUCell": case(
        lambda m, x: read(functools.reduce(lambda h, t: m.a(x[:, t], h), range(4), x[:, 0, :3])),
        T,
        a=nn.GRUCell(6, 3),
        may="*",
    ),
    "custom function": case(lambda m, x: read(Plain.apply(m.a(x), m.w)), T, a=L(6, 5), w=param(3, 5), may="w"),
    "custom function, vmap cannot run it": case(
        lambda m, x: read(Stubborn.apply(m.a(x), m.w)), T, a=L(6, 5), w=param(3, 5), may="w"
    ),
    "custom function beside a rule": case(
        lambda m, x: read(Plain.apply(m.a(x), m.w) + F.linear(m.a(x), m.w)), T, a=L(6, 5), w=param(3, 5), may="w"
    ),
    "scripted submodule": Case(
        lambda: Custom(lambda m, x: read(m.c(m.s(x))), s=torch.jit.script(Scripted()), c=L(5, 3)), T, ("s.*",)
    ),
    "differentiates itself": case(energy, X, a=L(6, 5), b=L(5, 1), may="*"),
    "routed": case(routed, X, experts=nn.ModuleList([L(6, 5), L(6, 5)]), may="*"),
    "mixture of experts": case(mixture, X, gate=L(6, 2), experts=nn.ModuleList([L(6, 5), L(6, 5)])),
    "sorted inside": case(sorted_inside, X, a=L(6, 5), may="*"),
    "parameter in a list": Case(in_a_list, X, ("*",)),
    "complex product": case(
        lambda m, x: read(torch.view_as_real(torch.complex(x, x * x) @ torch.view_as_complex(m.w)).flatten(1)),
        X,
        w=param(6, 5, 2),
        may="w",
    ),
    "complex, rotated": case(rotated, T, a=L(6, 6)),
    "complex, Fourier layer": case(
        lambda m, x: read(
            torch.fft.irfft(torch.einsum("bix,iox->box", torch.fft.rfft(x), torch.view_as_complex(m.w)), n=9) + m.a(x)
        ),
        SIGNAL,
        w=param(4, 5, 5, 2),
        a=nn.Conv1d(4, 5, 1),
        may="w",
    ),
    "complex, Fourier mixing": case(lambda m, x: read(m.a(torch.fft.fft2(x).real)), T, a=L(6, 5)),
    "adaptive softmax's tail": case(
        lambda m, x: m.a.log_prob(x)[:, :7], X, a=nn.AdaptiveLogSoftmaxWithLoss(6, 9, [3, 5], 2.0), may="*"
    ),
    "graph, by a constant adjacency": case(
        lambda m, x: read(torch.cos(torch.arange(16.0, dtype=x.dtype)).view(4, 4) @ m.a(x)), T, a=L(6, 5)
    ),
    "graph, by scatter": case(
        lambda m, x: read(torch.zeros_like(m.a(x)).index_add(1, torch.tensor([1, 1, 0, 3]), m.a(x))), T, a=L(6, 5)
    ),
}


# --- the same operations by other names -----------------------------------------------------------------------------


def joined_token(expand):
    return lambda m, x: read(torch.cat([expand(m.t, x), x], 1))


CASES |= {
    "mv, method": case(lambda m, x: torch.tanh(x.mv(m.v))[:, None], X, v=param(6)),
    "addmv": case(lambda m, x: torch.tanh(torch.addmv(m.b, x, m.v, alpha=0.7))[:, None], X, v=param(6), b=param(1)),
    "addmv, method": case(lambda m, x: torch.tanh(m.b.addmv(x, m.v, beta=0.7))[:, None], X, v=param(6), b=param(1)),
    "bmm, method": case(lambda m, x: read(x.transpose(0, 1).bmm(m.w).transpose(0, 1)), T, w=param(4, 6, 5)),
    "baddbmm, method": case(
        lambda m, x: read(m.b.baddbmm(x.transpose(0, 1), m.w, beta=0.3).transpose(0, 1)),
        T,
        w=param(4, 6, 5),
        b=param(4, 1, 5),
    ),
    "index_select, function": case(
        lambda m, x: read(torch.index_select(m.w, 0, x.flatten()).unflatten(0, x.shape)), IDS, w=param(11, 3)
    ),
    "rms_norm, function": case(lambda m, x: read(torch.rms_norm(x, (6,), m.w)), T, w=param(6)),
    "+, the other way round": case(lambda m, x: read(x.__radd__(m.v)), T, v=param(6)),
    "-, the other way round": case(lambda m, x: read(x.__rsub__(m.v)), T, v=param(6)),
    "-, the other way round, from samples": case(lambda m, x: read(m.v.__rsub__(x)), T, v=param(6)),
    "*, the other way round": case(lambda m, x: read(x.__rmul__(m.v)), T, v=param(6)),
    "subtract": case(lambda m, x: read(torch.subtract(x, m.v, alpha=0.3)), T, v=param(6)),
    "sub, in place": case(lambda m, x: read(torch.tanh(x).sub_(m.v, alpha=0.3)), T, v=param(6)),
    "multiply": case(lambda m, x: read(torch.multiply(x, m.v)), T, v=param(6)),
    "addcmul, method": case(lambda m, x: read(x.addcmul(m.v, x.cos(), value=0.3)), T, v=param(6)),
    "token, expand by a size": case(joined_token(lambda t, x: t.expand(x[:, :2].shape)), T, t=param(1, 2, 6)),
    "token, broadcast_to, method": case(joined_token(lambda t, x: t.broadcast_to((len(x), 2, 6))), T, t=param(2, 1)),
    "token, tile": case(joined_token(lambda t, x: torch.tile(t, (len(x), 1, 1))), T, t=param(1, 2, 6)),
    "token, tile, method": case(joined_token(lambda t, x: t.tile(len(x), 1, 1)), T, t=param(1, 2, 6)),
}

# In torch 2.13 the backward of these under vmap of vmap is wrong, or raises unless samples and covectors are as many.
WRONG_UNDER_VMAP = ("prelu", "prelu, one slope", "cdist")

# --- the tests ------------------------------------------------------------------------------------------------------


# Torch functions whose rule said something in a case.
USED = set()


@pytest.fixture(autouse=True, scope="module")
def noted():
    """Note which rules are used."""

    def note(func, rule, *args, **kwargs):
        bound = rule(*args, **kwargs)
        if bound is not None:
            USED.add(func)
        return bound

    with pytest.MonkeyPatch.context() as patch:
        for func, rule in list(RULES.items()):
            patch.setitem(RULES, func, functools.partial(note, func, rule))
        yield


@functools.cache
def fallback_names(name):
    """The fallback's parameters of a case that is exact; raises if it is not."""
    one = CASES[name]
    return tuple(fallback_of(check_every_parameter(redraw(one.make().double()), one.inputs)))


@pytest.mark.parametrize("name", [name for name in CASES if name not in WRONG_UNDER_VMAP])
def test_every_parameter_is_exact(name):
    fallback_names(name)


@pytest.mark.parametrize("name", WRONG_UNDER_VMAP)
def test_what_torch_gets_wrong_under_vmap_is_exact_after_the_self_check(name):
    one = CASES[name]
    check_every_parameter(redraw(one.make().double()), one.inputs, self_checked=True)


@pytest.mark.skipif(not CHECK_COVERAGE, reason="rules are being written")
@pytest.mark.parametrize("name", [name for name in CASES if name not in WRONG_UNDER_VMAP])
def test_what_has_a_rule_does_not_fall_back(name):
    allowed = CASES[name].may_fall_back
    left = [one for one in fallback_names(name) if not any(fnmatchcase(one, pattern) for pattern in allowed)]
    assert not left


def test_every_rule_is_used_in_a_case():
    for name in CASES:
        if name not in WRONG_UNDER_VMAP:
            fallback_names(name)  # once, whichever test comes first
    assert [func for func in RULES if func not in USED | {F.prelu}] == []
