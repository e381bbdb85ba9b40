"""What is learnt of a model serves others that run the same code, and no more; values are looked at each time."""

import copy
import dataclasses
import functools
import gc
import types
import warnings
import weakref

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from reference import Custom, redraw
from small import WithoutRule
from torch import nn

import ntkpipe
from ntkpipe.base.config import KernelSpec, RunSpec
from ntkpipe.base.errors import ModelError, NonFiniteError
from ntkpipe.build.in_memory import settle_matrix
from ntkpipe.build.prepare import Request, exact_single_thread
from ntkpipe.jacobian import learnt
from ntkpipe.jacobian.engine import Engine
from ntkpipe.jacobian.model.samples import as_samples
from ntkpipe.jacobian.tracing.rules.linear import linear
from ntkpipe.jacobian.tracing.rules.table import RULES

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SCALE = 1.5


def helper(x):
    return torch.tanh(x) * SCALE


def activation(slope):
    return lambda x: F.softplus(slope * x)


class Gate(nn.Module):
    power = 1.0

    def __init__(self):
        super().__init__()
        self.table = {"shift": 0.3}

    def forward(self, x, bias=0.2):
        return self.power * (2 * x if self.training else x) + self.table["shift"] * x**2 + bias


class Net(nn.Module):
    def __init__(self, num_inputs=4, width=5):
        super().__init__()
        self.a, self.b = nn.Linear(num_inputs, width), nn.Linear(width, width)
        self.tied, self.head = nn.Linear(width, width), nn.Linear(width, 3)
        self.tied.weight = self.b.weight
        self.gate, self.act, self.factor, self.parts = Gate(), activation(0.8), 0.7, [1.0, [2.0]]
        self.power = functools.partial(torch.pow, exponent=2)
        self.settings = types.SimpleNamespace(leak=0.1)
        self.register_buffer("mask", torch.linspace(0.5, 2, width))

    def forward(self, x):
        h = helper(self.b(self.act(self.a(x.flatten(1)))))
        h = self.gate(self.tied(h)) * self.mask * self.factor
        return self.head(F.leaky_relu(h, self.settings.leak) + 0.1 * self.power(h)) * (self.parts[0] + self.parts[1][0])


def net(seed=0, **options):
    return redraw(Net(**options).double(), seed)


def other_forward(self, x):
    return self.head(torch.sin(self.tied(self.b(self.a(x.flatten(1))))))


@pytest.fixture
def seen(monkeypatch):
    """How often costs were measured, which happens where nothing is known."""
    found = []
    whole = Engine.cost
    monkeypatch.setattr(Engine, "cost", lambda *arguments: found.append(None) or whole(*arguments))
    learnt.forget()
    yield found
    learnt.forget()


def compute(model, inputs=X, **options):
    return ntkpipe.kernel_matrix(
        model, inputs, **{"kind": "ntk", "compute_dtype": "float64", "workers": 1, "self_check": False, **options}
    )


def require_exact(model, inputs=X, **options):
    assert reference.error(compute(model, inputs, **options), reference.kernel(model, inputs)) < 1e-10


def test_other_weights_and_copies_are_known(seen):
    first = net()
    compute(first)
    assert len(seen) == 1
    others = [net(1), copy.deepcopy(first), net(2)]
    others[2].load_state_dict(net(3).state_dict())
    for model in others:
        require_exact(model)
    assert len(seen) == 1


def set_in(path, value):
    """A change of what a path of attributes leads to."""
    *path, last = path.split(".")
    return lambda model, patch: setattr(functools.reduce(getattr, path, model), last, value(model))


def scaled(factor):
    return lambda module, inputs, output: factor * output


def hooked(model, factor=1.5):
    model.b.register_forward_hook(scaled(factor))


def hook_activation(model, patch):
    def hook(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda grad: 2 * grad)

    model.b.register_forward_hook(hook)


def untie(model, patch):
    model.tied.weight = nn.Parameter(2 * model.b.weight.detach())


