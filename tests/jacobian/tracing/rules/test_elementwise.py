"""Sums, products, selections and expansions against the slow reference, parameter by parameter."""

import functools

import pytest
import torch
import torch.nn.functional as F
from engines import check_every_parameter
from quiet import QUIET
from reference import redraw
from rule_cases import (
    IMAGE,
    B,
    L,
    T,
    X,
    case,
    drawn,
    never_applied,
    outcome,
    param,
    plain,
    positions,
    read,
    without_rule,
)
from torch import nn

from ntkpipe.jacobian.tracing.rules import elementwise

pytestmark = QUIET

# The fallback warns about its loop, torch about old-style hooks; none of it is tested here.

CASES = {}

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

# --- the same operations by other names -----------------------------------------------------------------------------


def joined_token(expand):
    return lambda m, x: read(torch.cat([expand(m.t, x), x], 1))


CASES |= {
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
TRUSTED = [name for name in CASES if name not in WRONG_UNDER_VMAP]

# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRUSTED)
def test_every_parameter_is_exact(name):
    outcome(CASES[name])


@pytest.mark.parametrize("name", TRUSTED)
def test_what_has_a_rule_does_not_fall_back(name):
    assert without_rule(CASES[name]) == []


@pytest.mark.parametrize("name", WRONG_UNDER_VMAP)
def test_what_torch_gets_wrong_under_vmap_is_exact_after_the_self_check(name):
    one = CASES[name]
    check_every_parameter(redraw(one.make().double()), one.inputs, self_checked=True)


def test_every_rule_is_used_in_a_case():
    assert never_applied(elementwise.RULES, (CASES[name] for name in TRUSTED)) == [F.prelu]
