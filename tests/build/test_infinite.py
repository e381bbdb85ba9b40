"""Masks of -inf, bounds and observers are exact; what lets an infinity through is an error that names the sample."""

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from reference import Custom, redraw
from torch import nn

import ntkpipe
from ntkpipe.base.errors import NonFiniteError

N, T, WIDTH, INF = 7, 5, 4, float("inf")
X = torch.randn(N, T, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(T)
# Unequal lengths: tokens behind the end of a sample are hidden from all others.
LENGTHS = torch.tensor([2, 3, 4, 5, 2, 3, 4])
PADDING = torch.zeros(N, T, T).masked_fill(torch.arange(T) >= LENGTHS[:, None, None], -INF)
OPTIONS = {"compute_dtype": "float64", "workers": 1}

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run:UserWarning"),
    pytest.mark.filterwarnings("ignore:Complex modules:UserWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex:UserWarning"),
]


def attention(forward=None, **buffers):
    """One head of attention with a mask that is added to its scores, a buffer or an input."""

    def attend(model, x, mask=None):
        scores = model.query(x) @ model.key(x).mT / 2 + (model.mask if mask is None else mask).to(x)
        return model.last((scores.softmax(-1) @ model.value(x)).mean(1))

    layers = {name: nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "value")}
    model = redraw(Custom(forward or attend, **layers, last=nn.Linear(WIDTH, 2))).double()
    for name, value in buffers.items():
        model.register_buffer(name, value)
    return model


def layer(function, **buffers):
    model = redraw(Custom(function, first=nn.Linear(WIDTH, 5), last=nn.Linear(5, 2))).double()
    for name, value in buffers.items():
        model.register_buffer(name, value)
    return model


def fused(model, x):
    hidden = (model.query(x), model.key(x), model.value(x))
    return model.last(
        F.scaled_dot_product_attention(*(each[:, None] for each in hidden), attn_mask=model.mask.to(x))[:, 0].mean(1)
    )


def encoder(**options):
    inner = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)
    model = Custom(
        lambda m, x: m.last(m.inner(x, src_mask=m.mask.to(x), **options).mean(1)), inner=inner, last=nn.Linear(4, 2)
    )
    model = redraw(model).double()
    model.register_buffer("mask", CAUSAL.clone())
    return model


def frozen():
    model = attention()
    model.mask = nn.Parameter(CAUSAL.double(), requires_grad=False)
    return model


def observed(module):
    model = layer(lambda m, x: m.last(torch.tanh(m.first(x[:, 0]))))
    model.observer = module
    return model


RIGHT = {
    "buffer": lambda: attention(mask=CAUSAL),
    "buffer of low precision": lambda: attention(mask=CAUSAL.to(torch.float8_e5m2)),
    "sparse elsewhere": lambda: attention(mask=CAUSAL, unused=torch.diag(torch.full((3,), INF)).to_sparse()),
    "frozen parameter": frozen,
    "fused attention": lambda: attention(fused, mask=CAUSAL),
    "encoder": encoder,
    "causal encoder": lambda: encoder(is_causal=True),
    "bounds": lambda: layer(
        lambda m, x: m.last(torch.clamp(m.first(x[:, 0]), m.low, m.high)),
        low=torch.tensor(-INF),
        high=torch.tensor(INF),
    ),
    "times": lambda: layer(
        lambda m, x: m.last(torch.tanh(m.first(x[:, 0])) / m.time), time=torch.tensor([1, INF, 2, 3, INF])
    ),
    "forbidden words": lambda: layer(
        lambda m, x: (m.last(torch.tanh(m.first(x[:, 0]))) + m.bias).softmax(-1), bias=torch.tensor([0.0, -INF])
    ),
    "best loss so far": lambda: layer(lambda m, x: m.last(m.first(x[:, 0])), best=torch.tensor(INF)),
    "complex": lambda: layer(lambda m, x: m.last(m.first(x[:, 0])), pole=torch.tensor([complex(INF, 1)])),
    "observer": lambda: observed(torch.ao.quantization.MinMaxObserver()),
    "fake quantisation": lambda: observed(torch.ao.quantization.FakeQuantize()),
}


