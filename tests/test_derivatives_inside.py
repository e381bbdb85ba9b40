"""Models that differentiate inside, through the public functions: every way, kind and number of workers."""

import sys
import threading

import numpy as np
import pytest
import torch
from derivatives import CASES, POINTS, directional, heat, laplacian_taylor, net, slope
from quiet import QUIET
from reference import Custom, error, grams, jacobians, kernel, pseudo, redraw, size_of
from torch import nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint

from ntkpipe import compute_kernel, kernel_matrix, verify
from ntkpipe.base.errors import ModelError
from ntkpipe.jacobian.representations.interface import Rates

# The fallback warns of its loop; models that call backward() inside are warned by torch.
pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Using backward")]


@pytest.fixture(autouse=True)
def _no_benchmark(monkeypatch):
    monkeypatch.setattr("ntkpipe.build.prepare.measure_rates", lambda *_: Rates(32e9, 1e9))


def arrays(inputs):
    return {name: values.numpy() for name, values in inputs.items()} if isinstance(inputs, dict) else inputs.numpy()


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_exact_by_structure_and_without(name):
    make, inputs = CASES[name]
    model, given = make(), arrays(inputs)
    found = jacobians(model, inputs)
    exact, whole = sum(grams(found).values()), sum(grams(pseudo(found, size_of(inputs))).values())
    options = {"compute_dtype": "float64", "tile": 2}
    assert error(kernel_matrix(model, given, kind="ntk", workers=2, **options), exact) < 1e-10
    one = kernel_matrix(model, given, kind="pntk", jacobian="fallback", workers=1, **options)
    assert error(one, whole) < 1e-10
    count = len(exact) // size_of(inputs)
    last = kernel_matrix(model, given, kind=f"output:{count - 1}", workers=1, **options)
    assert error(last, exact[count - 1 :: count, count - 1 :: count]) < 1e-10


def reentrant(run, x):
    return checkpoint(run, x, use_reentrant=True)


REENTRANT = {
    "inputs that require gradients": lambda m, x, wrap: m.b(wrap(m.u, x.requires_grad_(True))),
    "inputs that do not": lambda m, x, wrap: m.b(wrap(m.u, x)),
    "behind a layer": lambda m, x, wrap: m.b(wrap(m.u, m.a(x))),
    "twice": lambda m, x, wrap: m.b(wrap(m.u, wrap(m.a, x))),
    "one in the other": lambda m, x, wrap: m.b(wrap(lambda h: wrap(m.u, h) + 1, m.a(x))),
}


@pytest.mark.parametrize("jacobian", ["structured", "fallback"])
@pytest.mark.parametrize("name", REENTRANT)
def test_reentrant_checkpoints_are_differentiated_through(name, jacobian, tmp_path):
    # autograd.grad gets no gradients through them, neither here nor in a reference: it goes without.
    layers = {"a": nn.Linear(2, 2), "u": net(2, 3), "b": nn.Linear(3, 2)}
    model = redraw(Custom(lambda m, x: REENTRANT[name](m, x, reentrant), **layers))
    plain = Custom(lambda m, x: REENTRANT[name](m, x, lambda run, h: run(h)), **layers)
    given, original = (
        {"kind": "ntk", "compute_dtype": "float64", "jacobian": jacobian},
        torch_checkpoint.CheckpointFunction,
    )
    stored = compute_kernel(model, POINTS.numpy(), store=tmp_path / "kernel", progress=False, **given)
    assert error(np.asarray(stored.train), kernel(plain, POINTS)) < 1e-10
    assert verify(stored, model, progress=False).is_good
    assert torch_checkpoint.CheckpointFunction is original


