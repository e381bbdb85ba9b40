"""The certificate: a clean store passes, one wrong entry among all is found and its row named."""

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from reference import Custom, redraw, tanh_with_hook
from torch import nn

import ntkpipe
from ntkpipe.base.errors import StoreMismatchError
from ntkpipe.report.provenance import verification_section

X = torch.randn(23, 6, generator=torch.Generator().manual_seed(0))
TEST = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 2))


def in_a_list():
    model = Custom(
        lambda m, x: torch.tanh(x @ m.kept[0].T) @ m.b.T,
        a=nn.Parameter(torch.ones(5, 6)),
        b=nn.Parameter(torch.ones(3, 5)),
    )
    model.kept = [model.a]
    return model


class NoForwardMode(torch.autograd.Function):
    """tanh without a forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


MODELS = {
    "mlp": mlp,
    "lstm": lambda: Custom(
        lambda m, x: m.h(m.r(x.view(-1, 3, 2))[0][:, -1]), r=nn.LSTM(2, 3, batch_first=True), h=nn.Linear(3, 2)
    ),
    "parameter in a list": in_a_list,
    "no forward mode": lambda: Custom(
        lambda m, x: m.b(NoForwardMode.apply(m.a(x))), a=nn.Linear(6, 5), b=nn.Linear(5, 2)
    ),
}


def compute(model, path, **options):
    options = {"kind": "ntk", "tile": 5, "test_inputs": TEST, "progress": False, **options}
    return ntkpipe.compute_kernel(model, X, store=path, **options)


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run:UserWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_a_clean_store_is_certified(name, dtype, tmp_path):
    model = redraw(MODELS[name]())
    store = compute(model, tmp_path / "k.zarr", compute_dtype=dtype)
    report = ntkpipe.verify(store, model, progress=False)
    assert report.is_good, report.findings
    assert [certificate["array"] for certificate in report.certificates] == ["kernel/train", "kernel/test_train"]
    assert all(c["error"] < (1e-13 if dtype == "float64" else 1e-5) for c in report.certificates)


@pytest.mark.parametrize("kind", ["trace", "output:1"])
def test_the_other_kinds_are_certified_and_a_wrong_entry_is_found(kind, tmp_path):
    model = redraw(mlp())
    store = compute(model, tmp_path / "k.zarr", kind=kind, compute_dtype="float64")
    assert store.test_diagonal.shape == (9, 1, 1)
    assert ntkpipe.verify(store, model, progress=False).is_good
    array = store.store.arrays["kernel/train"]
    tile = array.read((1, 3)).copy()
    tile[2, 1] *= 1.001
    array.write((1, 3), tile)
    assert not ntkpipe.verify(store, model, progress=False).is_good


def test_a_convolution_is_certified_in_float32(tmp_path):
    """The certificate runs the model in the layout of the run: in another, other units of a ReLU are on."""
    model = redraw(
        nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 9, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    )
    report = ntkpipe.verify(compute(model, tmp_path / "k.zarr", kind="pntk"), model, progress=False)
    assert report.is_good, report.findings
    assert all(certificate["error"] < 1e-6 for certificate in report.certificates)


@pytest.mark.parametrize(
    ("array", "index"), [("kernel/train", (1, 3)), ("kernel/train", (4, 4)), ("kernel/test_train", (1, 0))]
)
def test_one_entry_off_by_a_thousandth_is_found_and_named(array, index, tmp_path):
    model = redraw(mlp())
    store = compute(model, tmp_path / "k.zarr", compute_dtype="float64")
    stored = store.store.arrays[array]
    tile = stored.read(index).copy()
    row, column = (2, 2) if index[0] == index[1] else np.unravel_index(np.abs(tile).argmax(), tile.shape)
    tile[row, column] *= 1.001
    stored.write(index, tile)
    report = ntkpipe.verify(tmp_path / "k.zarr", model, progress=False)
    assert not report.is_good
    (bad,) = [certificate for certificate in report.certificates if not certificate["is_good"]]
    rows = {index[0] * 10 + row}
    if array == "kernel/train":  # an entry above the diagonal stands for its mirror image, too
        rows.add(index[1] * 10 + column)
    assert (bad["array"], set(bad["suspect_rows"])) == (array, rows)
    assert str(max(rows)) in report.findings[0].problem


def test_samples_in_the_wrong_order_are_found(tmp_path):
    """A sort that the probed samples do not trigger: the engine without its self-check is silently wrong."""

    def sorts_large_ones_first(m, x):
        order = torch.argsort((x[:, 0] > 3).to(torch.int8), stable=True, descending=True)
        return torch.tanh(m.a(x[order]))[torch.argsort(order)]

    model = redraw(Custom(sorts_large_ones_first, a=nn.Linear(6, 3)))
    x = X.clamp(-2, 2)
    x[3, 0] = 5.0  # samples 0, 5, 11, 16 and 22 are probed
    store = ntkpipe.compute_kernel(model, x, store=tmp_path / "k.zarr", self_check=False, progress=False)
    report = ntkpipe.verify(store, model, progress=False)
    assert not report.is_good
    assert 3 in report.certificates[0]["suspect_rows"] or report.certificates[0]["error"] > 0.01


def test_a_model_that_differs_is_refused(tmp_path):
    model = redraw(mlp())
    store = compute(model, tmp_path / "k.zarr")
    with pytest.raises(StoreMismatchError, match="state_digest"):
        ntkpipe.verify(store, redraw(mlp(), seed=1), progress=False)
    with pytest.raises(StoreMismatchError, match=r"has no parameter '0\.weight'"):
        ntkpipe.verify(store, nn.Identity(), progress=False)
    with pytest.raises(StoreMismatchError, match="inputs"):
        ntkpipe.verify(store, model, X + 1, progress=False)


def test_another_forward_hook_does_not_get_a_certificate(tmp_path):
    model = redraw(mlp())
    store = compute(model, tmp_path / "k.zarr", test_inputs=None)
    assert not ntkpipe.verify(store, model, forward=F.relu, progress=False).is_good


class Backward(torch.autograd.Function):
    """A function with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, function, pull_back):
        ctx.save_for_backward(x)
        ctx.pull_back = pull_back
        return function(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return ctx.pull_back(grad, *ctx.saved_tensors), None, None


def between(function):
    return lambda: Custom(lambda m, x: m.b(function(m, m.a(x))), a=nn.Linear(6, 9), b=nn.Linear(9, 2))


def with_backward(function, pull_back):
    return between(lambda m, h: Backward.apply(h, function, pull_back))


def hooked(pull_back):
    return between(tanh_with_hook(pull_back))


def module_hook():
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
    model[1].register_full_backward_hook(lambda module, grads, outputs: (grads[0] * 0.5,))
    return model


class Equilibrium(nn.Module):
    """z = tanh(0.4 W z + U x), whose gradient is a few steps' or that of the last step alone."""

    def __init__(self, num_steps):
        super().__init__()
        self.w, self.u, self.o, self.num_steps = nn.Linear(7, 7), nn.Linear(6, 7), nn.Linear(7, 2), num_steps

    def forward(self, x):
        z = x.new_zeros(len(x), 7)
        with torch.no_grad():
            for _ in range(60):
                z = self.step(z, x)
        for _ in range(self.num_steps):
            z = 0.5 * z + 0.5 * self.step(z, x)
        return self.o(self.step(z, x))

    def step(self, z, x):
        return torch.tanh(0.4 * self.w(z) + self.u(x))


# Models whose backward pass is not the derivative of what their forward pass computes, as J u has it.
UNLIKE = {
    "straight-through rounding": with_backward(lambda x: torch.round(3 * x) / 3, lambda g, x: g.clone()),
    "surrogate of a spike": with_backward(lambda x: (x > 0).to(x.dtype), lambda g, x: g / (1 + 2 * x.abs()) ** 2),
    "binarised, clipped outside": with_backward(torch.sign, lambda g, x: g * (x.abs() < 1)),
    "gradient reversal": with_backward(torch.tanh, lambda g, x: -0.7 * g),
    "guided backpropagation": with_backward(torch.relu, lambda g, x: g.clamp(min=0) * (x > 0)),
    "scaled by a tensor hook": hooked(lambda g: 0.3 * g),
    "clipped by a tensor hook": hooked(lambda g: g.clamp(-0.1, 0.1)),
    "scaled by a module hook": module_hook,
    "equilibrium, gradient of the last step": lambda: Equilibrium(0),
    "equilibrium, phantom gradient": lambda: Equilibrium(3),
}


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run:UserWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", UNLIKE)
def test_a_backward_pass_that_is_no_derivative_is_certified_by_gradients_alone(name, dtype, tmp_path):
    model = redraw(UNLIKE[name]())
    store = compute(model, tmp_path / "k.zarr", compute_dtype=dtype)
    exact = reference.kernel(model, X)
    assert reference.error(np.asarray(store.train[:]), exact) <= (1e-12 if dtype == "float64" else 1e-5)
    report = ntkpipe.verify(store, model, progress=False)
    assert report.is_good, report.findings
    assert [certificate["by_backward"] for certificate in report.certificates] == [True, True]
    assert all(c["error"] < (1e-13 if dtype == "float64" else 1e-5) for c in report.certificates)
    assert "by backward alone" in str(report)


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run:UserWarning")
@pytest.mark.parametrize("name", ["clipped by a tensor hook", "surrogate of a spike"])
@pytest.mark.parametrize(("array", "index"), [("kernel/train", (1, 3)), ("kernel/test_train", (1, 2))])
def test_a_wrong_entry_is_found_named_and_mended_by_gradients_alone(name, array, index, tmp_path):
    model = redraw(UNLIKE[name]())
    store = compute(model, tmp_path / "k.zarr", compute_dtype="float64")
    stored = store.store.arrays[array]
    good, tile = stored.read(index), stored.read(index).copy()
    row, column = np.unravel_index(np.abs(tile).argmax(), tile.shape)
    tile[row, column] *= 1 + 1e-15  # no more than rounding
    stored.write(index, tile)
    assert ntkpipe.verify(store, model, progress=False).is_good
    tile[row, column] *= 1.001
    stored.write(index, tile)
    report = ntkpipe.verify(store, model, progress=False)
    (bad,) = [certificate for certificate in report.certificates if not certificate["is_good"]]
    rows = {index[0] * 10 + row} | ({index[1] * 10 + column} if array == "kernel/train" else set())
    assert (bad["array"], set(bad["suspect_rows"]), bad["num_suspects"]) == (array, rows, len(rows))
    assert ntkpipe.repair(store, model, progress=False).is_good
    np.testing.assert_array_equal(stored.read(index), good)


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run:UserWarning")
@pytest.mark.parametrize("change", [lambda t: 1.001 * t, lambda t: t + 1e-3, np.zeros_like, np.negative])
def test_a_wrong_tile_is_found_by_gradients_alone(change, tmp_path):
    """Every row is in one of the sums, so that no tile is missed."""
    model = redraw(UNLIKE["straight-through rounding"]())
    store = compute(model, tmp_path / "k.zarr", compute_dtype="float64")
    stored = store.store.arrays["kernel/train"]
    for index in ((0, 1), (2, 4)):
        good = stored.read(index).copy()
        stored.write(index, np.ascontiguousarray(change(good)))
        (bad, _) = ntkpipe.verify(store, model, progress=False).certificates
        assert not bad["is_good"]
        assert {index[0], index[1]} <= {row // 10 for row in bad["suspect_rows"]}
        stored.write(index, good)


@pytest.mark.parametrize("options", [{"kind": "pntk"}, {"kind": "trace"}, {"kind": "diagonal"}, {"kind": "output:1"}])
def test_planes_of_groups_and_outputs_are_certified_by_gradients_alone(options, tmp_path):
    model = redraw(module_hook())
    store = compute(model, tmp_path / "k.zarr", compute_dtype="float64", groups={"first": ["0.*"]}, **options)
    report = ntkpipe.verify(store, model, progress=False)
    assert report.is_good, report.findings
    assert all(certificate["by_backward"] for certificate in report.certificates)
    array = next(name for name in store.store.arrays if name.startswith("groups/first") and name.endswith("/train"))
    stored = store.store.arrays[array]
    tile = stored.read((1, 3)).copy()
    tile[2, 1] *= 1.001
    stored.write((1, 3), tile)
    bad = [each for each in ntkpipe.verify(store, model, progress=False).certificates if not each["is_good"]]
    assert [each["array"] for each in bad] == [array]
    assert set(bad[0]["suspect_rows"]) == {7, 16}


def test_an_ordinary_model_is_certified_in_one_pass_and_records_say_how(tmp_path, monkeypatch):
    model = redraw(mlp())
    store = compute(model, tmp_path / "k.zarr", compute_dtype="float64")
    with monkeypatch.context() as patch:
        patch.setattr("ntkpipe.build.from_model.GradientProducts", None)  # not needed
        assert ntkpipe.verify(store, model, progress=False).is_good
    record = store.store.read_result("certificate")
    assert [kernel["by_backward"] for kernel in record["kernels"]] == [False, False]
    # Earlier versions did not record it.
    kernels = [{key: value for key, value in kernel.items() if key != "by_backward"} for kernel in record["kernels"]]
    store.store.write_result("certificate", {**record, "kernels": kernels})
    assert [row[-1] for row in verification_section(store.store).parts[1].rows] == ["good", "good"]
    kernels = [{**kernel, "by_backward": True} for kernel in kernels]
    store.store.write_result("certificate", {**record, "kernels": kernels})
    said = [row[-1] for row in verification_section(store.store).parts[1].rows]
    assert said == 2 * ["good, by gradients alone"]


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run:UserWarning")
def test_certificates_by_gradients_show_their_progress(tmp_path, capsys):
    model = redraw(UNLIKE["straight-through rounding"]())
    store = compute(model, tmp_path / "k.zarr", compute_dtype="float64")
    capsys.readouterr()
    assert ntkpipe.verify(store, model, progress=True).is_good
    shown = capsys.readouterr().err
    assert "gradients of train" in shown
    assert "gradients of test" in shown
