"""Models that have no kernel of single samples are refused with what to do; the fallback's method is found."""

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import redraw
from torch import nn

import ntkpipe
from ntkpipe.base.errors import ModelError, NonFiniteError
from ntkpipe.jacobian.model.functional import prepare_model
from ntkpipe.jacobian.probe import probe, probe_samples

L = nn.Linear
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.function = L(4, 3), function

    def forward(self, x):
        return self.function(self, x)


def unregistered():
    model = Custom(lambda m, x: m.a(x) + m.kept[0](x))
    model.kept = [L(4, 3)]
    return model


def infinite():
    model = L(4, 2)
    nn.init.constant_(model.bias, torch.inf)
    return model


REFUSED = {
    "not a module": (lambda: lambda x: x, "needed a torch.nn.Module"),
    "everything frozen": (lambda: L(4, 2).requires_grad_(False), "all frozen"),
    "no parameters": (nn.Tanh, "no parameters"),
    "batch norm in train mode": (lambda: nn.Sequential(L(4, 2), nn.BatchNorm1d(2)), r"'1' is in train mode"),
    "batch norm without statistics": (
        lambda: nn.Sequential(L(4, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval(),
        "no running statistics",
    ),
    "dropout": (lambda: nn.Sequential(L(4, 2), nn.Dropout(0.5)), "call model.eval"),
    "functional dropout": (lambda: Custom(lambda m, x: F.dropout(m.a(x), 0.5)), "is random"),
    "functional batch norm": (
        lambda: Custom(lambda m, x: F.batch_norm(m.a(x), None, None, training=True)),
        "other samples of its batch",
    ),
    "attention across the batch": (
        lambda: Custom(lambda m, x: torch.softmax(m.a(x) @ m.a(x).T, dim=1) @ m.a(x)),
        "other samples of its batch",
    ),
    "the next sample": (lambda: Custom(lambda m, x: m.a(x) + x.roll(1, 0)[:, :3]), "other samples of its batch"),
    "the sample before": (lambda: Custom(lambda m, x: m.a(x) * x.roll(-1, 0)[:, :3]), "other samples of its batch"),
    "the size of the batch": (lambda: Custom(lambda m, x: m.a(x) / len(x)), "other samples of its batch"),
    "the place in the batch": (
        lambda: Custom(lambda m, x: m.a(x) * torch.arange(1.0, 1 + len(x))[:, None]),
        "other samples of its batch",
    ),
    "one axis": (lambda: Custom(lambda m, x: m.a(x)[:, 0]), r"shape \(5,\).*output\[:, None\]"),
    "three axes": (lambda: Custom(lambda m, x: m.a(x)[:, None]), r"shape \(5, 1, 3\).*flatten"),
    "no outputs": (lambda: Custom(lambda m, x: m.a(x)[:, :0]), "at least one output"),
    "a tuple": (lambda: Custom(lambda m, x: (m.a(x), x)), "returned tuple"),
    "integers": (lambda: Custom(lambda m, x: m.a(x).long()), "real floating-point outputs"),
    "no_grad": (lambda: Custom(torch.no_grad()(lambda m, x: m.a(x))), "do not depend on any"),
    "inference_mode": (lambda: Custom(torch.inference_mode()(lambda m, x: m.a(x))), "do not depend on any"),
    "detached": (lambda: Custom(lambda m, x: m.a(x).detach()), "do not depend on any"),
    "a module in a plain list": (unregistered, "not parameters of the model"),
    "autograd fails": (
        lambda: Custom(lambda m, x: (h := torch.exp(m.a(x))) * (h.mul_(2) > 0)),
        None,
    ),
    "the model raises": (lambda: Custom(lambda m, x: m.a(x[:, :3])), r"RuntimeError on a batch of 5 \(input: \(5, 4\)"),
}
REFUSED["autograd fails"] = (
    lambda: Custom(lambda m, x: (h := torch.exp(m.a(x)), h.mul_(2))[0]),
    "RuntimeError where autograd differentiated it",
)


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_a_kernel_of_single_samples_are_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ModelError, match=f"(?s){message}"):
        ntkpipe.kernel_matrix(make(), X, workers=1)


def test_a_hook_that_reaches_for_the_users_model_is_refused():
    model = nn.ModuleDict({"a": L(4, 3), "b": L(3, 2)})

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = model["a"], model["b"]

        def forward(self, x):
            return self.a(x)

    both = Both()
    with pytest.raises(ModelError, match="given a copy"):
        ntkpipe.kernel_matrix(both, X, forward=lambda h: h @ both.b.weight.T)
    found = ntkpipe.kernel_matrix(
        both, X, forward=lambda m, x: m(x) @ m.b.weight.T, compute_dtype="float64", kind="ntk", workers=1
    )
    exact = reference.kernel(both, X, forward=lambda m, x: m(x) @ m.b.weight.T)
    assert reference.error(found, exact) <= 1e-12


NOT_FINITE = {
    "inputs": lambda: (L(4, 2), X.clone().index_fill_(0, torch.tensor([3]), torch.nan), "sample 3"),
    "parameters": lambda: (infinite(), X, "'bias' of the model has 2"),
    "outputs on a probe": lambda: (
        Custom(lambda m, x: m.a(x) / x[:, :1]),
        zeroed(0),
        "NaN or infinite on sample 0; leave",
    ),
    "outputs elsewhere": lambda: (Custom(lambda m, x: m.a(x) / x[:, :1]), zeroed(2, repeat=10), "sample 2"),
    "gradients": lambda: (Custom(lambda m, x: torch.sqrt(m.a(x) * x[:, :1])), zeroed(2, repeat=10).abs(), "sample 2"),
}


def zeroed(sample, repeat=1):
    x = X.repeat(repeat, 1)
    x[sample, 0] = 0
    return x


@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_is_not_finite_is_named(name):
    model, inputs, message = NOT_FINITE[name]()
    if name == "gradients":
        nn.init.constant_(model.a.weight, 1.0)
        nn.init.zeros_(model.a.bias)
    with pytest.raises(NonFiniteError, match=message):
        ntkpipe.kernel_matrix(model, inputs, self_check=False, workers=1)


def test_a_model_that_vmap_cannot_run_goes_through_the_loop_with_a_warning():
    model = redraw(Custom(lambda m, x: torch.logaddexp(m.a(x), m.a.bias) * (1 if float(x.sum()) > 1e9 else 2)))
    with pytest.warns(UserWarning, match=r"vmap cannot run this model .*the 1 parameters .*sample by sample"):
        found = ntkpipe.kernel_matrix(model, X, kind="ntk", compute_dtype="float64", workers=1)
    assert reference.error(found, reference.kernel(model, X)) <= 1e-12


@pytest.mark.parametrize("num_samples", [1, 2, 5, 1000])
def test_probes_are_five_samples_spread_over_the_data(num_samples):
    found = probe_samples(num_samples)
    assert len(found) == 5
    assert (found[0], found[-1]) == (0, num_samples - 1)


@pytest.mark.parametrize("structured", [True, False])
def test_three_passes_tell_the_number_of_outputs_and_all_else(structured):
    functional, seen = prepare_model(L(4, 3), dtype=torch.float32, device=torch.device("cpu")), []
    functional.module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    found = probe(functional, lambda n: X[list(n)], len(X), structured=structured)
    assert found.num_outputs == 3
    assert sorted(found.tracing.covered) == (["bias", "weight"] if structured else [])
    assert seen == [5, 3, 5]


def test_a_model_that_cannot_be_watched_is_left_to_the_fallback_with_the_reason():
    def refuses(m, x):
        if torch.overrides._len_torch_function_stack():
            raise RuntimeError("not while it is watched")
        return m.a(x)

    functional = prepare_model(Custom(refuses), dtype=torch.float32, device=torch.device("cpu"))
    found = probe(functional, lambda n: X[list(n)], len(X), structured=True)
    assert set(found.tracing.fallback.values()) == {"tracing failed: not while it is watched"}


def convolving(read):
    """A convolution and what is done with its output; its strides there are what matters."""
    model = nn.Sequential(nn.Unflatten(1, (2, 1, 2)), nn.Conv2d(2, 5, (1, 2), padding=(0, 1)), Reading(read), L(15, 2))
    return prepare_model(redraw(model), dtype=torch.float32, device=torch.device("cpu"))


class Reading(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("read", "is_changed"),
    [
        (lambda x: x.flatten(1), True),
        (lambda x: x.view(len(x), -1), False),  # raises for channels that are next to each other
        (lambda x: x.as_strided((len(x), 15), (15, 1)), False),  # gives other numbers for them
    ],
)
def test_convolutions_run_channels_last_where_the_model_allows_it(read, is_changed):
    model = convolving(read)
    changed = model.with_fast_layout(X)
    assert (changed is not model) is is_changed
    assert torch.allclose(changed(X), model(X), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [(L(4, 2), torch.float32), (nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 4)), torch.float64)],
)
def test_models_without_convolutions_and_float64_keep_their_layout(model, dtype):
    prepared = prepare_model(model, dtype=dtype, device=torch.device("cpu"))
    assert prepared.with_fast_layout(X.to(dtype)) is prepared


@pytest.mark.parametrize(
    ("layer", "is_changed"),
    [
        (nn.Conv2d(3, 8, 3, stride=2), True),
        (nn.Conv2d(1, 8, 1, stride=2), True),
        (nn.Conv2d(16, 8, 1, stride=2), True),
        # Here the backward of torch 2.13 corrupts memory channels last.
        (nn.Conv2d(2, 8, 1, stride=2), False),
        (nn.Conv2d(7, 8, 1, stride=2), False),
        (L(4, 3), False),
    ],
)
def test_convolutions_are_channels_last_where_that_is_safe(layer, is_changed):
    inputs = torch.randn(6, layer.in_channels, 4, 4) if isinstance(layer, nn.Conv2d) else X
    model = prepare_model(nn.Sequential(layer, nn.Flatten()), dtype=torch.float32, device=torch.device("cpu"))
    changed = model.with_fast_layout(inputs)
    assert (changed is not model) is is_changed