def set_cell(model, patch):
    model.act.__closure__[0].cell_contents = 1.7


def set_element(model, patch):
    model.parts[1][0] = 0.5


def hook_all(model, patch):
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: 2 * output if isinstance(module, Gate) else output
    )
    patch.callbacks.append(handle.remove)


def hook_backward(model, patch):
    model.gate.register_full_backward_hook(lambda module, inputs, outputs: (2 * inputs[0],))


def parametrize(model, patch):
    nn.utils.parametrizations.weight_norm(model.a)


def use_float32(patch):
    patch.callbacks.append(functools.partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(torch.float64)


def be_deterministic(patch):
    patch.callbacks.append(functools.partial(torch.use_deterministic_algorithms, False))
    torch.use_deterministic_algorithms(True)


CHANGES = {
    "forward of the class": lambda model, patch: patch.setattr(Net, "forward", other_forward),
    "forward of a submodule's class": lambda model, patch: patch.setattr(Gate, "forward", lambda self, x: x.sin()),
    "forward of the instance": set_in("forward", lambda model: types.MethodType(other_forward, model)),
    "forward of torch's own class": lambda model, patch: patch.setattr(
        nn.Linear, "forward", lambda self, x: F.linear(x, 2 * self.weight, self.bias)
    ),
    "a default argument": lambda model, patch: patch.setattr(Gate.forward, "__defaults__", (0.9,)),
    "an attribute of the class": lambda model, patch: patch.setattr(Gate, "power", 3.0),
    "an attribute": set_in("factor", lambda model: 0.9),
    "an attribute of a plain object": set_in("settings.leak", lambda model: 0.4),
    "an element of a list in a list": set_element,
    "a value of a dict": set_in("gate.table", lambda model: {"shift": 0.6}),
    "an argument that is bound": set_in("power", lambda model: functools.partial(torch.pow, exponent=3)),
    "a cell of a closure": set_cell,
    "a global number": lambda model, patch: patch.setitem(globals(), "SCALE", 0.4),
    "a global function": lambda model, patch: patch.setitem(globals(), "helper", torch.sin),
    "a function of torch": lambda model, patch: patch.setattr(F, "softplus", torch.sin),
    "a hook": lambda model, patch: hooked(model),
    "a hook of all modules": hook_all,
    "a hook before": lambda model, patch: model.b.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "a hook of gradients": hook_backward,
    "a hook of an activation": hook_activation,
    "a hook of a parameter": lambda model, patch: model.a.weight.register_hook(lambda grad: None),
    "a mode": lambda model, patch: model.gate.train(),
    "a frozen parameter": lambda model, patch: model.b.weight.requires_grad_(False),
    "untied weights": untie,
    "a buffer": lambda model, patch: model.mask.mul_(2),
    "the dtype of a buffer": set_in("mask", lambda model: (3 * model.mask).long()),
    "the dtype of the model": lambda model, patch: model.float(),
    "another submodule": set_in("gate", lambda model: nn.SiLU()),
    "the strides of a parameter": set_in(
        "a.weight", lambda model: nn.Parameter(model.a.weight.data.t().contiguous().t())
    ),
    "a parametrization": parametrize,
    "the width": set_in("a", lambda model: redraw(nn.Linear(4, 5, bias=False).double())),
}


@pytest.fixture
def patch(monkeypatch):
    """A monkeypatch with things to call at the end."""
    monkeypatch.callbacks = []
    yield monkeypatch
    for each in monkeypatch.callbacks:
        each()


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_a_model_makes_it_unknown(name, seen, patch):
    compute(net())
    model = net(1)
    require_exact(model)
    assert len(seen) == 1
    CHANGES[name](model, patch)
    assert len(seen) == 1
    if name == "the dtype of the model":  # its weights were rounded, which float64 keeps
        model.mask = model.mask.double()
    require_exact(model)
    assert len(seen) == 2


SETTINGS = types.ModuleType("settings")


def in_closure(module):
    return lambda m, x: m.b(torch.tanh(m.a(x)) * module.scale)


def scaled_by(module, x):
    return x * module.scale


def set_settings(patch, value):
    patch.setattr(SETTINGS, "scale", value, raising=False)


def set_added(patch, value):
    patch.setattr(nn.Module, "added", value, raising=False)


class Meta(type):
    pass


class OfMeta(metaclass=Meta):
    pass


def attending(m, x):
    tokens = m.a(x)[:, None, :]
    return m.b(m.attention(tokens, tokens, tokens, need_weights=False)[0][:, 0])


def set_silu(patch, value):
    patch.setattr(F, "silu", lambda x, inplace=False: torch.sin(value * x))


def set_conv(patch, value, forward=nn.Conv1d._conv_forward):
    patch.setattr(nn.Conv1d, "_conv_forward", lambda self, x, weight, bias: value * forward(self, x, weight, bias))


def set_attention(patch, value):
    patch.setattr(F, "scaled_dot_product_attention", lambda query, key, values, *_: value * values)


REACHED = {
    "a module in a closure": (in_closure(SETTINGS), set_settings),
    "a module that is handed on": (lambda m, x: m.b(scaled_by(SETTINGS, torch.tanh(m.a(x)))), set_settings),
    "a name as text": (lambda m, x: m.b(torch.tanh(m.a(x)) * getattr(SETTINGS, "scale")), set_settings),  # noqa: B009
    "what modules have": (lambda m, x: m.b(torch.tanh(m.a(x)) * m.added), set_added),
    "what a class of classes has": (
        lambda m, x: m.b(torch.tanh(m.a(x)) * OfMeta.scale),
        lambda patch, value: patch.setattr(Meta, "scale", value, raising=False),
    ),
    "a function that torch calls": (lambda m, x: m.b(m.act(m.a(x))), set_silu),
    "a function that functions of torch call": (attending, set_attention),
    "a method of torch's own": (lambda m, x: m.b(m.conv(torch.tanh(m.a(x))[:, None])[:, 0]), set_conv),
}


@pytest.mark.parametrize("name", REACHED)
def test_what_is_reached_in_any_way_makes_it_unknown(name, seen, patch):
    function, change = REACHED[name]
    for number, value in enumerate([1.5, 0.6, 1.5], 1):
        change(patch, value)
        own = {"act": nn.SiLU(), "conv": nn.Conv1d(1, 1, 1), "attention": nn.MultiheadAttention(6, 1, batch_first=True)}
        require_exact(redraw(Custom(function, a=nn.Linear(4, 6), b=nn.Linear(6, 3), **own).double(), number))
        assert len(seen) == min(number, 2)


def test_values_of_dicts_and_kinds_of_hooks_make_it_unknown(seen):
    def hook(module, inputs, *named):
        return ((2 * inputs[0],), *named) if named else (3 * inputs[0],)

    kinds = [torch.tanh, torch.sin]
    for number in range(1, 5):
        hooks = dict(zip(["act", "other"], kinds[:: 1 if number % 2 else -1], strict=True))
        model = Custom(
            lambda m, x: m.b(m.my_hooks["act"](m.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 3), my_hooks=hooks
        )
        for each in range(2):
            model.b.register_forward_pre_hook(hook, with_kwargs=each == number // 3)
        require_exact(redraw(model.double(), number))
        assert len(seen) == number


def growing(m, x):
    wide = torch.tanh(m.a(x))[..., None].expand(-1, -1, 9 if float(x.detach().abs().max()) < 5 else 9000)
    return m.b(wide.clone().mean(2))


def test_costs_are_of_the_same_operations(seen):
    for number, inputs in enumerate([X, 100 * X, X, 100 * X]):
        found = settled(redraw(Custom(growing, a=nn.Linear(4, 5), b=nn.Linear(5, 3)).double(), number), inputs)
        assert (found.plan.workload.cost.workspace_bytes > 9000 * 5 * 8) == (number % 2 == 1)
    assert len(seen) == 2


def test_a_hook_that_is_replaced_or_removed_makes_it_unknown(seen):
    for number, factors in enumerate([[1.5], [2.5], [], [1.5, 2.5]], 1):
        model = net(number)
        for factor in factors:
            hooked(model, factor)
        require_exact(model)
        assert len(seen) == number
    same = net(9)
    hooked(same, 2.5)
    require_exact(same)
    assert len(seen) == 4


@pytest.mark.parametrize("change", [use_float32, be_deterministic])
def test_settings_of_torch_make_it_unknown(change, seen, patch):
    compute(net())
    change(patch)
    require_exact(net(1))
    assert len(seen) == 2


def first_outputs(output):
    return output[:, :2]


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({"kind": "pntk"}, lambda model: reference.kernel(model, X, kind="pntk")),
        ({"kind": "output:1"}, lambda model: reference.kernel(model, X)[1::3, 1::3]),
        ({"parameters": ("a.*", "head.*")}, lambda model: of_parameters(model, "a", "head")),
        ({"forward": lambda output: output[:, :2]}, lambda model: of_outputs(model, 2)),
        ({"forward": lambda model, x: model(x) ** 2}, lambda model: reference.kernel(Custom(squared, net=model), X)),
        ({"jacobian": "fallback"}, lambda model: reference.kernel(model, X)),
    ],
    ids=["pntk", "an output", "parameters", "outputs", "a forward hook", "fallback"],
)
def test_what_is_asked_for_makes_it_unknown(options, exact, seen):
    compute(net())
    model = net(1)
    assert reference.error(compute(model, **options), exact(model)) < 1e-10
    assert len(seen) == 2


def squared(m, x):
    return m.net(x) ** 2


def of_parameters(model, *places):
    found = reference.grams(reference.jacobians(model, X))
    return sum(gram for name, gram in found.items() if name.partition(".")[0] in places)


def of_outputs(model, count):
    return reference.kernel(model, X, forward=lambda model, x: model(x)[:, :count])


def test_groups_make_it_unknown(seen, tmp_path):
    options = {"kind": "ntk", "compute_dtype": "float64", "progress": False, "self_check": False}
    for number, groups in enumerate([{}, {"first": "a.*"}, {"first": "b.*"}], 1):
        model = net(number)
        kernel = ntkpipe.compute_kernel(model, X, store=tmp_path / str(number), groups=groups, **options)
        assert reference.error(np.asarray(kernel.train), reference.kernel(model, X)) < 1e-10
        assert len(seen) == number


def test_samples_of_other_shapes_and_other_integers_make_it_unknown(seen):
    for number, inputs in enumerate([X, X.reshape(-1, 2, 2), X.float()], 1):
        compute(net(number), inputs)
        assert len(seen) == min(number, 2)  # real samples take the dtype of the run
    tokens = torch.arange(36).reshape(12, 3) % 5
    model = Custom(lambda m, x: m.head(m.table(x).mean(1)), table=nn.Embedding(5, 4), head=nn.Linear(4, 3))
    for number, inputs in enumerate([tokens, tokens.flip(0), tokens], 3):
        require_exact(redraw(model.double(), number), inputs)
        assert len(seen) == min(number, 4)


def norms():
    layers = nn.Conv2d(1, 16, 2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 2)
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *layers, nn.Flatten(), nn.Linear(16, 3))


