"""The self-check finds what is wrong, and moves it to where it is right, or stops."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from engines import setup_of
from reference import Custom, redraw
from small import WithoutRule
from torch import nn

import ntkpipe
from ntkpipe.base.errors import SelfCheckError
from ntkpipe.jacobian import fallback
from ntkpipe.jacobian import self_check as check
from ntkpipe.jacobian.model.functional import prepare_model
from ntkpipe.jacobian.probe import make_engine, probe
from ntkpipe.jacobian.self_check import self_check
from ntkpipe.jacobian.tracing.rules.linear import linear
from ntkpipe.jacobian.tracing.rules.table import RULES

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mlp():
    return redraw(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)))


AUTOGRAD, FUNC = ("plain autograd", "by_loop"), ("torch.func", "by_vjp")


def checked(model, dtype=torch.float64, method=None):
    functional = prepare_model(model, dtype=dtype, device=torch.device("cpu"))

    def load(numbers):
        return X[list(numbers)].to(dtype)

    engine = make_engine(probe(functional, load, len(X), structured=True), setup_of(torch.eye(3)))
    engine = engine if method is None else engine.changed(method=method)
    return self_check(engine, load, len(X), batch=64, memory_bytes=2**30)


def sabotaged(change):
    """A linear rule whose inputs are changed on batches that tracing does not see: it probes three and five samples."""

    def rule(input, weight, bias=None):  # noqa: A002
        bound = linear(input, weight, bias)
        tensor, form = bound.operands["weight"]

        def inputs():
            rows = form.inputs()
            return change(rows) if len(rows) not in {3, 5} else rows

        wrong = (tensor, dataclasses.replace(form, inputs=inputs))
        return dataclasses.replace(bound, operands={**bound.operands, "weight": wrong})

    return rule


SABOTAGE = {
    "a thousandth more": (lambda rows: 1.001 * rows, 2e-3),
    "samples out of order": (lambda rows: rows.roll(1, 0), 0.1),
}


def test_a_right_engine_passes_untouched():
    engine, report = checked(mlp())
    assert report.moved == {}
    assert report.worst_error < 1e-12
    assert report.compute_error < 1e-12
    assert report.dtype == "float64"
    assert engine.fallback == ()


@pytest.mark.parametrize("name", ["a thousandth more", "samples out of order"])
def test_a_wrong_rule_goes_to_the_fallback_with_its_error(name, monkeypatch):
    change, size = SABOTAGE[name]
    monkeypatch.setitem(RULES, F.linear, sabotaged(change))
    engine, report = checked(mlp())
    assert set(report.moved) == {"0.weight", "3.weight"}  # biases do not see the inputs
    for reason in report.moved.values():
        assert reason.startswith("self-check: off by ")
        assert size / 1.1 <= float(reason.rpartition(" ")[2]) < 10
    assert set(engine.fallback) == {"0.weight", "3.weight"}
    assert report.worst_error < 1e-12


def test_the_kernel_is_right_although_a_rule_is_wrong(monkeypatch):
    monkeypatch.setitem(RULES, F.linear, sabotaged(lambda rows: 1.001 * rows))
    model = mlp()
    exact = reference.kernel(model, X)
    right = ntkpipe.kernel_matrix(model, X, kind="ntk", compute_dtype="float64", workers=1)
    assert reference.error(right, exact) <= 1e-12
    wrong = ntkpipe.kernel_matrix(model, X, kind="ntk", compute_dtype="float64", workers=1, self_check=False)
    assert reference.error(wrong, exact) > 1e-4


def test_a_small_term_cannot_hide_behind_a_large_one(monkeypatch):
    monkeypatch.setitem(RULES, F.linear, sabotaged(lambda rows: 1.1 * rows))
    model = mlp()
    with torch.no_grad():
        model[3].weight *= 1e-3  # so the Jacobian of the first layer is a millionth of the kernel
    _, report = checked(model)
    assert "0.weight" in report.moved


def wrong_method(method):
    return lambda *args: 1.01 * method(*args)


def test_a_wrong_vmap_gives_way_to_the_loop(monkeypatch):
    monkeypatch.setitem(fallback.METHODS, "vmap", wrong_method(fallback.by_vmap))
    engine, report = checked(nn.Sequential(WithoutRule(6), mlp()))
    assert engine.fallback == ("0.offset",)
    assert engine.method == "loop"
    assert report.worst_error < 1e-12


def test_the_run_stops_if_everything_is_wrong(monkeypatch):
    monkeypatch.setitem(RULES, F.linear, sabotaged(lambda rows: 2 * rows))
    monkeypatch.setitem(fallback.METHODS, "vmap", wrong_method(fallback.by_vmap))
    monkeypatch.setitem(fallback.METHODS, "loop", wrong_method(fallback.by_loop))
    with pytest.raises(SelfCheckError, match=r"disagree on .*0\.weight \(self-check: off by 2\.0e-02\)"):
        checked(mlp())


def test_finite_differences_side_with_the_engine_against_a_wrong_reference(monkeypatch):
    original = check._reference

    def reference_of(*args):
        found, *others = original(*args)
        return {**found, "0.weight": 1.5 * found["0.weight"]}, *others

    monkeypatch.setattr(check, "_reference", reference_of)
    engine, report = checked(mlp())
    assert report.reference_wrong == ("0.weight",)
    assert report.moved == {}
    assert "0.weight" not in engine.fallback


def test_finite_differences_leave_the_model_as_it_was(monkeypatch):
    monkeypatch.setitem(RULES, F.linear, sabotaged(lambda rows: 2 * rows))
    model = mlp()
    engine, _ = checked(model)
    wanted = {name: value.double() for name, value in model.named_parameters()}
    assert all(torch.equal(value, wanted[name]) for name, value in engine.model.parameters.items())


def test_a_dtype_that_is_not_enough_is_refused():
    class Cancelling(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x):
            return (self.a(x) + 1e6).tan() * 1e-3  # 1e6 leaves float32 no digits of the angle

    with pytest.raises(SelfCheckError, match="compute_dtype='float64'"):
        checked(redraw(Cancelling()), torch.float32)


def test_models_that_cannot_run_in_float64_are_checked_in_their_own_dtype():
    class OnlyFloat32(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x):
            if x.dtype != torch.float32:
                raise RuntimeError("not implemented for Double")
            return self.a(x)

    _, report = checked(redraw(OnlyFloat32()), torch.float32)
    assert report.dtype == "float32"
    assert report.moved == {}


def test_the_report_says_what_was_compared_and_is_json():
    _, report = checked(mlp())
    assert report.num_covectors == 2
    assert len(report.samples) == 3
    assert json.loads(json.dumps(dataclasses.asdict(report)))["num_covectors"] == 2


@pytest.mark.parametrize(("method", "first", "second"), [("vmap", AUTOGRAD, FUNC), ("loop", FUNC, AUTOGRAD)])
def test_the_reference_is_what_the_engine_does_not_use_and_else_the_other(method, first, second, monkeypatch):
    _, report = checked(mlp(), method=method)
    assert report.reference == first[0]

    def fails(*_):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(check, first[1], fails)
    _, report = checked(mlp(), method=method)
    assert report.reference == f"{second[0]} (RuntimeError: no such operation)"
    assert report.compute_error < 1e-12
    monkeypatch.setattr(check, first[1], lambda *args: torch.nan * getattr(fallback, first[1])(*args))
    _, report = checked(mlp(), method=method)
    assert report.reference == f"{second[0]} (NaN)"


def test_the_loop_is_not_judged_by_itself(monkeypatch):
    """Where vmap is wrong, and so is the loop, the reference that found vmap wrong was the loop; another is needed."""
    monkeypatch.setitem(fallback.METHODS, "vmap", wrong_method(fallback.by_vmap))
    for place in (fallback.METHODS, vars(check)):
        name = "loop" if place is fallback.METHODS else "by_loop"
        monkeypatch.setitem(place, name, wrong_method(wrong_method(fallback.by_loop)))
    with pytest.raises(SelfCheckError, match=r"reference \(torch.func, .* disagree on .*0\.offset"):
        checked(nn.Sequential(WithoutRule(6), mlp()))


def test_products_that_overflow_in_float64_are_told_from_a_lower_precision():
    """Where an input is infinite, what a layer makes of the largest number times zero is not a number."""
    inputs = np.random.default_rng(0).standard_normal((6, 4))
    inputs[4, 1] = np.inf
    model = Custom(lambda m, x: m.b(torch.tanh(m.a(torch.nan_to_num(x)))), a=nn.Linear(4, 5), b=nn.Linear(5, 2))
    with pytest.raises(SelfCheckError, match="overflow: scale the inputs or the model"):
        ntkpipe.kernel_matrix(redraw(model), inputs, compute_dtype="float64", workers=1)


def test_a_first_call_loads_neither_a_compiler_nor_symbolic_algebra():
    """They take longer than all that comes before the first tile of a small model."""
    code = """
import sys, numpy, torch, ntkpipe
layer = torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
model = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 1), layer, torch.nn.Flatten(), torch.nn.Linear(16, 2)).eval()
before = {"sympy", "torch._dynamo"} & {*sys.modules}
ntkpipe.kernel_matrix(model, numpy.random.default_rng(0).standard_normal((6, 3, 4)), workers=2)
print({"sympy", "torch._dynamo"} & {*sys.modules} - before)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout.strip() == "set()"
