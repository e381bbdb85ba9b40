"""The CUDA path; runs where a GPU is."""

import numpy as np
import pytest
import torch
from reference import redraw
from torch import nn

import ntkpipe
from ntkpipe.models import exact_math

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def model() -> nn.Module:
    layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return redraw(nn.Sequential(*layers, nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 3)))


def samples(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((50, 64))


@pytest.mark.parametrize("kind", ["pntk", "ntk"])
def test_gpu_and_cpu_agree_in_float64(kind: str, rng: np.random.Generator) -> None:
    options = {"kind": kind, "compute_dtype": "float64", "tile": 16}
    x = samples(rng)
    found = ntkpipe.kernel_matrix(model(), x, device="cuda", **options)
    expected = ntkpipe.kernel_matrix(model(), x, device="cpu", **options)
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    assert np.max(np.abs(found - expected) / scale) <= 1e-12


def test_a_store_made_on_a_gpu_is_certified(rng: np.random.Generator, tmp_path) -> None:
    x, net = samples(rng), model()
    store = ntkpipe.compute_kernel(net, x, test_inputs=x[:7], store=tmp_path / "k.zarr", device="cuda", tile=16)
    assert store.manifest.choices.device == "cuda"
    assert ntkpipe.verify(store, net, x, test_inputs=x[:7], device="cuda").is_good


def test_float32_products_are_float32() -> None:
    a = torch.randn(512, 512, device="cuda")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with exact_math():
            error = (a @ a - (a.double() @ a.double())).abs().max() / (a.double() @ a.double()).abs().max()
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert float(error) < 1e-5