@pytest.mark.filterwarnings("ignore::UserWarning:torch.ao")
@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_infinite_buffers_that_reach_no_output_are_exact(make):
    model = make()
    assert reference.error(ntkpipe.kernel_matrix(model, X, **OPTIONS), reference.kernel(model, X, kind="pntk")) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("options", [{}, {"jacobian": "fallback"}, {"self_check": False}], ids=str)
def test_masks_as_inputs_are_exact(dtype, options):
    batch = {"x": X, "mask": PADDING.to(dtype)}
    found = ntkpipe.kernel_matrix(attention(), batch, kind="ntk", **OPTIONS, **options)
    assert reference.error(found, reference.kernel(attention(), batch)) < 1e-12


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float64).min, torch.finfo(torch.float32).min, -1e4])
def test_masks_of_large_numbers_are_exact(lowest):
    batch = {"x": X, "mask": PADDING.double().clamp_min(lowest)}
    found = ntkpipe.kernel_matrix(attention(), batch, **OPTIONS)
    assert reference.error(found, reference.kernel(attention(), batch, kind="pntk")) < 1e-12


INPUTS = {
    "distances": lambda m, x: m.last(torch.tanh(m.first(x[:, 1:].clamp(-9, 9))) * torch.exp(-x[:, :1])),
    "replaced": lambda m, x: m.last(m.first(torch.nan_to_num(x, posinf=1.0))),
    "bounded": lambda m, x: m.last(torch.tanh(m.first(torch.atan(x)))),
}


@pytest.mark.parametrize("name", INPUTS)
def test_infinite_inputs_that_the_model_makes_finite_are_exact(name):
    values = X[:, 0].abs()
    values[[2, 5], 0] = INF
    inner = nn.Linear(WIDTH - (name == "distances"), 5)
    model = redraw(Custom(INPUTS[name], first=inner, last=nn.Linear(5, 2))).double()
    found = ntkpipe.kernel_matrix(model, values, **OPTIONS)
    assert reference.error(found, reference.kernel(model, values, kind="pntk")) < 1e-12


def test_a_store_with_masks_is_grown_derived_verified_and_repaired(tmp_path):
    model, path = attention(bound=torch.tensor(INF)), tmp_path / "a.zarr"

    def batch(start, stop):
        return {"x": X[start:stop], "mask": PADDING[start:stop]}

    options = {"kind": "ntk", "tile": 2, "store": path, "progress": False, "test_inputs": batch(5, 7), **OPTIONS}
    ntkpipe.compute_kernel(model, batch(0, 5), **options)
    found = ntkpipe.compute_kernel(model, batch(0, 7), grow=True, **options)
    assert reference.error(np.asarray(found.train[:]), reference.kernel(model, batch(0, 7))) < 1e-12
    derived = ntkpipe.derive_kernel(path, kind="trace", to=tmp_path / "b.zarr", samples=True, progress=False)
    assert ntkpipe.verify(derived, model=model, progress=False).is_good
    for chunk in (path / "samples/train/mask/c/0/0/0", path / "kernel/train/c/0/1"):
        chunk.write_bytes(bytes(len(chunk.read_bytes())))
        assert not ntkpipe.verify(path, progress=False).is_good
        given = {"inputs": batch(0, 7), "test_inputs": batch(5, 7)} if "samples" in str(chunk) else {}
        ntkpipe.repair(path, model=model, progress=False, **given)
        assert ntkpipe.verify(path, model=model, progress=False).is_good


