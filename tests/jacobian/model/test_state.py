"""Tensors of any layout are checked, copied and fingerprinted; what has no derivative is refused by name."""

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from reference import Custom, redraw
from torch import nn

import ntkpipe
from ntkpipe.base.errors import ModelError, NonFiniteError, NtkpipeError
from ntkpipe.jacobian.model.functional import prepare_model
from ntkpipe.jacobian.model.state import fingerprint, num_bytes

# torch warns that such tensors are new, and where it is not told whether to check sparse ones.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning"),
]
CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(7, 4, generator=GENERATOR, dtype=torch.float64)
EDGES = torch.tensor([[1.0, 0, 2, 0], [0, 0, -1, 3], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.float64)
OPTIONS = {"compute_dtype": "float64", "workers": 1}


def graph(edges, **members):
    """A layer on each side of a graph, whose edges are the buffer ``edges``."""
    members = {"first": nn.Linear(4, 4), "last": nn.Linear(4, 2), **members}
    model = Custom(lambda m, x: m.last(torch.tanh((m.edges @ torch.tanh(m.first(x)).T).T)), **members)
    model = redraw(model).double()
    model.register_buffer("edges", edges)
    return model


def added(values, read=lambda values, x: values.to(x.dtype)):
    """A model that adds a buffer, read in its own way, to what a layer returns."""
    layers = {"first": nn.Linear(4, 4), "last": nn.Linear(4, 2)}
    model = redraw(Custom(lambda m, x: m.last(torch.tanh(m.first(x)) + read(m.values, x)), **layers)).double()
    model.register_buffer("values", values)
    return model


def mlp():
    return redraw(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))).double()


def live(model, inputs=X):
    """The kernel by autograd of the model itself, which is not copied: copies lose hooks of parameters."""
    rows, parameters = [], [p for p in model.parameters() if p.requires_grad]
    for sample in range(len(inputs)):
        outputs = model(inputs[[sample, sample]])[0]
        grads = torch.autograd.grad(outputs.sum() / len(outputs) ** 0.5, parameters, materialize_grads=True)
        rows.append(torch.cat([grad.to_dense().reshape(-1) for grad in grads]))
    jacobian = torch.stack(rows)
    return (jacobian @ jacobian.T).numpy()


# Made when they are needed, since torch warns.
SPARSE = {
    "coo": EDGES.to_sparse,
    "coo with repeated entries": lambda: torch.sparse_coo_tensor(
        [[0, 0, 1, 3], [0, 0, 2, 1]], [1.0, 2, -1, 1], (4, 4), dtype=torch.float64
    ),
    "coo without entries": lambda: torch.sparse_coo_tensor(size=(4, 4), dtype=torch.float64),
    "csr": EDGES.to_sparse_csr,
    "csc": EDGES.to_sparse_csc,
}


@pytest.mark.parametrize("edges", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("keep", ["buffer", "attribute", "frozen parameter", "object"])
def test_sparse_constants_give_the_kernel_of_dense_ones(edges, keep):
    edges = edges()
    model = graph(edges)
    if keep != "buffer":
        del model.edges
        model.edges = edges if keep == "attribute" else nn.Parameter(edges, requires_grad=False)
    if keep == "object":
        model.edges, model.kept = None, SimpleNamespace(edges=[edges])
        model.kept.model = model.kept  # a circle
        model.function = lambda m, x: m.last(torch.tanh((m.kept.edges[0] @ torch.tanh(m.first(x)).T).T))
    exact = live(graph(edges.to_dense()))
    assert reference.error(ntkpipe.kernel_matrix(model, X, **OPTIONS), exact) < 1e-12


@pytest.mark.parametrize("options", [{"jacobian": "fallback"}, {"self_check": False}, {"kind": "ntk"}])
def test_sparse_buffers_are_right_however_the_kernel_is_computed(options):
    exact = reference.kernel(graph(EDGES), X, kind=options.get("kind", "pntk"))
    found = ntkpipe.kernel_matrix(graph(EDGES.to_sparse()), X, **OPTIONS, **options)
    assert reference.error(found, exact) < 1e-12


@pytest.mark.parametrize("name", ["coo", "csr"])
def test_a_store_of_a_model_with_sparse_buffers_is_resumed_and_verified(tmp_path, name):
    model, options = graph(SPARSE[name]()), {"store": tmp_path / "a.zarr", "tile": 3, "progress": False, **OPTIONS}
    ntkpipe.compute_kernel(model, X, **options)
    found = ntkpipe.compute_kernel(model, X, **options)
    assert reference.error(np.asarray(found.train[:]), reference.kernel(graph(EDGES), X, kind="pntk")) < 1e-12
    assert ntkpipe.verify(tmp_path / "a.zarr", model=model, progress=False).is_good
    other = graph(SPARSE[name]() * 2)
    with pytest.raises(NtkpipeError, match=r"model\.state_digest"):
        ntkpipe.compute_kernel(other, X, **options)


quantised = torch.quantize_per_tensor
LOW = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint16, torch.bool]
VALUES = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=torch.float64)
COMPLEX = (1j * VALUES + 1).conj()


