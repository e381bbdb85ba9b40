"""Modules of several operations, and operations without a rule, against the slow reference."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from quiet import QUIET
from reference import Custom
from rule_cases import (
    SIGNAL,
    B,
    Case,
    L,
    T,
    X,
    case,
    drawn,
    outcome,
    param,
    plain,
    read,
    without_rule,
)
from torch import nn

from ntkpipe.jacobian.tracing.rules import convolution, elementwise, linear
from ntkpipe.jacobian.tracing.rules.table import RULES

pytestmark = QUIET

# The fallback warns about its loop, torch about old-style hooks; none of it is tested here.

CASES = {}

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

# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_exact(name):
    outcome(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_what_has_a_rule_does_not_fall_back(name):
    assert without_rule(CASES[name]) == []


def test_no_function_has_two_rules():
    families = (linear.RULES, linear.LOOKUPS, convolution.RULES, elementwise.NORMALIZATIONS, elementwise.RULES)
    assert len(RULES) == sum(map(len, families))