MANY = torch.randn(60, T, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def blind(sample):
    """Masks of which one hides everything from one token of a sample."""
    mask = torch.zeros(60, T, T).masked_fill(torch.arange(T) >= 3, -INF)
    mask[sample, 1] = -INF
    return {"x": MANY, "mask": mask}


@pytest.mark.parametrize("sample", [0, 37, 59])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("self_check", [False, True])
def test_an_input_that_no_output_survives_is_named_before_anything_is_written(tmp_path, sample, split, self_check):
    batches = {"inputs": blind(sample)} if split == "train" else {"inputs": blind(0) | {"mask": torch.zeros(60, T, T)}}
    batches |= {} if split == "train" else {"test_inputs": blind(sample)}
    with pytest.raises(NonFiniteError, match=rf"sample {sample}( are|;)"):
        ntkpipe.compute_kernel(
            attention(), store=tmp_path / "a.zarr", progress=False, self_check=self_check, **batches, **OPTIONS
        )
    assert not (tmp_path / "a.zarr").exists()


def lost(model, x):
    """Finite, but its derivative is NaN where the buffer is infinite: the trap of torch.where."""
    hidden = model.first(x[:, :WIDTH]) * model.bound[x[:, WIDTH].long()][:, None]
    return model.last(torch.where(torch.isfinite(hidden), hidden, torch.zeros_like(hidden)))


def added(model, x):
    return model.last(torch.tanh(model.first(x[:, :WIDTH]))) + model.bound[x[:, WIDTH].long()][:, None]


@pytest.mark.parametrize("function", [lost, added])
@pytest.mark.parametrize("sample", [0, 37])
def test_a_buffer_whose_infinity_reaches_one_sample_is_an_error_that_names_it(tmp_path, function, sample):
    bound = torch.ones(60)
    bound[sample] = INF
    inputs = torch.cat([MANY[:, 0], torch.arange(60)[:, None]], dim=1)
    model = layer(function, bound=bound)
    message = rf"sample {sample}( are|;)"
    with pytest.raises(NonFiniteError, match=message):
        ntkpipe.kernel_matrix(model, inputs, **OPTIONS)
    with pytest.raises(NonFiniteError, match=message):
        ntkpipe.compute_kernel(model, inputs, store=tmp_path / "a.zarr", tile=7, progress=False, **OPTIONS)
    if sample == 0:  # one of those that are looked at first
        assert not (tmp_path / "a.zarr").exists()
        return
    store = ntkpipe.open_kernel(tmp_path / "a.zarr").store
    assert all(np.isfinite(array.read(index)).all() for array in store.arrays.values() for index in array.present())
    if function is lost:
        with pytest.raises(NonFiniteError, match=message):
            ntkpipe.jacobian_operator(model, inputs) @ np.ones(60)


@pytest.mark.parametrize("sample", [0, 37])
def test_an_operator_of_infinite_inputs_is_refused_at_once(sample):
    with pytest.raises(NonFiniteError, match=rf"sample {sample}( are|;)"):
        ntkpipe.jacobian_operator(attention(), blind(sample))


@pytest.mark.parametrize("selected", [True, False])
def test_selected_parameters_must_be_finite(selected):
    model = layer(lambda m, x: m.last(torch.tanh(m.first(x[:, 0]))))
    model.first.bias.data[1] = -INF  # a tanh that is stuck at -1
    if selected:
        with pytest.raises(NonFiniteError, match=r"'first\.bias' of the model has 1 NaN or infinite entries of 5"):
            ntkpipe.kernel_matrix(model, X, **OPTIONS)
    found = ntkpipe.kernel_matrix(model, X, parameters="last.*", **OPTIONS)
    model.first.requires_grad_(False)
    assert reference.error(found, reference.kernel(model, X, kind="pntk")) < 1e-12


@pytest.mark.parametrize("kind", ["buffer", "frozen"])
def test_nan_is_refused_by_name_wherever_it_is(kind):
    model = attention(mask=CAUSAL)
    value = torch.tensor([1.0, torch.nan])
    if kind == "buffer":
        model.register_buffer("extra", value, persistent=False)
    else:
        model.extra = nn.Parameter(value, requires_grad=False)
    with pytest.raises(NonFiniteError, match="'extra' of the model has 1 NaN entries of 2"):
        ntkpipe.kernel_matrix(model, X, **OPTIONS)