def merged(m, x):
    """Tokens and samples on one axis, in numbers that shapes alone do not take apart."""
    tokens = m.a(x[:, :, None].repeat(1, 4, 1)[:, :15].reshape(-1, 1))
    return m.head(torch.tanh(tokens).reshape(len(x), 15, 5).sum(1))


MODELS = {
    "norms and convolutions": lambda seed: reference.draw_statistics(redraw(norms(), seed), seed),
    "attention": lambda seed: redraw(
        nn.Sequential(
            nn.Unflatten(1, (4, 1)),
            nn.Linear(1, 8),
            nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(32, 3),
        ),
        seed,
    ),
    "merged axes": lambda seed: redraw(Custom(merged, a=nn.Linear(1, 5), head=nn.Linear(5, 3)), seed),
    "a recurrent net": lambda seed: redraw(
        Custom(
            lambda m, x: m.head(m.rnn(x[:, :, None])[0][:, -1]),
            rnn=nn.GRU(1, 5, batch_first=True),
            head=nn.Linear(5, 3),
        ),
        seed,
    ),
    "weight norm": lambda seed: redraw(
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)), seed
    ),
    "without a rule": lambda seed: redraw(nn.Sequential(nn.Linear(4, 5), WithoutRule(5), nn.Linear(5, 3)), seed),
}


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"kind": "pntk", "compute_dtype": "float32"}], ids=str)
def test_what_is_known_changes_no_bit(name, options, seen):
    compute(MODELS[name](0), **options)
    found = compute(MODELS[name](1), **options)
    is_known = len(seen) == 1
    learnt.forget()
    assert np.array_equal(found, compute(MODELS[name](1), **options))
    assert is_known