class Sub(torch.Tensor):
    """A subclass that changes nothing."""


CONSTANTS = {str(dtype): (VALUES.to(dtype), None, VALUES.to(dtype).double()) for dtype in LOW} | {
    "qint8": (lambda: quantised(VALUES.float(), 0.5, 1, torch.qint8), lambda v, x: v.dequantize().to(x.dtype), VALUES),
    "quint8": (
        lambda: quantised(VALUES.float(), 0.5, 9, torch.quint8),
        lambda v, x: v.dequantize().to(x.dtype),
        VALUES,
    ),
    "expanded": (VALUES[1:2].expand(4), None, VALUES[1:2].expand(4)),
    "conjugate": (COMPLEX, lambda v, x: v.imag.to(x.dtype), -VALUES),
    "negated": (COMPLEX.imag, None, -VALUES),
    "jagged": (
        lambda: torch.nested.nested_tensor([VALUES[None], VALUES.repeat(2, 1)], layout=torch.jagged),
        lambda v, x: v.values().sum(0).to(x.dtype),
        3 * VALUES,
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([VALUES[None], VALUES.repeat(2, 1)]),
        lambda v, x: sum(each.sum(0) for each in v.unbind()).to(x.dtype),
        3 * VALUES,
    ),
    "subclass": (VALUES.as_subclass(Sub), None, VALUES),
}


@pytest.mark.parametrize(("values", "read", "plain"), CONSTANTS.values(), ids=CONSTANTS)
def test_buffers_of_any_kind_give_the_kernel_of_plain_ones(tmp_path, values, read, plain):
    values = values() if callable(values) else values
    model = added(values) if read is None else added(values, read)
    exact = live(added(plain))
    options = {"store": tmp_path / "a.zarr", "tile": 4, "progress": False, **OPTIONS}
    assert reference.error(np.asarray(ntkpipe.compute_kernel(model, X, **options).train[:]), exact) < 1e-12
    # The same numbers are the same model, whatever the memory they are in.
    ntkpipe.compute_kernel(model, X, **options)


SCALED = {
    "coo": lambda scale: (EDGES * scale).to_sparse(),
    "csr": lambda scale: (EDGES * scale).to_sparse_csr(),
    "csc": lambda scale: (EDGES * scale).to_sparse_csc(),
    "bsr": lambda scale: (EDGES * scale).to_sparse_bsr((2, 2)),
    "scale of qint8": lambda scale: quantised(VALUES.float(), 0.5 * scale, 1, torch.qint8),
    "conjugate": lambda scale: (COMPLEX.conj() * scale).conj(),
    "jagged": lambda scale: torch.nested.nested_tensor([VALUES[None] * scale], layout=torch.jagged),
    "nested": lambda scale: torch.nested.nested_tensor([VALUES[None] * scale]),
    "float8": lambda scale: (VALUES * scale).to(torch.float8_e4m3fn),
    "mkldnn": lambda scale: (VALUES.float() * scale).to_mkldnn(),
}


@pytest.mark.parametrize("make", SCALED.values(), ids=SCALED)
def test_fingerprints_see_values_and_nothing_else_in_any_layout(make):
    prints = []
    for scale in (1, 1, 2):
        model = mlp()
        model.register_buffer("values", make(scale))
        prints.append(fingerprint(model, ("0.weight",)))
    assert prints[0] == prints[1] != prints[2]
    assert num_bytes([make(1)]) > 0


def with_frozen(value):
    model = graph(EDGES)
    model.frozen = nn.Parameter(value, requires_grad=False)
    return model


def hooked(hook, module=None):
    """A model whose first weight, or the output of one of its layers, has a gradient hook."""
    model = mlp()
    if module is None:
        model[0].weight.register_hook(hook)
    else:
        model[module].register_forward_hook(lambda m, i, o: o.register_hook(hook) and None if o.requires_grad else None)
    return model


def in_place(grad):
    grad.mul_(0.5)


