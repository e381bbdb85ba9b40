"""Views of parameters, and weights computed from parameters, against the slow reference, parameter by parameter."""

import pytest
import torch
import torch.nn.functional as F
from quiet import QUIET
from rule_cases import IDS, IMAGE, SIGNAL, L, T, X, case, frozen, outcome, param, plain, read, without_rule
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

pytestmark = QUIET

# The fallback warns about its loop, torch about old-style hooks; none of it is tested here.

CASES = {}

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

# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_exact(name):
    outcome(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_what_has_a_rule_does_not_fall_back(name):
    assert without_rule(CASES[name]) == []
