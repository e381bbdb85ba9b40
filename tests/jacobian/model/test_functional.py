"""Models are copied, selected, checked and fingerprinted; the user's own is never changed."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ntkpipe.base.errors import ConfigError, ModelError, NonFiniteError
from ntkpipe.jacobian.model.functional import prepare_model, resolve_device, select_parameters
from ntkpipe.jacobian.model.state import fingerprint

CPU = torch.device("cpu")
BATCH = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def prepare(model, dtype=torch.float64, **options):
    return prepare_model(model, dtype=dtype, device=CPU, **options)


class Custom(nn.Module):
    """A linear model with whatever forward pass a test wants."""

    def __init__(self, forward):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 2))
        self.function = forward

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def test_outputs_are_the_models_in_the_dtype_asked_for(model):
    functional = prepare(model)
    outputs = functional(functional.to_batch({"input": BATCH}, is_mapping=False))
    assert outputs.dtype == torch.float64
    assert torch.equal(outputs, copy.deepcopy(model).double()(BATCH.double()))


def test_the_users_model_is_left_as_it_is(model):
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    functional = prepare(model, parameters="2.*")
    with torch.no_grad():
        for parameter in functional.module.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert model[0].bias.dtype == torch.float32


def test_only_selected_parameters_require_a_gradient(model):
    functional = prepare(model, parameters=("0.weight", "2.*"))
    assert functional.names == ("0.weight", "2.weight", "2.bias")
    assert tuple(functional.parameters) == functional.names
    wanting = {name for name, p in functional.module.named_parameters() if p.requires_grad}
    assert wanting == {f"model.{name}" for name in functional.names}


def test_copies_share_what_they_say_they_share(model):
    functional = prepare(model)
    twin, other = functional.copy(), functional.converted(torch.float32)
    for name, parameter in functional.parameters.items():
        assert twin.parameters[name] is parameter
        assert other.parameters[name].data_ptr() != parameter.data_ptr()
        assert other.parameters[name].dtype == torch.float32
    assert twin.module is not functional.module
    assert all(parameter.requires_grad for parameter in functional.parameters.values())


def test_parameters_can_be_replaced_in_a_call(model):
    functional = prepare(model)
    batch = BATCH.double()
    zeros = {name: torch.zeros_like(p) for name, p in functional.parameters.items()}
    assert torch.equal(functional.call_with(zeros, batch), torch.zeros(3, 2, dtype=torch.float64))
    assert torch.equal(functional.call_with({}, batch), functional(batch))


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("*.bias", ["0.bias", "2.bias"]),
        (("2.*", "0.bias"), ["0.bias", "2.weight", "2.bias"]),
        (("2.*", "2.bias"), ["2.weight", "2.bias"]),
    ],
)
def test_patterns_select_in_the_models_order(model, patterns, names):
    assert select_parameters(model, patterns) == tuple(names)


def test_patterns_that_select_nothing_are_refused(model):
    model[0].weight.requires_grad_(False)
    assert select_parameters(model, None) == ("0.bias", "2.weight", "2.bias")
    with pytest.raises(ModelError, match=r"'head\.\*' matches no parameter; those that require a gradient are 0\.bias"):
        select_parameters(model, ("0.*", "head.*"))
    with pytest.raises(ModelError, match=r"'0\.weight' matches only frozen parameters"):
        select_parameters(model, "0.weight")
    with pytest.raises(ModelError, match="4 parameters, all frozen"):
        select_parameters(model.requires_grad_(False), None)
    with pytest.raises(ModelError, match="no parameters; needed at least one"):
        select_parameters(nn.ReLU(), None)


def _train(layer):
    return nn.Sequential(nn.Linear(4, 4), layer).train()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_train(nn.Dropout(0.1)), r"Dropout '1' is active \(train mode, p=0\.1\).*model\.eval\(\)"),
        (_train(nn.AlphaDropout()), "AlphaDropout '1' is active"),
        (_train(nn.BatchNorm1d(4)), r"BatchNorm1d '1' is in train mode.*model\.eval\(\) first"),
        (_train(nn.BatchNorm1d(4, track_running_stats=False)).eval(), "BatchNorm1d '1' has no running statistics"),
        (_train(nn.LazyLinear(3)), "LazyLinear '1' is not initialised"),
        ("resnet18", "the model is str; needed a torch.nn.Module"),
    ],
)
def test_models_without_a_kernel_of_single_samples_are_refused(model, message):
    with pytest.raises(ModelError, match=message):
        prepare(model)


@pytest.mark.parametrize("layer", [nn.Dropout(0.0), nn.Dropout(0.1).eval(), nn.BatchNorm1d(4).eval(), nn.LayerNorm(4)])
def test_layers_that_keep_samples_apart_are_accepted(layer):
    assert prepare(nn.Sequential(nn.Linear(4, 4), layer)).names[:2] == ("0.weight", "0.bias")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_refused_by_name(model, bad):
    with torch.no_grad():
        model[2].weight[1, 3] = bad
    with pytest.raises(NonFiniteError, match=r"'2\.weight' of the model has 1 NaN or infinite entries of 10"):
        prepare(model)


def linear(model, x):
    return x @ model.weight


FORWARDS = {
    "plain": (linear, None),
    "attribute": (lambda model, x: SimpleNamespace(logits=linear(model, x)), ".logits"),
    "nested": (lambda model, x: SimpleNamespace(a=SimpleNamespace(b=linear(model, x))), ".a.b"),
    "of the output": (lambda model, x: (linear(model, x), None), lambda output: output[0]),
    "with a default": (lambda model, x: (linear(model, x), None), lambda output, at=0: output[at]),
    "of model and inputs": (linear, lambda model, x: model(x)),
}


@pytest.mark.parametrize(("function", "hook"), FORWARDS.values(), ids=FORWARDS)
def test_every_form_of_the_forward_hook_picks_the_same_outputs(function, hook):
    outputs = prepare(Custom(function), forward=hook)(BATCH.double())
    assert torch.equal(outputs, BATCH.double() @ torch.ones(4, 2, dtype=torch.float64))


def test_a_mapping_becomes_keyword_arguments():
    functional = prepare(Custom(lambda model, x, scale: x @ model.weight * scale[:, None]))
    arrays = {"x": BATCH, "scale": torch.tensor([1, 2, 3])}
    batch = functional.to_batch(arrays, is_mapping=True)
    assert (batch["x"].dtype, batch["scale"].dtype) == (torch.float64, torch.int64)
    expected = BATCH.double() @ torch.ones(4, 2, dtype=torch.float64) * torch.tensor([[1], [2], [3]])
    assert torch.equal(functional(batch), expected)


def test_a_model_that_changes_its_input_cannot_change_ours():
    functional = prepare(Custom(lambda model, x: x.mul_(2) @ model.weight))
    batch = BATCH.double()
    assert torch.equal(functional(batch), functional(batch))
    assert torch.equal(batch, BATCH.double())


@pytest.mark.parametrize(
    ("function", "hook", "message"),
    [
        (
            lambda model, x: (linear(model, x),),
            None,
            r"returned tuple with \.0 \(3, 2\); needed one .* Pick it with forward='\.0'",
        ),
        (lambda model, x: linear(model, x)[:, 0], None, r"returned shape \(3,\) for a batch of 3"),
        (lambda model, x: linear(model, x)[:, None], None, r"returned shape \(3, 1, 2\)"),
        (lambda model, x: linear(model, x).mean(0, keepdim=True), None, r"returned shape \(1, 2\) for a batch of 3"),
        (lambda model, x: linear(model, x)[:, :0], None, r"returned shape \(3, 0\)"),
        (lambda model, x: linear(model, x).long(), None, "returned dtype torch.int64"),
        (linear, ".logits", r"forward='\.logits': the model returned Tensor, without 'logits'"),
    ],
)
def test_outputs_that_are_no_matrix_are_refused(function, hook, message):
    with pytest.raises(ModelError, match=message):
        prepare(Custom(function), forward=hook)(BATCH.double())


def test_a_forward_hook_of_another_type_is_refused(model):
    with pytest.raises(ConfigError, match="forward is int"):
        prepare(model, forward=3)


def test_equal_models_have_equal_fingerprints(model):
    names = select_parameters(model, None)
    record = fingerprint(model, names)
    assert fingerprint(copy.deepcopy(model), names) == record
    assert (record.name, record.parameters, record.num_parameters) == ("Sequential", names, 37)
    assert fingerprint(model, names[:1]).num_parameters == 20


def _with(change):
    def changed(model):
        change(model)
        return model

    return changed


CHANGES = {
    "one bit": _with(lambda model: model[0].bias.data[3].mul_(1 + 2**-23)),
    "dtype": lambda model: model.double(),
    "activation": _with(lambda model: model.__setitem__(1, nn.ReLU())),
    "buffer": _with(lambda model: model.register_buffer("scale", torch.ones(()), persistent=False)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_fingerprints_see_a_change(model, change):
    names = select_parameters(model, None)
    before = fingerprint(model, names)
    assert fingerprint(change(model), names) != before


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device(None) == resolve_device("cpu") == CPU
    for device, message in [
        ("cuda", "torch sees 0 CUDA devices; use 'cpu'"),
        ("meta", "needed 'cpu' or 'cuda'"),
        ("gpu", "not a torch device"),
    ]:
        with pytest.raises(ConfigError, match=message):
            resolve_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device(None) == resolve_device("cuda") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