REFUSED = {
    "sparse parameter": (
        lambda: with_trainable(EDGES.to_sparse()),
        "parameter 'edges' is torch.sparse_coo; needed plain",
    ),
    "csr parameter": (lambda: with_trainable(EDGES.to_sparse_csr()), "parameter 'edges' is torch.sparse_csr"),
    "meta parameter": (lambda: nn.Linear(4, 2, device="meta"), "'weight' of the model is on the meta device.*to_empty"),
    "meta buffer": (lambda: graph(EDGES.to("meta")), "'edges' of the model is on the meta device"),
    "meta frozen": (lambda: with_frozen(torch.ones(3, device="meta")), "'frozen' of the model is on the meta device"),
    "lazy buffer": (lambda: graph(nn.parameter.UninitializedBuffer()), "'edges' of the model is not initialised"),
    "lazy parameter": (lambda: with_frozen_lazy(), "'frozen' of the model is not initialised; run the model once"),
    "computed buffer": (lambda: computed_buffer(), "buffer 'values' was computed from parameters.*detach it"),
    "computed attribute": (
        lambda: computed_attribute(),
        "depend on 1 tensors that require a gradient and are not param",
    ),
    "nan in coo": (lambda: graph(EDGES.to_sparse() * torch.nan), "'edges' of the model has 6 NaN entries of 16"),
    "nan in float8": (lambda: added((VALUES * torch.nan).to(torch.float8_e5m2)), "'values' of the model has 4 NaN"),
    "mkldnn": (lambda: graph(EDGES.float().to_mkldnn()), "cannot be converted to torch.float64 on cpu"),
    "lock": (lambda: holding(threading.Lock()), "cannot pickle '_thread.lock' object. at 'held'; keep what cannot be"),
    "lock in a part": (lambda: nn.Sequential(nn.Tanh(), holding(threading.Lock())), "at '1.held'; keep what cannot be"),
    "generator in a list": (lambda: holding([(i for i in ())]), "at 'held'"),
    "quantised by channels, with float offsets": (
        lambda: added(torch.quantize_per_channel(VALUES.float(), VALUES.float() + 1, VALUES.float(), 0, torch.qint8)),
        "the model cannot be copied .*quantized",
    ),
    "bsr, which has no backward": (
        lambda: graph(EDGES.to_sparse_bsr((2, 2))),
        r"where autograd differentiated it.*keep it as \.to_sparse_csr\(\), or dense",
    ),
    "masked tensor": (lambda: added(torch.masked.masked_tensor(VALUES, VALUES > 0), lambda v, x: 0), "'values' of the"),
    "hook in place": (lambda: hooked(in_place), "parameter '0.weight' has a hook that changes its gradient"),
    "hook that scales": (lambda: hooked(lambda g: g * 0.5), "has a hook that changes its gradient.*remove the hook"),
    "hook that clips": (lambda: hooked(lambda g: g.clamp_(-10, 10)), "has a hook that changes its gradient"),
    "hook that masks": (lambda: hooked(lambda g: g * torch.eye(4)), "has a hook that changes its gradient"),
    "hook that raises": (lambda: hooked(lambda g: g.nothing), "has a hook that changes its gradient"),
}


def holding(value):
    model = mlp()
    model.held = value
    return model


def with_trainable(value):
    model = graph(EDGES)
    del model.edges
    model.edges = nn.Parameter(value)
    return model


def with_frozen_lazy():
    model = mlp()
    model.frozen = nn.parameter.UninitializedParameter(requires_grad=False)
    return model


def computed_buffer():
    model = added(VALUES)
    model.values = model.first.weight[0]
    return model


def computed_attribute():
    model = added(VALUES)
    del model.values
    model.values = model.first.weight[0] * 2
    return model


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_kernel_is_refused_by_name_before_anything_is_written(tmp_path, make, message):
    path = Path(tmp_path / "a.zarr")
    with pytest.raises((ModelError, NonFiniteError), match=message):
        ntkpipe.compute_kernel(make(), X, store=path, progress=False, **OPTIONS)
    assert not path.exists()


HOOKS = {
    "parameter, looks": lambda: hooked(lambda grad: None),
    "parameter, returns the same": lambda: hooked(lambda grad: grad),
    "activation, in place": lambda: hooked(in_place, 1),
    "activation, another": lambda: hooked(lambda grad: grad * 0.5, 1),
    "layer, in place": lambda: hooked(in_place, 0),
    "output, in place": lambda: hooked(in_place, 2),
    "output, another": lambda: hooked(lambda grad: grad * torch.tensor([2.0, -1.0]), 2),
    "module, in place": lambda: on_module("register_full_backward_hook", lambda m, inner, outer: in_place(inner[0])),
    "module, of the output, in place": lambda: on_module(
        "register_full_backward_pre_hook", lambda m, outer: in_place(outer[0])
    ),
    "module, another": lambda: on_module("register_full_backward_hook", lambda m, inner, outer: (inner[0] * 0.5,)),
    "accumulated": lambda: accumulated(),
    "backward in place": lambda: redraw(Custom(lambda m, x: Halved.apply(m.layer(x)), layer=nn.Linear(4, 2))).double(),
}


