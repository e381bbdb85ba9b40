"""Antisymmetric and scaled models: what they are at the start, and their kernels."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import ntkpipe
from ntkpipe.base.errors import ConfigError
from ntkpipe.parametrised import antisymmetric, mlp, scaled

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def model() -> nn.Module:
    return mlp(8, (32, 32), 3, activation="erf", W_std=1.5, b_std=0.3, dtype=torch.float64)


def full_ntk(model: nn.Module) -> np.ndarray:
    return ntkpipe.kernel_matrix(model, X, kind="ntk", compute_dtype="float64", progress=False)


def moved(model: nn.Module) -> nn.Module:
    """One step of training."""
    model = copy.deepcopy(model)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, slope in zip(
        wanted, torch.autograd.grad(model(X).sin().sum() + model(X).sum(), wanted), strict=True
    ):
        parameter.data -= 0.1 * slope
    return model


def test_outputs_are_zero_at_the_start_and_the_kernel_is_the_same(model) -> None:
    both = antisymmetric(model)
    assert torch.equal(both(X), torch.zeros(6, 3, dtype=torch.float64))
    kernel = full_ntk(model)
    np.testing.assert_allclose(full_ntk(both), kernel, rtol=0, atol=1e-12 * kernel.max())
    assert sum(p.numel() for p in both.parameters()) == 2 * sum(p.numel() for p in model.parameters())


def test_both_copies_are_trained_and_the_model_is_left_alone(model) -> None:
    before = copy.deepcopy(model.state_dict())
    both = moved(antisymmetric(model))
    assert not torch.equal(both.first.dense_0.weight, both.second.dense_0.weight)
    expected = (both.first(X) - both.second(X)) / 2**0.5
    torch.testing.assert_close(both(X), expected, rtol=1e-14, atol=1e-14)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("alpha", [0.1, 10])
def test_a_scaled_model_starts_at_zero_with_a_scaled_kernel(model, alpha) -> None:
    lazy = scaled(model, alpha)
    assert torch.equal(lazy(X), torch.zeros(6, 3, dtype=torch.float64))
    kernel = alpha**2 * full_ntk(model)
    np.testing.assert_allclose(full_ntk(lazy), kernel, rtol=0, atol=1e-12 * kernel.max())
    assert [name for name, p in lazy.named_parameters() if p.requires_grad] == [
        f"model.{name}" for name, _ in model.named_parameters()
    ]
    after = moved(lazy)
    torch.testing.assert_close(after(X), alpha * (after.model(X) - model(X)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("make", [antisymmetric, lambda model: scaled(model, 3.0)])
def test_they_keep_the_mode_and_are_copied_and_pickled(model, make) -> None:
    both = moved(make(model))
    assert not both.training
    assert make(model.train()).training
    assert float(both(X).detach().abs().max()) > 0.01
    for other in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert torch.equal(other(X), both(X))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan"), "2"])
def test_alpha_is_positive_and_finite(model, alpha) -> None:
    with pytest.raises(ConfigError, match="alpha="):
        scaled(model, alpha)
