"""Finite networks: reference values of neural-tangents, parametrisations of each other, and their limits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ntkpipe
from ntkpipe import infinite
from ntkpipe.base.errors import ConfigError
from ntkpipe.infinite.matrix import infinite_kernel_matrix
from ntkpipe.parametrised import cnn, matching, mlp

REFERENCE = Path(__file__).parents[1] / "reference"
INPUTS, FINITE = np.load(REFERENCE / "inputs.npz"), np.load(REFERENCE / "finite.npz")
IMAGES = np.ascontiguousarray(INPUTS["images"].transpose(0, 3, 1, 2))  # theirs have channels last
ROOT_2 = 2**0.5


def kernel_of(model: nn.Module, x: np.ndarray, *parameters: str, kind: str = "ntk") -> np.ndarray:
    chosen = {"parameters": list(parameters)} if parameters else {}
    x = torch.from_numpy(np.ascontiguousarray(x))
    return ntkpipe.kernel_matrix(model, x, kind=kind, compute_dtype="float64", progress=False, **chosen)


def of_neural_tangents(model: nn.Module, case: str) -> nn.Module:
    """The network with the weights of a case, which have inputs first."""
    layers = [module for module in model.modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            weight, bias = (torch.from_numpy(FINITE[f"{case}/{name}_{number}"]) for name in ("weight", "bias"))
            layer.weight.copy_(weight.permute(3, 2, 0, 1) if weight.ndim == 4 else weight.T)
            layer.bias.copy_(bias.ravel())
    return model


def assert_is_reference(model: nn.Module, x: np.ndarray, case: str) -> None:
    outputs, kernel = FINITE[f"{case}/outputs"], FINITE[f"{case}/ntk"]
    np.testing.assert_allclose(model(torch.from_numpy(x)).detach(), outputs, rtol=0, atol=1e-12 * abs(outputs).max())
    found = kernel_of(model, x)
    size = np.sqrt(np.diag(found))
    expected = kernel.transpose(0, 2, 1, 3).reshape(found.shape)
    assert np.max(np.abs(found - expected) / np.outer(size, size)) < 1e-12


@pytest.mark.parametrize("case", ["dense/ntk/relu", "dense/ntk/erf", "dense/standard/relu"])
def test_outputs_and_kernels_are_those_of_neural_tangents(case: str) -> None:
    _, parametrisation, activation = case.split("/")
    options = {"W_std": ROOT_2, "b_std": 0.1, "activation": activation, "parametrisation": parametrisation}
    model = of_neural_tangents(mlp(8, (16, 16), 3, **options, dtype=torch.float64), case)
    assert_is_reference(model, INPUTS["normal"][:6], case)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8 * 16 + 16 + 16 * 16 + 16 + 16 * 3 + 3


def test_convolutions_are_those_of_neural_tangents() -> None:
    model = cnn((3, 6, 6), (8, 8), 3, strides=(1, 2), W_std=ROOT_2, b_std=0.1, dtype=torch.float64)
    assert_is_reference(of_neural_tangents(model, "conv/ntk/relu"), IMAGES, "conv/ntk/relu")
    assert sum(parameter.numel() for parameter in model.parameters()) == 27 * 8 + 8 + 72 * 8 + 8 + 8 * 3 + 3


@pytest.mark.parametrize(
    ("make", "x", "fans"),
    [
        (lambda **options: mlp(8, (16, 24), 2, **options), INPUTS["normal"][:4], (8, 16, 24)),
        (lambda **options: mlp(8, (16, 24), 2, first_layer="sum", **options), INPUTS["normal"][:4], (8, 16, 24)),
        (lambda **options: cnn((3, 6, 6), (4, 5), 2, pool=(1, 2), first_layer="sum", **options), IMAGES, (27, 36, 5)),
        (lambda **options: cnn((3, 6, 6), (4, 5), 2, head="flatten", **options), IMAGES, (27, 36, 180)),
    ],
    ids=["mlp", "sum", "pooled", "flat"],
)
def test_both_parametrisations_are_one_by_groups(make, x, fans) -> None:
    """Equal functions have kernels of each parameter that differ by fan_in / W_std² and 1 / b_std², exactly."""
    W_std, b_std = [1.3, 1.5, 1.1], [0.4, 0.5, 0.6]
    options = {"W_std": W_std, "b_std": b_std, "activation": "erf", "dtype": torch.float64}
    ntk, standard = (make(**options, parametrisation=name) for name in ("ntk", "standard"))
    factors = [size for w, fan, b in zip(W_std, fans, b_std, strict=True) for size in (w / fan**0.5, b)]
    with torch.no_grad():
        for one, other, factor in zip(ntk.parameters(), standard.parameters(), factors, strict=True):
            other.copy_(factor * one)
    torch.testing.assert_close(standard(torch.from_numpy(x)), ntk(torch.from_numpy(x)), rtol=1e-12, atol=1e-12)
    whole = kernel_of(standard, x)
    summed = np.zeros_like(whole)
    for (name, _), factor in zip(ntk.named_parameters(), factors, strict=True):
        part = kernel_of(ntk, x, name) / factor**2
        np.testing.assert_allclose(kernel_of(standard, x, name), part, rtol=0, atol=1e-12 * part.max())
        summed += part
    np.testing.assert_allclose(whole, summed, rtol=0, atol=1e-12 * whole.max())


def feature_movement(width: int, parametrisation: str) -> float:
    """Mean change of the last hidden activations in a step of training that changes outputs by about one."""
    x = torch.from_numpy(INPUTS["ordinary"])
    options = {"activation": "erf", "W_std": 1.5, "parametrisation": parametrisation, "dtype": torch.float64}
    model = mlp(8, (width, width), 1, **options, seed=1)
    hidden = model[:-1]
    before = hidden(x).detach()
    slopes = torch.autograd.grad(model(x)[:, 0].sum(), list(model.parameters()))
    with torch.no_grad():
        for parameter, slope in zip(model.parameters(), slopes, strict=True):
            parameter += slope / 10
        return float((hidden(x) - before).abs().mean())


def test_features_move_at_any_width_in_the_maximal_update_parametrisation_alone() -> None:
    """In the NTK parametrisation like 1/√width, a quarter where the width is 16 times as large."""
    rich, lazy = ([feature_movement(width, name) for width in (64, 1024)] for name in ("mup", "ntk"))
    assert rich[1] > 0.7 * rich[0]
    assert lazy[1] < 0.35 * lazy[0]
    options = {"activation": "erf", "W_std": 1.5, "parametrisation": "mup", "dtype": torch.float64}
    x = torch.from_numpy(INPUTS["ordinary"])
    small, large = (mlp(8, (width, width), 64, **options)(x).detach().std() for width in (64, 1024))
    assert float(large / small) == pytest.approx(1 / 4, rel=0.2)


@pytest.mark.parametrize("parametrisation", ["ntk", "standard", "mup"])
def test_biases_may_be_missing_or_start_at_zero(parametrisation) -> None:
    model = mlp(8, (16,), 2, b_std=[None, 0.3], bias_init=0.0, parametrisation=parametrisation)
    assert [name for name, _ in model.named_parameters()] == ["dense_0.weight", "dense_1.weight", "dense_1.bias"]
    assert not model.dense_1.bias.any()
    assert kernel_of(model.double(), INPUTS["normal"][:2], "dense_1.bias", kind="pntk").all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mlp(8, (16,), 2, W_std=[1.0]), "1 of W_std; needed 2"),
        (lambda: mlp(8, (16,), 2, b_std=[0.1, 0.1, 0.1]), "3 of b_std; needed 2"),
        (lambda: mlp(8, (16,), 2, first_layer="means"), "first_layer='means'"),
        (lambda: mlp(8, (), 2), "hidden=0"),
        (lambda: mlp(8, (16.5,), 2), "widths=.*integers"),
        (lambda: mlp(8, (16,), 2, activation="rely"), "did you mean 'relu'"),
        (lambda: cnn((3, 6, 6), (4, 4), 2, padding="valid", filter=5), "Conv does not fit samples of shape"),
        (lambda: cnn((3, 6, 6), (4,), 2, pool=7), "AveragePool does not fit"),
        (lambda: cnn((3, 6, 6), (4, 4), 2, strides=[2]), "1 of strides; needed 2"),
        (lambda: cnn((3, 6, 6), (4,), 2, head="mean"), "needed 'flatten' or 'gap'"),
        (lambda: cnn((3, 6, 6), (), 2), "hidden=0"),
    ],
)
def test_bad_options_are_refused(make, words) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


RESIDUAL = infinite.Residual(infinite.Activation("relu"), infinite.Dense(ROOT_2, 0.3))
CASES = {
    "relu": infinite.FullyConnected(2, "relu", W_std=ROOT_2, b_std=0.3),
    "erf, sums": infinite.FullyConnected(2, "erf", W_std=(0.9, 1.5, 1.2), b_std=(0.3, None, 0.4), first_layer="sum"),
    "biases from zero": infinite.FullyConnected(1, "gelu", W_std=1.5, b_std=1.0, bias_init=0.0),
    "last layer: NNGP": infinite.FullyConnected(2, "leaky_relu:0.1", W_std=ROOT_2, b_std=0.5, trained="last"),
    "some layers": infinite.FullyConnected(2, "sin", W_std=1.2, b_std=0.5, bias_init=0.5, trained=(0, 2)),
    "residual": infinite.Sequential(
        [infinite.Dense(ROOT_2, 0.3), RESIDUAL, infinite.Activation("relu"), infinite.Dense()]
    ),
    "standard": infinite.FullyConnected(1, "relu", W_std=1.5, b_std=0.5, parametrisation="standard", widths=(4096,)),
    "standard, sums": infinite.FullyConnected(
        1, "relu", W_std=0.7, b_std=0.5, first_layer="sum", parametrisation="standard", widths=(4096,)
    ),
}
IMAGES_OF = {
    "flat": infinite.Convolutional(2, "relu", ROOT_2, 0.3, padding="same", strides=(2, 1)),
    "pooled": infinite.Convolutional(2, "erf", 1.5, 0.3, padding="circular", pool=(2, 1), head="gap"),
    "sums, standard": infinite.Convolutional(
        1, "relu", 0.7, 0.3, padding=1, first_layer="sum", parametrisation="standard", channels=512
    ),
    "Arora": infinite.Convolutional(2, preset="arora"),
}


@pytest.mark.parametrize("case", [*CASES, *IMAGES_OF])
def test_a_wide_network_has_the_kernel_of_the_infinite_one(case: str) -> None:
    """Means over draws, of 4096 units, 1024 in both of two hidden layers, or 128 channels, within 5 standard errors;
    their own deviation from the limit, of order 1/width, is a small part of these.
    """
    net = (CASES | IMAGES_OF)[case]
    x, width, n_in = INPUTS["ordinary"][:3] * 0.7, 4096 if getattr(net, "hidden", 2) == 1 else 1024, 8
    if case in IMAGES_OF:
        x, width, n_in = IMAGES[:2, :, :4, :4], None if net.channels else 128, (3, 4, 4)
    exact = infinite_kernel_matrix(net, x)[1]
    draws = []
    for seed in range(10):
        model = matching(net, width, seed, n_in=n_in, dtype=torch.float64)
        draws.append(kernel_of(model, x, kind="pntk"))
    error = np.std(draws, axis=0, ddof=1) / len(draws) ** 0.5
    assert (np.abs(np.mean(draws, axis=0) - exact) < 5 * error).all()
    assert (error < 0.1 * np.sqrt(np.outer(np.diag(exact), np.diag(exact)))).all()


def test_a_matching_network_has_the_options_of_the_infinite_one() -> None:
    net = CASES["some layers"]
    model = matching(net, (16, 24), 3, n_in=8, n_out=2)
    assert [tuple(p.shape) for p in model.parameters()] == [(16, 8), (16,), (24, 16), (24,), (2, 24), (2,)]
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False, True, True]
    assert torch.equal(model.dense_0.weight, matching(net, 16, 3, n_in=8).dense_0.weight)
    assert matching(CASES["standard"], n_in=8).dense_1.weight.shape == (1, 4096)


@pytest.mark.parametrize(
    ("net", "width", "words"),
    [
        (CASES["relu"], None, "width=None; needed"),
        (CASES["relu"], (16,), "one number, or 2, one a layer"),
        (CASES["standard"], 64, "is of widths"),
        (CASES["residual"], (16, 24), r"a residual block makes \(1, 24\) of \(1, 16\)"),
        (
            infinite.FullyConnected(1, infinite.Activation((np.sin, np.cos))),
            64,
            "Activation has no finite counterpart",
        ),
        (
            infinite.Sequential([infinite.Dense(), infinite.LayerNorm(), infinite.Dense()]),
            64,
            "LayerNorm has no finite",
        ),
    ],
    ids=["none", "too few", "standard", "residual", "pair", "norm"],
)
def test_networks_without_a_finite_match_are_refused(net, width, words) -> None:
    with pytest.raises(ConfigError, match=words):
        matching(net, width, n_in=8)
