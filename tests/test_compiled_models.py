"""Models behind torch.compile, torch.jit, torch.fx and torch.export are those that they were made of."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from derivatives import POINTS
from quiet import QUIET
from reference import error, kernel, redraw
from torch import nn

from ntkpipe import compute_kernel, kernel_matrix, verify
from ntkpipe.base.errors import ModelError
from ntkpipe.jacobian.model.functional import select_parameters, uncompiled
from ntkpipe.jacobian.model.state import fingerprint
from ntkpipe.jacobian.representations.interface import Rates

WORDS = ("`torch.jit:DeprecationWarning", "`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
pytestmark = [*QUIET, *(pytest.mark.filterwarnings(f"ignore:{words}") for words in WORDS)]

compiled = partial(torch.compile, backend="eager")  # Inductor takes seconds and a compiler


@pytest.fixture(autouse=True)
def _without_compilers(monkeypatch):
    """No run may compile anything, and none measures this machine's speed."""

    def refuse(*_, **__):
        raise AssertionError("a run compiled the model")

    monkeypatch.setattr("torch._dynamo.convert_frame.ConvertFrameAssert.__call__", refuse)
    monkeypatch.setattr("ntkpipe.build.prepare.measure_rates", lambda *_: Rates(32e9, 1e9))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Decorated(Plain):
    @compiled
    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@compiled
def compiled_tanh(x):
    return torch.tanh(x)


class WithFunction(Plain):
    def forward(self, x):
        return self.b(compiled_tanh(self.a(x)))


class Parts(Plain):
    """Compiled layers, one within another."""

    def __init__(self):
        super().__init__()
        self.a = compiled(self.a)
        self.b = compiled(nn.Sequential(compiled(nn.Identity()), self.b))


class Twice(Plain):
    """A compiled layer in two places."""

    def __init__(self):
        super().__init__()
        self.a = self.b = compiled(nn.Linear(2, 2))


def in_place():
    model = Plain()
    model.compile()
    return model


def exported():
    return torch.export.export(Plain(), (torch.randn(4, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()


MODELS = {
    "whole": lambda: compiled(Plain()),
    "whole, full graph": lambda: compiled(Plain(), fullgraph=True, dynamic=True),
    "in place": in_place,
    "parts": Parts,
    "part in two places": Twice,
    "forward": Decorated,
    "function": WithFunction,
    "script": lambda: torch.jit.script(Plain()),
    "trace": lambda: torch.jit.trace(Plain().eval(), torch.zeros(3, 2)),
    "symbolic trace": lambda: torch.fx.symbolic_trace(Plain()),
    "export": exported,
}


def drawn(name):
    model = MODELS[name]()
    model.eval = lambda: model  # exported modules refuse it
    return redraw(model)


def plain(name):
    """The same function without a compiler, with the same parameters."""
    model = Plain()
    if name == "part in two places":
        model.a = model.b = nn.Linear(2, 2)
    values = {n.replace("_orig_mod.", "").replace("b.1.", "b."): v for n, v in drawn(name).state_dict().items()}
    model.load_state_dict(values)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("jacobian", ["structured", "fallback"])
def test_kernels_are_those_of_what_was_compiled(name, jacobian):
    model, exact = drawn(name), kernel(plain(name), POINTS)
    found = kernel_matrix(
        model, POINTS.numpy(), kind="ntk", compute_dtype="float64", workers=2, tile=3, jacobian=jacobian
    )
    assert error(found, exact) < 1e-10


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", ["whole", "in place"])
def test_a_store_of_one_is_resumed_with_the_other(name, swapped, tmp_path):
    first, second = drawn(name), plain(name)
    first, second = (second, first) if swapped else (first, second)
    options = {"kind": "ntk", "tile": 3, "progress": False, "store": tmp_path / "kernel"}
    store = compute_kernel(first, POINTS.numpy(), **options)
    chunk = next(file for file in (tmp_path / "kernel" / "kernel" / "train" / "c").rglob("*") if file.is_file())
    before = chunk.read_bytes()
    chunk.unlink()
    store = compute_kernel(second, POINTS.numpy(), **options)
    assert chunk.read_bytes() == before
    assert verify(store, first, progress=False).is_good
    assert store.manifest.model.parameters == ("a.weight", "a.bias", "b.weight", "b.bias")


@pytest.mark.parametrize("pattern", ["b.*", "_orig_mod.b.*", "*b.weight"])
def test_patterns_are_of_names_with_and_without_the_wrapper(pattern):
    model = drawn("whole")
    found = kernel_matrix(model, POINTS.numpy(), kind="ntk", parameters=pattern, compute_dtype="float64")
    exact = plain("whole")
    exact.a.requires_grad_(False)
    if "weight" in pattern:
        exact.b.bias.requires_grad_(False)
    assert error(found, kernel(exact, POINTS)) < 1e-10


def test_groups_are_of_names_without_the_wrapper(tmp_path):
    store = compute_kernel(
        drawn("parts"), POINTS.numpy(), store=tmp_path / "kernel", groups={"last": "b.*"}, progress=False
    )
    assert store.groups == {"last": ("b.1.weight", "b.1.bias")}


def test_the_compiled_model_is_not_touched():
    model = drawn("parts")
    before, layers = list(model.state_dict()), [type(each) for each in model.modules()]
    kernel_matrix(model, POINTS.numpy())
    assert list(model.state_dict()) == before
    assert [type(each) for each in model.modules()] == layers


def test_what_is_uncompiled_shares_its_tensors_and_its_fingerprint():
    model = drawn("parts")
    found = uncompiled(model)
    assert not any("_orig_mod" in name for name, _ in found.named_modules())
    assert {p.data_ptr() for p in found.parameters()} == {p.data_ptr() for p in model.parameters()}
    other = copy.deepcopy(found)
    assert fingerprint(found, select_parameters(found, None)) == fingerprint(other, select_parameters(other, None))


def test_a_model_without_compiled_parts_is_itself():
    model = Plain()
    assert uncompiled(model) is model


def test_what_was_exported_for_one_size_of_a_batch_is_refused_as_such():
    model = torch.export.export(Plain(), (torch.randn(4, 2),)).module()
    with pytest.raises(ModelError, match="Guard failed"):
        kernel_matrix(model, POINTS.numpy())


def test_a_compiled_model_that_has_run_is_the_same(monkeypatch):
    monkeypatch.undo()  # it compiles here
    model = compiled(redraw(Plain()))
    with torch.no_grad():
        outputs = model(POINTS.float()).numpy()
    found = kernel_matrix(model, POINTS.numpy(), kind="ntk", compute_dtype="float64", workers=2, tile=3)
    assert error(found, kernel(redraw(Plain()), POINTS)) < 1e-10
    with torch.no_grad():  # and is compiled afterwards
        np.testing.assert_array_equal(model(POINTS.float()).numpy(), outputs)
