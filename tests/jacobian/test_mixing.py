"""What depends on the rest of a batch is refused, in its outputs or in its gradients alone; rounding is not."""

import warnings

import numpy as np
import pytest
import reference
import torch
from reference import Custom, redraw, tanh_with_hook
from torch import nn

import ntkpipe
from ntkpipe.base.errors import ModelError, NtkpipeError
from ntkpipe.jacobian import probe, self_check
from ntkpipe.jacobian.mixing import require_single
from ntkpipe.jacobian.model.functional import prepare_model

L = nn.Linear
X = torch.randn(23, 6, generator=torch.Generator().manual_seed(0))


def between(function):
    return lambda: Custom(lambda m, x: m.b(function(m, m.a(x))), a=L(6, 9), b=L(9, 3))


def hooked(pull_back):
    return between(tanh_with_hook(pull_back))


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pull_back):
        ctx.pull_back = pull_back
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.pull_back(grad), None


def with_backward(pull_back):
    return between(lambda m, h: Backward.apply(h, pull_back))


class Flow(nn.Module):
    """z' = tanh(W z) - 0.3 z by Heun's method with an embedded Euler step: one step size for the batch, or each."""

    def __init__(self, rtol, norm="rms", *, is_shared=True):
        super().__init__()
        self.a, self.w, self.b = L(6, 8), L(8, 8), L(8, 3)
        self.rtol, self.norm, self.is_shared = rtol, norm, is_shared

    def forward(self, x):
        z = torch.tanh(self.a(x))
        return self.b(self.solve(z) if self.is_shared else torch.cat([self.solve(one) for one in z.split(1)]))

    def solve(self, z):
        time, step = 0.0, 0.1
        while time < 1 - 1e-12:
            step = min(step, 1 - time)
            first = self.slope(z)
            second = self.slope(z + step * first)
            error = ((second - first) * step / 2).detach()
            error = error.abs().max() if self.norm == "max" else error.pow(2).mean().sqrt()
            size = float(error) / self.rtol
            if size <= 1:
                time, z = time + step, z + step / 2 * (first + second)
            step *= min(5.0, max(0.2, 0.9 * (size + 1e-12) ** -0.5))
        return z

    def slope(self, z):
        return torch.tanh(self.w(z)) - 0.3 * z


class Equilibrium(nn.Module):
    """A fixed point, and its implicit gradient, each solved for the whole batch to a tolerance."""

    def __init__(self, tol, backward_tol):
        super().__init__()
        self.w, self.u, self.o = L(7, 7), L(6, 7), L(7, 3)
        self.tol, self.backward_tol = tol, backward_tol

    def forward(self, x):
        with torch.no_grad():
            z = self.settled(lambda z: self.step(z, x), x.new_zeros(len(x), 7), self.tol)
        z = self.step(z, x)
        if z.requires_grad:
            at = z.detach().requires_grad_()
            again = self.step(at, x)

            def pull_back(grad):
                return self.settled(
                    lambda y: torch.autograd.grad(again, at, y, retain_graph=True)[0] + grad, grad, self.backward_tol
                )

            z.register_hook(pull_back)
        return self.o(z)

    def step(self, z, x):
        return torch.tanh(0.3 * self.w(z) + self.u(x))

    @staticmethod
    def settled(function, value, tol):
        for _ in range(60):
            last, value = value, function(value)
            if float((value - last).norm()) < tol:
                break
        return value


class Experts(nn.Module):
    """The largest expert alone; with a capacity, late tokens of a batch are dropped."""

    def __init__(self, capacity):
        super().__init__()
        self.g, self.e, self.capacity = L(6, 3), nn.ModuleList(L(6, 3) for _ in range(3)), capacity

    def forward(self, x):
        shares = torch.softmax(self.g(x), dim=1)
        chosen, outputs = shares.argmax(dim=1), x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.e):
            (places,) = torch.where(chosen == number)
            if self.capacity:
                places = places[: max(1, int(self.capacity * len(x) / 3))]
            outputs = outputs.index_add(0, places, expert(x[places]) * shares[places, number : number + 1])
        return outputs


def quantised(m, h):
    scale = h.abs().max() / 127
    return h + (torch.round(h / scale) * scale - h).detach()


