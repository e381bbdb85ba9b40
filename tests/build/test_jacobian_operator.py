"""J J' without a matrix multiplies as the kernel does, and solvers take it for one."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import ntkpipe
from ntkpipe.base.errors import ConfigError, ModelError, SelfCheckError
from ntkpipe.solvers.spectral.lanczos import eigsh

DIGITS = (load_digits().images[:53] / 16)[:, None]


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(144, 3)
    ).eval()


@pytest.mark.parametrize("kind", ["pntk", "ntk", "trace", "output:1"])
@pytest.mark.parametrize("batch", [13, 64])  # the first leaves a batch of one
def test_products_are_those_of_the_kernel(kind, batch):
    operator = ntkpipe.jacobian_operator(network(), DIGITS, kind=kind, batch=batch)
    kernel = ntkpipe.kernel_matrix(network(), DIGITS, kind=kind, compute_dtype="float64")
    block = np.random.default_rng(0).standard_normal((len(kernel), 3))
    exact = kernel @ block
    assert np.abs(operator @ block - exact).max() <= 1e-13 * np.abs(exact).max()
    np.testing.assert_allclose(operator.diagonal(), kernel.diagonal(), rtol=1e-12)
    assert operator.frobenius() == pytest.approx(np.linalg.norm(kernel), rel=3 / 8)  # three standard errors


def test_a_solver_finds_the_eigenvalues_of_the_kernel():
    found = eigsh(ntkpipe.jacobian_operator(network(), DIGITS), 4, tol=1e-8)
    exact = np.linalg.eigvalsh(ntkpipe.kernel_matrix(network(), DIGITS, compute_dtype="float64"))[::-1][:4]
    assert found.is_converged
    np.testing.assert_allclose(found.eigenvalues, exact, rtol=1e-12)


def test_float32_products_say_what_they_know():
    operator = ntkpipe.jacobian_operator(network(), DIGITS, compute_dtype="float32")
    assert operator.storage_dtype == np.float32
    assert operator.storage_floor() > 1e-9 * operator.frobenius()


def test_identity_depends_on_model_samples_and_kind():
    changed = network()
    changed[0].weight.data[0, 0, 0, 0] += 1
    names = [
        ntkpipe.jacobian_operator(model, inputs, kind=kind).identity()
        for model, inputs, kind in (
            (network(), DIGITS, "pntk"),
            (changed, DIGITS, "pntk"),
            (network(), DIGITS[::-1].copy(), "pntk"),
            (network(), DIGITS, "trace"),
        )
    ]
    assert len(set(names)) == 4
    assert ntkpipe.jacobian_operator(network(), DIGITS).identity() == names[0]


def test_a_matrix_for_each_output_is_refused():
    with pytest.raises(ConfigError, match=r"give 'output:k', or 'trace'"):
        ntkpipe.jacobian_operator(network(), DIGITS, kind="diagonal")


def test_samples_that_depend_on_each_other_are_refused():
    class Centring(torch.nn.Module):
        def forward(self, inputs):
            return inputs - inputs.mean(dim=0)

    with pytest.raises((SelfCheckError, ntkpipe.NtkpipeError), match=r"batch|sample"):
        ntkpipe.jacobian_operator(torch.nn.Sequential(network(), Centring()), DIGITS)


class Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(8 * torch.tanh(x)) / 8

    @staticmethod
    def backward(ctx, grad):
        return 0.5 * grad


def hooked(pull_back):
    def forward(model, x):
        h = torch.tanh(model[0](x.flatten(1)))
        if h.requires_grad:
            h.register_hook(pull_back)
        return model[2](h)

    return forward


def two_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))


@pytest.mark.parametrize(
    "forward",
    [
        hooked(lambda grad: 0.3 * grad),
        hooked(torch.neg),
        lambda model, x: model[2](Halves.apply(model[0](x.flatten(1)))),
    ],
)
def test_products_are_of_the_gradients_where_these_are_not_derivatives(forward):
    operator = ntkpipe.jacobian_operator(two_layers(), DIGITS, kind="ntk", forward=forward)
    kernel = ntkpipe.kernel_matrix(two_layers(), DIGITS, kind="ntk", forward=forward, compute_dtype="float64")
    block = np.random.default_rng(0).standard_normal((len(kernel), 2))
    assert np.abs(operator @ block - kernel @ block).max() <= 1e-12 * np.abs(kernel @ block).max()


def test_a_backward_pass_that_is_not_linear_has_no_products():
    with pytest.raises(ModelError, match=r"not the derivative.*use one of them"):
        ntkpipe.jacobian_operator(two_layers(), DIGITS, forward=hooked(lambda grad: grad.clamp(-0.01, 0.01)))
