"""The certificate: a clean store passes, one wrong entry among all is found and its row named."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import Custom, redraw
from torch import nn

import ntkpipe
from ntkpipe.base.errors import StoreMismatchError

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