# By how much the batch is mixed, relative: models whose tolerance is below that are refused in float64 alone.
MIXED = {
    "gradient over its norm": (hooked(lambda g: g / g.norm()), 1),
    "gradient less its mean": (hooked(lambda g: g - g.mean(0)), 1),
    "gradient clipped by the norm of all": (hooked(lambda g: g * min(1.0, 0.1 / float(g.norm()))), 1),
    "gradient over its largest": (with_backward(lambda g: g / g.abs().max()), 1),
    "gradient by the size of the batch": (with_backward(lambda g: g * len(g)), 1),
    "gradient of the next sample": (with_backward(lambda g: g.roll(1, 0)), 1),
    "gradient as of a batch norm": (with_backward(lambda g: (g - g.mean(0)) / (1 + g.std(0))), 1),
    "gradient less a little of its mean": (with_backward(lambda g: g - 1e-8 * g.mean(0)), 1e-8),
    "one step size, 1e-3": (lambda: Flow(1e-3), 1e-3),
    "one step size, 1e-4": (lambda: Flow(1e-4), 1e-4),
    "one step size, 1e-4, largest error": (lambda: Flow(1e-4, "max"), 1e-4),
    "fixed point of all": (lambda: Equilibrium(1e-8, 1e-8), 1e-8),
    "implicit gradient of all": (lambda: Equilibrium(1e-15, 1e-6), 1e-6),
    "scaled by the largest": (between(lambda m, h: torch.tanh(h / h.abs().max().detach())), 1),
    "mean of all, detached": (between(lambda m, h: torch.tanh(h) + h.mean(0).detach()), 1),
    "a little of the mean": (between(lambda m, h: torch.tanh(h) - 1e-8 * h.mean(0)), 1e-8),
    "softmax over the batch": (between(lambda m, h: torch.softmax(h, dim=0)), 1),
    "one scale of integers": (between(quantised), 1),
    "sorted": (between(lambda m, h: h.sort(dim=0).values), 1),
    "experts with a capacity": (lambda: Experts(1.0), 1),
}


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run:UserWarning")
@pytest.mark.parametrize("jacobian", ["structured", "fallback"])
@pytest.mark.parametrize("name", MIXED)
def test_what_depends_on_the_rest_of_a_batch_is_refused(name, jacobian):
    make, change = MIXED[name]
    model = redraw(make())
    for dtype in ("float64", "float32") if change == 1 else ("float64",):
        with pytest.raises(ModelError, match="the other samples of its batch"):
            ntkpipe.kernel_matrix(model, X, jacobian=jacobian, compute_dtype=dtype, workers=1)


def padded(m, x):
    """Masked means over as many positions as the longest sample of the batch has."""
    lengths = (3 * x[:, :1].abs()).ceil() + 1
    positions = torch.arange(int(lengths.max())).to(x)
    shares = (positions < lengths) / lengths
    return m.b((torch.tanh(m.a(x))[:, :, None] * (1 + 0.1 * positions) * shares[:, None]).sum(dim=2))


def in_single_precision(m, x):
    return m.b(torch.tanh((m.a(x).float() @ m.w.float()).to(x.dtype)))


