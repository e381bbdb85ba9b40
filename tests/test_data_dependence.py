"""Models whose operations depend on the data: exact, whether or not the probed samples show it."""

import numpy as np
import pytest
import reference
import torch
from reference import Custom, redraw
from torch import nn

import ntkpipe
from ntkpipe.base.errors import NtkpipeError

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
L = nn.Linear


class Experts(nn.Module):
    """Each sample goes to the expert that its gate prefers; experts without samples are not run."""

    def __init__(self, count, chosen, *, is_lazy=True):
        super().__init__()
        self.gate, self.head, self.chosen, self.is_lazy = L(6, count), L(6, 3), chosen, is_lazy
        self.experts = nn.ModuleList(nn.Sequential(L(6, 5), nn.Tanh(), L(5, 6)) for _ in range(count))

    def forward(self, x):
        weights, numbers = self.gate(x).softmax(-1).topk(self.chosen, -1)
        found = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(numbers == number)
            if len(rows) or not self.is_lazy:
                found = found.index_add(0, rows, expert(x[rows]) * weights[rows, places, None])
        return self.head(x + found)


def two(function):
    return lambda: Custom(function, a=L(6, 6), b=L(6, 6), c=L(6, 3))


def rare(m, x, which):
    hidden = torch.tanh(m.a(x))
    if which.any():
        hidden = torch.where(which[:, None], torch.tanh(m.b(hidden)), hidden)
    return m.c(hidden)


def steps(m, x):
    hidden, counts = torch.tanh(m.a(x)), (2 * x[:, 0].abs()).long()
    for step in range(int(counts.max())):
        hidden = torch.where((counts > step)[:, None], torch.tanh(m.b(hidden)), hidden)
    return m.c(hidden)


def until(m, x):
    """A fixed point, by as many steps as the batch needs."""
    drive, state, gap = torch.tanh(m.a(x)), torch.zeros(len(x), 6, dtype=x.dtype), 1.0
    while gap > 1e-15:
        last, state = state, drive + 0.1 * torch.tanh(m.b(state))
        gap = float((last - state).detach().abs().max())
    return m.c(state)


def masked(m, x):
    hidden, found = torch.tanh(m.a(x)), []
    for sample, is_hot in zip(hidden, x[:, 0] > 0.5, strict=True):
        found.append(m.c(m.b(sample) if is_hot else sample))
    return torch.stack(found)


MODELS = {
    "experts": lambda: Experts(8, 1),
    "two experts of many": lambda: Experts(12, 2),
    "experts that are always run": lambda: Experts(6, 1, is_lazy=False),
    "a rare branch": two(lambda m, x: rare(m, x, x[:, 0] > 1.0)),
    "a branch of one sample": two(lambda m, x: rare(m, x, x[:, 1] >= X[:, 1].max().item())),
    "as many steps as needed": two(steps),
    "a fixed point": two(until),
    "sample by sample": two(masked),
}


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run")
@pytest.mark.parametrize("options", [{}, {"jacobian": "fallback"}, {"kind": "output:1", "workers": 1}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_kernels_are_exact(name, options):
    model = redraw(MODELS[name]()).double()
    given = {"kind": "ntk", "compute_dtype": "float64", "workers": 2, "tile": 5, **options}
    found = ntkpipe.kernel_matrix(model, X, **given)
    exact = reference.kernel(model, X.double())
    if given["kind"] != "ntk":
        exact = exact.reshape(len(X), 3, len(X), 3)[:, 1, :, 1]
    assert reference.error(found, exact) < 1e-10


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run")
@pytest.mark.parametrize("name", ["experts", "a rare branch", "as many steps as needed"])
def test_stores_of_them_are_planned_computed_resumed_and_certified(name, tmp_path):
    model, options = redraw(MODELS[name]()).double(), {"kind": "ntk", "compute_dtype": "float64", "progress": False}
    store = tmp_path / "kernel"
    assert ntkpipe.plan_kernel(model, X, store=store, **options).plan.problems == ()
    kernel = ntkpipe.compute_kernel(model, X, store=store, **options)
    assert reference.error(np.asarray(kernel.train), reference.kernel(model, X.double())) < 1e-10
    (store / "kernel" / "train" / "c" / "0" / "0").unlink()
    again = ntkpipe.compute_kernel(model, X, store=store, **options)
    assert np.array_equal(np.asarray(again.train), np.asarray(kernel.train))
    assert ntkpipe.verify(store, model, progress=False).is_good


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run")
def test_the_advice_of_what_shows_only_in_the_run_works(tmp_path):
    inputs = torch.cat([X[:, :1] * 0, X[:, 1:]], dim=1).repeat(8, 1)
    inputs[151, 0] = 3.0  # not among the probed samples
    model = redraw(two(lambda m, x: rare(m, x, x[:, 0] > 1))()).double()
    common = {"kind": "pntk", "compute_dtype": "float64", "tile": 16, "self_check": False}
    options = {"store": tmp_path / "kernel", "progress": False, **common}
    with pytest.raises(NtkpipeError, match=r"jacobian='fallback'.*mode='w'"):
        ntkpipe.compute_kernel(model, inputs, **options)
    kernel = ntkpipe.compute_kernel(model, inputs, **options, jacobian="fallback", mode="w")
    exact = reference.kernel(model, inputs.double()).reshape(192, 3, 192, 3).sum(axis=(1, 3)) / 3
    assert reference.error(np.asarray(kernel.train), exact) < 1e-10
    found = ntkpipe.kernel_matrix(model, inputs, **common)
    assert reference.error(found, exact) < 1e-10