def settled(model, inputs=X, **options):
    with exact_single_thread("float64"):
        kernel, run = KernelSpec(kind="ntk", compute_dtype="float64"), RunSpec(workers=1, **options)
        return settle_matrix(Request(model, as_samples(inputs, with_targets=False), None, kernel, run))


def branching(m, x):
    hidden = torch.tanh(m.a(x))
    return m.c(m.b(hidden) if bool((x[:, 0] > 3).any()) else hidden)


def changed(places, values):
    inputs = X.clone()
    inputs[places] = torch.tensor(values, dtype=X.dtype)
    return inputs


def weighed(m, x):
    return merged(m, x) * x[:, :1]


SHOWING_LESS = {
    # No gradient tells the rows of samples apart.
    "a head of zeros": (MODELS["merged axes"], X, lambda model: nn.init.zeros_(model.head.weight), X),
    # Nor does the one sample by which a known layout is found again; others do.
    "a sample without a gradient": (
        lambda seed: redraw(
            Custom(lambda m, x: merged(m, x) * x[:, :1], a=nn.Linear(1, 5), head=nn.Linear(5, 3)), seed
        ),
        X,
        lambda model: None,
        changed([0, 11], [0.0, 1.0, 2.0, 3.0]),
    ),
    # All batches of the probe take the branch; of those by which costs are measured, one does not.
    "a branch": (
        lambda seed: redraw(Custom(branching, a=nn.Linear(4, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 3)), seed),
        X + 9,
        lambda model: None,
        changed([5], [9.0, 0.0, 0.0, 0.0]),
    ),
}


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run")
@pytest.mark.parametrize("name", SHOWING_LESS)
def test_what_shows_less_is_looked_at_as_if_nothing_were_known(name, seen):
    make, inputs, change, others = SHOWING_LESS[name]
    settled(make(0), inputs, self_check=False)
    assert len(learnt._KEPT) == 1
    model = make(1)
    change(model)
    found = settled(model, others, self_check=False)
    learnt.forget()
    alone = settled(model, others, self_check=False)
    assert found.engine.representations == alone.engine.representations
    assert found.engine.tracing == alone.engine.tracing
    assert found.plan.workload.cost == alone.plan.workload.cost


