"""J J' without a matrix multiplies as the kernel does, and solvers take it for one."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import ntkpipe
from ntkpipe.base.errors import ConfigError, SelfCheckError
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