class Reversible(torch.autograd.Function):
    """Keeps gradients of a layer with its parameters, as optimizers find them, and returns that of the input."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return x + layer(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.layer(x), grad)
        return grad + x.grad, None


@pytest.mark.parametrize("jacobian", ["structured", "fallback"])
def test_gradients_that_a_backward_pass_keeps_are_not_missed(jacobian):
    model = redraw(
        Custom(lambda m, x: m.b(Reversible.apply(m.a(x), m.u)), a=nn.Linear(2, 3), u=net(3, 3), b=nn.Linear(3, 2))
    )
    with pytest.raises(ModelError, match="return their gradients"):
        kernel_matrix(model, POINTS.numpy(), compute_dtype="float64", jacobian=jacobian)


@pytest.mark.parametrize(
    "name",
    [
        "heat equation",
        "energy and forces of a dict",
        "laplacian, jvp of jvp",
        "laplacian, hessian",
        "dual level",
        "inner loop, kept gradients",
        "backward of its own",
        "target without gradient",
        "hook of a gradient",
        "slope of a checkpoint",
    ],
)
@pytest.mark.parametrize("jacobian", ["structured", "fallback"])
def test_stores_are_exact_certified_and_resumed(name, jacobian, tmp_path):
    make, inputs = CASES[name]
    model, given = make(), arrays(inputs)
    test = {n: v[:3] for n, v in given.items()} if isinstance(given, dict) else given[:3]
    options = {"compute_dtype": "float64", "tile": 2, "kind": "ntk", "jacobian": jacobian, "progress": False}
    store = compute_kernel(model, given, test_inputs=test, store=tmp_path / "kernel", workers=2, **options)
    exact = kernel(model, inputs)
    assert error(store.train[:], exact) < 1e-10
    rows = len(exact) // len(next(iter(given.values())) if isinstance(given, dict) else given) * 3
    np.testing.assert_allclose(store.test_train[:], exact[:rows], rtol=0, atol=1e-10 * np.diagonal(exact).max())
    assert verify(store, model, progress=False).is_good
    chunk = next(file for file in (tmp_path / "kernel" / "kernel" / "train" / "c").rglob("*") if file.is_file())
    before = chunk.read_bytes()
    chunk.unlink()
    compute_kernel(model, given, test_inputs=test, store=tmp_path / "kernel", workers=1, **options)
    assert chunk.read_bytes() == before


@pytest.mark.parametrize("name", ["heat equation", "forces", "laplacian, jacfwd of jacrev", "directional derivative"])
def test_float32_is_as_good_as_its_rounding(name):
    make, inputs = CASES[name]
    model = make()
    found = kernel_matrix(model, arrays(inputs), kind="ntk", workers=2, tile=2)
    assert error(found, kernel(model, inputs)) < 1e-3


def test_convolutions_that_are_differentiated_run_in_float32():
    # The layout of convolutions is chosen by runs of the model, which has to differentiate in them, too.
    def function(m, x):
        x = x.requires_grad_()
        return slope(torch.tanh(m.c(x)).sum(dim=(1, 2, 3)), x).flatten(1)

    model = redraw(Custom(function, c=nn.Conv2d(1, 3, 3)))
    images = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = kernel_matrix(model, images.numpy(), kind="ntk", workers=1)
    assert error(found, kernel(model, images)) < 1e-3


@pytest.mark.parametrize("function", [directional, laplacian_taylor])
def test_callers_of_several_threads_share_forward_mode(function):
    models = [redraw(Custom(function, u=net()), seed=seed).double() for seed in range(2)]
    found = [None, None]

    def run(number):
        found[number] = kernel_matrix(models[number], POINTS.numpy(), kind="ntk", compute_dtype="float64", tile=2)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for model, one in zip(models, found, strict=True):
        assert error(one, kernel(model, POINTS)) < 1e-10


class Kept:
    """What a careless model keeps between its layers."""

    value = None


def kept_in_a_class(m, x):
    Kept.value = m.a(x)
    return m.b(torch.tanh(x @ m.a.weight.T)) + Kept.value.sum(dim=1, keepdim=True)


VALUES = {}


def kept_in_a_dict(m, x):
    VALUES["gate"] = torch.sigmoid(x[:, :1])
    return m.b(torch.tanh(m.a(x))) * VALUES["gate"]


@pytest.mark.parametrize("function", [kept_in_a_class, kept_in_a_dict])
def test_models_whose_threads_disturb_each_other_take_turns(function):
    model = redraw(Custom(function, a=nn.Linear(2, 4), b=nn.Linear(4, 2))).double()
    inputs = torch.cat([POINTS, POINTS + 0.5, POINTS - 0.5])
    with pytest.warns(UserWarning, match="they take turns"):
        found = kernel_matrix(model, inputs.numpy(), kind="ntk", compute_dtype="float64", workers=2, tile=3)
    assert error(found, kernel(model, inputs)) < 1e-10


def test_what_one_thread_computes_is_not_tried_in_two(recwarn):
    model = redraw(Custom(kept_in_a_dict, a=nn.Linear(2, 4), b=nn.Linear(4, 2))).double()
    found = kernel_matrix(model, POINTS.numpy(), kind="ntk", compute_dtype="float64", workers=1, tile=3)
    assert error(found, kernel(model, POINTS)) < 1e-10
    assert not [each for each in recwarn if "take turns" in str(each.message)]


def test_a_module_in_two_places_keeps_its_parameters():
    layer = nn.Linear(2, 2)
    model = redraw(nn.Sequential(layer, nn.Tanh(), layer)).double()
    for jacobian in ("structured", "fallback"):
        found = kernel_matrix(model, POINTS.numpy(), kind="ntk", compute_dtype="float64", jacobian=jacobian)
        assert error(found, kernel(model, POINTS)) < 1e-10


def test_the_users_model_is_not_touched():
    model = redraw(Custom(heat, u=net())).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernel_matrix(model, POINTS.numpy(), compute_dtype="float64")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
