"""Gains and offsets of normalisations against the slow reference, parameter by parameter."""

import pytest
import torch
import torch.nn.functional as F
from quiet import QUIET
from reference import draw_statistics
from rule_cases import (
    IMAGE,
    SIGNAL,
    VOLUME,
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
    time_first,
    without_rule,
)
from torch import nn

from ntkpipe.jacobian.tracing.rules import elementwise

pytestmark = QUIET

# The fallback warns about its loop, torch about old-style hooks; none of it is tested here.

CASES = {}

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

CASES |= {
    "rms_norm, function": case(lambda m, x: read(torch.rms_norm(x, (6,), m.w)), T, w=param(6)),
}

# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_exact(name):
    outcome(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_what_has_a_rule_does_not_fall_back(name):
    assert without_rule(CASES[name]) == []


def test_every_rule_is_used_in_a_case():
    assert never_applied(elementwise.NORMALIZATIONS, CASES.values()) == []