def on_module(name, hook):
    model = mlp()
    getattr(model[2], name)(lambda *args: None if (found := hook(*args)) is None else found)
    return model


def accumulated():
    model = mlp()
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: parameter.grad.zero_())
    return model


class Halved(torch.autograd.Function):
    """The identity, whose backward pass changes its argument."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(0.5)


@pytest.mark.parametrize("options", [{}, {"jacobian": "fallback"}], ids=str)
@pytest.mark.parametrize("make", HOOKS.values(), ids=HOOKS)
def test_the_kernel_is_that_of_the_backward_pass_with_its_hooks(make, options):
    model = make()
    assert reference.error(ntkpipe.kernel_matrix(model, X, **OPTIONS, **options), live(model)) < 1e-12


def test_hooks_of_parameters_that_are_not_selected_do_not_matter():
    model = hooked(in_place)
    found = ntkpipe.kernel_matrix(model, X, parameters="2.*", **OPTIONS)
    model[0].requires_grad_(False)
    assert reference.error(found, live(model)) < 1e-12


def test_tensors_that_an_earlier_pass_left_behind_are_no_obstacle():
    def forward(model, x):
        model.seen.append(torch.tanh(model.first(x)))
        model.kept["last"] = (model.seen[-1],)
        return model.last(model.seen[-1])

    model = redraw(Custom(forward, first=nn.Linear(4, 4), last=nn.Linear(4, 2))).double()
    model.seen, model.kept = [], {}
    model(X)
    assert reference.error(ntkpipe.kernel_matrix(model, X, **OPTIONS), live(model)) < 1e-12


KEEPS = {
    "attribute": lambda m, h: setattr(m, "kept", h),
    "detached": lambda m, h: setattr(m, "kept", h.detach()),
    "list": lambda m, h: m.listed.append(h),
    "dict": lambda m, h: m.named.update(h=[h]),
    "set": lambda m, h: m.several.add(h),
    "object": lambda m, h: setattr(m.object, "kept", (h,)),
    "buffer": lambda m, h: setattr(m, "buffer", h.detach()),
}


@pytest.mark.parametrize("options", [{}, {"jacobian": "fallback"}, {"kind": "ntk", "tile": 3}], ids=str)
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_a_model_that_keeps_what_it_computes_has_the_kernel_of_one_that_does_not(keep, options):
    def forward(model, x):
        hidden = torch.tanh(model.first(x))
        keep(model, hidden)
        return model.last(hidden)

    parts = {"listed": [], "named": {}, "several": set(), "object": SimpleNamespace(), "kept": None}
    model = redraw(Custom(forward, first=nn.Linear(4, 4), last=nn.Linear(4, 2), **parts)).double()
    model.register_buffer("buffer", torch.zeros(1, 4, dtype=torch.float64))
    exact = reference.kernel(model, X, kind=options.get("kind", "pntk"))
    assert reference.error(ntkpipe.kernel_matrix(model, X, **{**OPTIONS, "workers": 2}, **options), exact) < 1e-12
    assert not model.listed  # it is a copy that is run


def test_a_parameter_that_overflows_the_compute_dtype_is_named():
    model = mlp()
    model[0].bias.data[1] = 1e39
    with pytest.raises(
        NonFiniteError, match=r"parameter '0\.bias' overflows torch\.float32; use compute_dtype='float64'"
    ):
        prepare_model(model, dtype=torch.float32, device=CPU)
    assert prepare_model(model, dtype=torch.float64, device=CPU).names[1] == "0.bias"


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("layer", ["embedding", "sum", "mean"])
def test_sparse_gradients_are_those_of_dense_ones(sparse, layer):
    table = (
        nn.Embedding(10, 4, sparse=sparse)
        if layer == "embedding"
        else nn.EmbeddingBag(10, 4, mode=layer, sparse=sparse)
    )
    model = redraw(
        Custom(
            lambda m, x: m.last(torch.tanh(m.table(x).reshape(len(x), -1, 4).sum(1))), table=table, last=nn.Linear(4, 2)
        )
    ).double()
    tokens = torch.randint(0, 10, (7, 3), generator=torch.Generator().manual_seed(0))
    assert reference.error(ntkpipe.kernel_matrix(model, tokens, **OPTIONS), live(model, tokens)) < 1e-12