def test_nothing_of_a_model_is_kept(seen):
    model, inputs = net(), X.clone()
    held = [weakref.ref(each) for each in (model, inputs, *model.modules(), *model.parameters(), *model.buffers())]
    compute(model, inputs)
    assert len(learnt._KEPT) == 1
    del model, inputs
    gc.collect()
    assert [each() for each in held] == [None] * len(held)


def test_a_few_models_are_kept(seen):
    for width in range(1, learnt._NUM_KEPT + 3):
        compute(nn.Linear(width, 2).double(), X[:, :1].repeat(1, width))
    assert len(learnt._KEPT) == learnt._NUM_KEPT
    compute(nn.Linear(1, 2).double(), X[:, :1])  # the oldest
    assert len(seen) == learnt._NUM_KEPT + 3


@pytest.mark.parametrize("held", [torch.Generator(), torch.zeros(2**19), list[int]], ids=lambda held: str(type(held)))
def test_what_cannot_be_seen_into_is_not_kept(held, seen):
    for number in range(1, 3):
        require_exact(redraw(Custom(lambda m, x, held=held: m.a(x).sin(), a=nn.Linear(4, 3)).double(), number))
        assert len(seen) == number
    assert not learnt._KEPT


def blend(m, x):
    hidden = torch.tanh(m.a(x))
    return m.b(hidden + m.gain * hidden.mean(0))


