"""Products with a matrix against the slow reference, with all their options, parameter by parameter."""

import functools

import pytest
import torch
import torch.nn.functional as F
from quiet import QUIET
from reference import Custom
from rule_cases import (
    IMAGE,
    B,
    L,
    T,
    U,
    X,
    case,
    drawn,
    folded,
    frozen,
    hidden,
    never_applied,
    outcome,
    param,
    plain,
    read,
    read_first,
    time_first,
    without_rule,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from ntkpipe.jacobian.tracing.rules import linear

pytestmark = QUIET

# The fallback warns about its loop, torch about old-style hooks; none of it is tested here.

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

# --- the same operations by other names -----------------------------------------------------------------------------

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
}

# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_exact(name):
    outcome(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_what_has_a_rule_does_not_fall_back(name):
    assert without_rule(CASES[name]) == []


def test_every_rule_is_used_in_a_case():
    assert never_applied(linear.RULES, CASES.values()) == []
