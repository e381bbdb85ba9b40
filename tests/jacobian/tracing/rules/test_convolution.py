"""Convolutions against the slow reference, with all their options, parameter by parameter."""

import pytest
import torch
import torch.nn.functional as F
from quiet import QUIET
from rule_cases import (
    IMAGE,
    SIGNAL,
    VOLUME,
    B,
    L,
    T,
    case,
    drawn,
    frozen,
    hidden,
    never_applied,
    outcome,
    param,
    plain,
    read,
    without_rule,
)
from torch import nn

from ntkpipe.jacobian.tracing.rules import convolution

pytestmark = QUIET

# The fallback warns about its loop, torch about old-style hooks; none of it is tested here.

CASES = {}

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

# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_exact(name):
    outcome(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_what_has_a_rule_does_not_fall_back(name):
    assert without_rule(CASES[name]) == []


def test_every_rule_is_used_in_a_case():
    assert never_applied(convolution.RULES, CASES.values()) == []
