"""Layers with constants before their parameters: what they compute, where they start, how the engine holds them."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special
from torch import nn
from torch.nn import functional as F

import ntkpipe
from ntkpipe.base.errors import ConfigError
from ntkpipe.infinite.activations.catalogue import KNOWN
from ntkpipe.parametrised import Conv2d, Dense, Pointwise, mlp
from ntkpipe.parametrised.layers import ACTIVATIONS

PARAMETRISATIONS = ("ntk", "standard", "mup")


def drawn(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("b_std", [None, 0.3])
def test_a_dense_layer_is_its_formula(b_std: float | None) -> None:
    layer = Dense(5, 7, 1.5, b_std, generator=seeded(), dtype=torch.float64)
    x = drawn((4, 5))
    bias = 0.0 if b_std is None else b_std * layer.bias
    expected = 1.5 / 5**0.5 * x @ layer.weight.T + bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
    assert [name for name, _ in layer.named_parameters()] == ["weight"] + ["bias"] * (b_std is not None)


@pytest.mark.parametrize(
    ("padding", "mode"), [("same", "constant"), ("circular", "circular"), ("valid", None), (2, None)]
)
@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
@pytest.mark.parametrize("edge", [1, 2, 3, (3, 2)])
def test_a_convolution_is_its_formula(padding: str | int, mode: str | None, stride: Any, edge: Any) -> None:
    layer = Conv2d(2, 3, edge, 1.5, 0.3, stride=stride, padding=padding, generator=seeded(), dtype=torch.float64)
    x = wide = drawn((2, 2, 6, 7))
    edges, steps = (pair if isinstance(pair, tuple) else (pair, pair) for pair in (edge, stride))
    if mode is not None:  # as many pixels as come out need, the larger half behind
        axes = zip((7, 6), edges[::-1], steps[::-1], strict=True)
        needs = [max((-(-size // step) - 1) * step + window - size, 0) for size, window, step in axes]
        wide = F.pad(x, [side for need in needs for side in (need // 2, need - need // 2)], mode=mode)
    scale = 1.5 / (2 * edges[0] * edges[1]) ** 0.5
    expected = scale * F.conv2d(wide, layer.weight, None, stride, 2 if padding == 2 else 0)
    torch.testing.assert_close(layer(x), expected + 0.3 * layer.bias[:, None, None], rtol=1e-13, atol=1e-13)
    if mode is not None:
        assert layer(x).shape[-2:] == (-(-6 // steps[0]), -(-7 // steps[1]))


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
@pytest.mark.parametrize("position", ["first", "hidden", "last"])
def test_layers_start_with_the_deviations_that_they_say(parametrisation: str, position: str) -> None:
    """Of k · weight they are W_std / √fan_in, and of a last layer in μP smaller by √fan_in; of β · bias b_std · τ."""
    options = {"bias_init": 0.7, "position": position, "generator": seeded(), "dtype": torch.float64}
    layer = Dense(400, 300, 1.5, 0.2, parametrisation, **options)
    with torch.no_grad():
        weight = layer(torch.eye(400, dtype=torch.float64)) - layer(torch.zeros(1, 400, dtype=torch.float64))
        bias = layer(torch.zeros(1, 400, dtype=torch.float64))
    wanted = 1.5 / 400 if (parametrisation, position) == ("mup", "last") else 1.5 / 400**0.5
    # Deviations of n normal numbers are off by 1/√(2n).
    assert float(weight.std()) == pytest.approx(wanted, rel=5 / (2 * 120_000) ** 0.5)
    assert float(bias.std()) == pytest.approx(0.2 * 0.7, rel=5 / (2 * 300) ** 0.5)


@pytest.mark.parametrize(
    ("position", "weight", "bias"), [("first", 8.0, 8.0), ("hidden", 1.0, 8.0), ("last", 1 / 5, 1.0)]
)
def test_gradients_in_the_maximal_update_parametrisation(position: str, weight: float, bias: float) -> None:
    """Beside the standard one, squared gradients are multiplied by n_out, by one, and by 1/n_in."""
    layer = Dense(5, 8, 1.5, 0.2, "mup", position=position, generator=seeded(), dtype=torch.float64)
    x = drawn((1, 5))
    found = torch.autograd.grad(layer(x)[0, 0], [layer.weight, layer.bias])
    assert float(found[0].square().sum() / x.square().sum()) == pytest.approx(weight, rel=1e-12)
    assert float(found[1].square().sum()) == pytest.approx(bias, rel=1e-12)


@pytest.mark.parametrize("parametrisation", PARAMETRISATIONS)
@pytest.mark.parametrize("b_std", [None, 0.3])
def test_the_engine_holds_a_layer_as_one_pairwise_term(parametrisation, b_std, tmp_path) -> None:
    model = mlp(32, (96, 160), 3, b_std=b_std, W_std=1.5, parametrisation=parametrisation)
    planned = ntkpipe.plan_kernel(model, drawn((20, 32)).float(), kind="ntk", store=tmp_path / "k.zarr", progress=False)
    ends = ("weight",) if b_std is None else ("weight", "bias")
    assert [report.parameters for report in planned.parameters] == [
        tuple(f"dense_{layer}.{end}" for end in ends) for layer in range(3)
    ]
    assert {(report.rule, report.representation) for report in planned.parameters} == {("linear", "pairwise")}


def test_the_engine_holds_a_convolution_as_that_of_torch(tmp_path) -> None:
    x = drawn((8, 3, 6, 6)).float()
    held = []
    for layer in (Conv2d(3, 32, b_std=0.3), nn.Conv2d(3, 32, 3, padding=1)):
        model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 2)).eval()
        planned = ntkpipe.plan_kernel(model, x, kind="ntk", store=tmp_path / "k.zarr", progress=False)
        held.append([(report.parameters, report.rule, report.representation) for report in planned.parameters])
    assert held[0] == held[1]


def test_a_parameter_does_not_depend_on_the_size_of_others() -> None:
    narrow, wide = (mlp(16, (width, 48, width), 2, b_std=0.3, seed=5) for width in (32, 64))
    assert torch.equal(narrow.dense_1.bias, wide.dense_1.bias)
    assert torch.equal(narrow.dense_3.bias, wide.dense_3.bias)
    # Units of a first layer, and of what the last one reads, come one after the other.
    assert torch.equal(narrow.dense_0.weight, wide.dense_0.weight[:32])
    assert torch.equal(narrow.dense_3.weight, wide.dense_3.weight[:, :32])


def test_draws_are_of_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first = mlp(8, (16,), 2, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    going_on = seeded(3)
    second, third = (mlp(8, (16,), 2, seed=going_on) for _ in range(2))
    assert torch.equal(first.dense_0.weight, second.dense_0.weight)
    assert not torch.equal(first.dense_0.weight, third.dense_0.weight)
    doubles = mlp(8, (16,), 2, seed=3, dtype=torch.float64)
    assert torch.equal(first.dense_0.weight, doubles.dense_0.weight.float())


def test_layers_are_copied_and_pickled() -> None:
    model = mlp(8, (16,), 2, activation="leaky_relu:0.1", b_std=0.3)
    x = drawn((3, 8)).float()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    assert "leaky_relu:0.1" in repr(model)
    assert "W_std=1" in repr(model)


FUNCTIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "leaky_relu:0.1": lambda x: np.where(x > 0, x, 0.1 * x),
    "abs": np.abs,
    "erf": special.erf,
    "gelu": lambda x: x * special.ndtr(x),
    "sin": np.sin,
    "cos": np.cos,
    "identity": lambda x: x,
    "tanh": np.tanh,
    "sigmoid": special.expit,
    "silu": lambda x: x * special.expit(x),
    "softplus": lambda x: np.logaddexp(0, x),
    "gaussian": lambda x: np.exp(-x * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "hardtanh": lambda x: np.clip(x, -1, 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations_are_functions_of_that_name(name) -> None:
    x = 3 * drawn((200,))
    np.testing.assert_allclose(Pointwise(name)(x), FUNCTIONS[name](x.numpy()), rtol=1e-12, atol=1e-14)


def test_every_name_of_infinite_networks_is_known() -> None:
    assert {*KNOWN} <= FUNCTIONS.keys()
    assert {*ACTIVATIONS} < FUNCTIONS.keys()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Dense(3, 4, parametrisation="ntq"), "did you mean 'ntk'"),
        (lambda: Dense(3, 4, position="middle"), "needed one of first, hidden, last"),
        (lambda: Dense(0, 4), "needed a number from 1"),
        (lambda: Dense(3, 4.5), "needed an integer"),
        (lambda: Dense(3, 4, -1.0), "W_std=-1.0"),
        (lambda: Dense(3, 4, b_std=float("nan")), "b_std=nan"),
        (lambda: Conv2d(3, 4, padding="reflect"), "needed 'same', 'valid', 'circular'"),
        (lambda: Conv2d(3, 4, stride=0), "stride=0"),
        (lambda: Pointwise("rellu"), "did you mean 'relu'"),
        (lambda: Pointwise("relu:0.1"), "known are"),
        (lambda: Pointwise("leaky_relu:x"), "needed a number"),
    ],
)
def test_bad_options_are_refused(make, words) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