ALONE = {
    "a step size of each": lambda: Flow(1e-2, is_shared=False),
    "fixed point to rounding": lambda: Equilibrium(1e-15, 1e-15),
    "experts": lambda: Experts(0),
    "padded to the longest": lambda: Custom(padded, a=L(6, 9), b=L(9, 3)),
    "gradient halved": hooked(lambda g: g / 2),
    "gradient clipped": hooked(lambda g: g.clamp(-0.1, 0.1)),
    "gradient over the norm of a sample": hooked(lambda g: g / (0.01 + g.norm(dim=1, keepdim=True))),
    "sorted, and back": between(lambda m, h: torch.tanh(h[h[:, 0].argsort()])[h[:, 0].argsort().argsort()]),
    "ill-conditioned": between(lambda m, h: (3e4 + torch.tanh(h)) - 3e4),
    "parts in float32": lambda: Custom(in_single_precision, a=L(6, 9), w=nn.Parameter(torch.ones(9, 9)), b=L(9, 3)),
}


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run:UserWarning")
@pytest.mark.filterwarnings("ignore:the model computes a part in float32:UserWarning")
@pytest.mark.parametrize("name", ALONE)
def test_rounding_is_neither_refused_nor_warned_of(name):
    model = redraw(ALONE[name]())
    exact = reference.kernel(model, X)
    for dtype in ("float64", "float32"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*other samples of its batch")
            found = ntkpipe.kernel_matrix(
                model, X, kind="ntk", jacobian="fallback", compute_dtype=dtype, workers=1, progress=False
            )
        tolerance = 1e-5 if "float32" in (dtype, name[-7:]) else 1e-12
        if (name, dtype) != ("ill-conditioned", "float32"):
            assert reference.error(np.asarray(found), exact) <= tolerance


def test_a_change_that_is_like_noise_is_warned_of_with_its_number():
    """In float32 a hundred thousandth is between what is rounding and what is refused."""
    model = redraw(between(lambda m, h: torch.tanh(h) + 3e-5 * torch.tanh(h).mean(0))())
    with pytest.warns(UserWarning, match=r"of a sample change by [\d.]+e-05, relative, with the other samples"):
        ntkpipe.kernel_matrix(model, X, compute_dtype="float32", workers=1)
    with pytest.raises(ModelError, match="the other samples of its batch"):
        ntkpipe.kernel_matrix(model, X, compute_dtype="float64", workers=1)


def test_samples_beyond_the_probed_ones_are_looked_at_by_the_self_check():
    """The largest of the batch decides only where it is large, as in none of the five samples that are probed."""
    model = redraw(between(lambda m, h: torch.tanh(h) * (1 + 1e-7 * torch.relu(h[:, :1].detach().max() - 50)))())
    x = X.clone()
    x[3] = 500 * torch.sign(model.a.weight[0].detach())  # samples 0, 5, 11, 16 and 22 are probed
    with pytest.raises(ModelError, match="the other samples of its batch"):
        ntkpipe.kernel_matrix(model, x, compute_dtype="float64", workers=1)


class Keeps(nn.Module):
    """Adds what it remembers of earlier calls."""

    def __init__(self, kind, size=1.0):
        super().__init__()
        self.a, self.size = L(6, 3), size
        if kind == "buffer":
            self.register_buffer("memory", torch.zeros(()))
        else:
            self.memory = torch.zeros(()) if kind == "tensor" else 0

    def forward(self, x):
        self.memory = self.memory + 1
        return self.a(x) + self.size * self.memory


@pytest.mark.parametrize("kind", ["buffer", "tensor", "number"])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_model_that_keeps_state_is_not_called_random(kind, size):
    with pytest.raises(ModelError, match=r"keeps state from call to call, in 'memory'.*Reset"):
        ntkpipe.kernel_matrix(nn.Sequential(Keeps(kind, size))[0], X, workers=1)

    def reset(model, inputs):
        model.memory = model.memory * 0
        return model(inputs)

    ntkpipe.kernel_matrix(Keeps(kind, size), X, forward=reset, workers=1)


@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_a_random_model_is_called_random(size):
    with pytest.raises(ModelError, match="is random"):
        ntkpipe.kernel_matrix(
            redraw(between(lambda m, h: h + size * torch.randn_like(h))()), X, compute_dtype="float64", workers=1
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ordinary_models_cost_one_pass_backward_and_none_forward(dtype, monkeypatch):
    model = redraw(nn.Sequential(L(6, 9), nn.ReLU(), L(9, 9), nn.GELU(), nn.LayerNorm(9), L(9, 3)))
    functional = prepare_model(model, dtype=getattr(torch, dtype), device=torch.device("cpu"))
    passes, real = [], torch.autograd.grad

    def counted(outputs, *args, **kwargs):
        passes.append(1)
        return real(outputs, *args, **kwargs)

    batches = [X[:5].to(functional.dtype)[list(order)] for order in probe._PROBES]
    outputs = [functional(batch) for batch in batches]
    monkeypatch.setattr(torch.autograd, "grad", counted)
    monkeypatch.setattr(probe, "require_single", None)  # not needed
    monkeypatch.setattr(self_check, "require_single", None)
    reached, gap, is_finite = probe._gradients(functional, outputs)
    assert (len(passes), reached) == (3, set(functional.names))  # two of which say what gradients reach
    assert gap <= 100 * torch.finfo(functional.dtype).eps
    assert is_finite
    ntkpipe.kernel_matrix(model, X, compute_dtype=dtype, workers=1)


def test_gradients_are_compared_in_the_lowest_precision_on_their_way():
    """A sum over the batch that is rounded to float32 changes with its terms, however they are ordered."""
    rounds = Custom(lambda m, x: torch.exp(m.w.float()) * m.a(x), a=L(6, 3), w=nn.Parameter(torch.ones(3)))
    model = prepare_model(redraw(rounds), dtype=torch.float64, device=torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_single(model, X[:8].double(), range(8), "float64")


def test_errors_are_the_packages_own_and_nothing_is_written(tmp_path):
    with pytest.raises(NtkpipeError, match="the other samples of its batch"):
        ntkpipe.compute_kernel(
            redraw(MIXED["gradient over its norm"][0]()), X, store=tmp_path / "k.zarr", progress=False
        )
    assert not (tmp_path / "k.zarr").exists()


class Recurrent(nn.Module):
    """A cell that goes on from its last state, where that is of a batch of the same size."""

    def __init__(self, keep):
        super().__init__()
        self.a, self.u, self.b, self.keep = L(6, 3), L(3, 3), L(3, 2), keep
        self.register_buffer("state", None)
        self.states = []

    def forward(self, x):
        last = self.states[-1] if self.states else self.state
        if last is None or len(last) != len(x):
            last = x.new_zeros(len(x), 3)
        state = torch.tanh(self.a(x) + self.u(last))
        if self.keep == "list":
            self.states.append(state.detach())
        else:
            self.state = state if self.keep == "with its graph" else state.detach()
        return self.b(state)

    def from_zero(self, x):
        self.state, self.states = None, []
        return self(x)


@pytest.mark.parametrize("keep", ["buffer", "with its graph", "list"])
@pytest.mark.parametrize("options", [{}, {"jacobian": "fallback"}, {"self_check": False}], ids=str)
def test_state_that_batches_of_another_size_do_not_show_is_found(keep, options):
    model, where = redraw(Recurrent(keep)), ", in 'states'" if keep == "list" else ", in 'state'"
    options = {"compute_dtype": "float64", "workers": 1, **options}
    with pytest.raises(ModelError, match=f"keeps state from call to call{where}. Reset"):
        ntkpipe.kernel_matrix(model, X, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.func.vmap cannot run")
        found = ntkpipe.kernel_matrix(model, X, kind="ntk", forward=lambda m, x: m.from_zero(x), **options)
    assert reference.error(found, reference.kernel(model, X, forward=lambda m, x: m.from_zero(x))) <= 1e-12


def test_passes_that_change_nothing_are_not_repeated(monkeypatch):
    """Another pass is run only where something in the model is new, as what it shows is."""

    class Showing(nn.Module):
        def __init__(self, kept):
            super().__init__()
            self.a, self.kept, self.last = L(6, 3), kept, None

        def forward(self, x):
            passes.append(len(x))
            hidden = self.a(x)
            self.last = hidden.detach() if self.kept else None
            return torch.tanh(hidden)

    passes, counts = [], []
    for kept in (False, True):
        passes.clear()
        model = redraw(Showing(kept))
        found = ntkpipe.kernel_matrix(model, X, kind="ntk", compute_dtype="float64", workers=1)
        counts.append(len(passes))
        assert reference.error(found, reference.kernel(model, X)) <= 1e-12
    assert counts[1] == counts[0] + 1


def at_half(model, h):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=h.dtype == torch.float32):
        return torch.tanh(h @ model.w)


LOWER = {
    "output": (lambda m, x: m.a(x).float(), "float64", "float32"),
    "between": (lambda m, x: m.b(torch.tanh(m.a(x)).float().to(x.dtype)), "float64", "float32"),
    "softmax": (lambda m, x: m.b(torch.softmax(m.a(x), -1, dtype=torch.float32).to(x.dtype)), "float64", "float32"),
    "weight": (lambda m, x: m.b((m.a(x).float() @ m.w.float()).to(x.dtype)), "float64", "float32"),
    "half of float64": (lambda m, x: m.b(torch.tanh(m.a(x)).half().to(x.dtype)), "float64", "16 bits or less"),
    "half of float32": (lambda m, x: m.b(torch.tanh(m.a(x)).bfloat16().to(x.dtype)), "float32", "16 bits or less"),
    "autocast": (lambda m, x: m.b(at_half(m, m.a(x)).to(x.dtype)), "float32", "16 bits or less"),
}


@pytest.mark.filterwarnings("ignore:.* of a sample change by:UserWarning")
@pytest.mark.parametrize("structured", ["structured", "fallback"])
@pytest.mark.parametrize("name", LOWER)
def test_parts_in_a_lower_precision_are_warned_of(name, structured):
    function, dtype, found = LOWER[name]
    model = redraw(Custom(function, a=L(6, 9), b=L(9, 3), w=nn.Parameter(torch.ones(9, 9))))
    options = {"compute_dtype": dtype, "jacobian": structured, "workers": 1}
    with pytest.warns(UserWarning, match=f"computes a part in {found} although compute_dtype='{dtype}'"):
        ntkpipe.kernel_matrix(model, X, parameters=("a.*",) if "output" in name else None, **options)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "tf32"])
def test_no_part_in_the_precision_that_is_asked_for_or_a_higher_one_is_warned_of(dtype):
    model = redraw(Custom(lambda m, x: m.b(torch.softmax(m.a(x).double(), -1).to(x.dtype)), a=L(6, 9), b=L(9, 3)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the model computes a part in")
        ntkpipe.kernel_matrix(model, X, compute_dtype=dtype, workers=1, self_check=dtype != "bfloat16")