def test_a_model_that_mixes_samples_is_refused_where_its_twin_was_not(seen):
    first, second = (
        Custom(blend, a=nn.Linear(4, 5), b=nn.Linear(5, 3), gain=nn.Parameter(torch.tensor(gain), requires_grad=False))
        for gain in (0.0, 1.0)
    )
    compute(first)
    assert len(learnt._KEPT) == 1
    with pytest.raises(ModelError, match="other samples of its batch"):
        compute(second)
    assert len(learnt._KEPT) == 1


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run")
@pytest.mark.parametrize(("sample", "value"), [(0, 0.0), (8, 0.0), (0, torch.inf), (8, torch.inf)])
def test_what_is_not_finite_is_refused_before_the_run_where_other_samples_were_not(sample, value, seen):
    model = redraw(Custom(lambda m, x: m.b(m.a(x).abs().sqrt()), a=nn.Linear(4, 3, bias=False), b=nn.Linear(3, 3)))
    inputs = X.clone()
    settled(model, inputs, self_check=False)
    inputs[sample] = value  # of those that are looked at
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        settled(model, inputs, self_check=False)


def half(m, x):
    return m.b(m.a(x).bfloat16().to(x.dtype))


def looped(m, x):
    return m.b(torch.tanh(m.a(x))) * (1.0 if float(m.a(x).detach().sum()) < 1e9 else 2.0)


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [(half, {"compute_dtype": "float32"}, "computes a part in"), (looped, {"jacobian": "fallback"}, "vmap cannot run")],
)
def test_warnings_come_each_time(function, options, words, seen):
    for number in range(2):
        model = redraw(Custom(function, a=nn.Linear(4, 5), b=nn.Linear(5, 3)), number)
        with pytest.warns(UserWarning, match=words):
            compute(model, **options)


def test_data_on_which_operations_depend_is_seen_where_other_data_hid_it(seen):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, inputs in enumerate([X, X + 4 * (torch.arange(12) == 0)[:, None]]):
            model = Custom(branching, a=nn.Linear(4, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 3))
            require_exact(redraw(model.double(), number), inputs)


@pytest.mark.parametrize("is_wrong_before", [True, False])
def test_the_self_check_finds_a_wrong_rule_of_a_known_model(is_wrong_before, seen, monkeypatch):
    def wrong(input, weight, bias=None):  # noqa: A002
        bound = linear(input, weight, bias)
        tensor, form = bound.operands["weight"]

        def inputs():  # right on the batches of the probe
            rows = form.inputs()
            return 1.001 * rows if len(rows) not in {3, 5} else rows

        operand = (tensor, dataclasses.replace(form, inputs=inputs))
        return dataclasses.replace(bound, operands={**bound.operands, "weight": operand})

    if is_wrong_before:
        monkeypatch.setitem(RULES, F.linear, wrong)
    settled(net())
    monkeypatch.setitem(RULES, F.linear, wrong)
    count = len(seen)
    found = settled(net(1))
    assert {"a.weight", "head.weight"} <= set(found.check.moved)
    assert len(seen) == count + (not is_wrong_before)  # only for what the self-check has changed
