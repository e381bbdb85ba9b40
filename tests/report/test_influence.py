"""Which samples are images, and their pixels."""

import io
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import ntkpipe
from ntkpipe.report.sections.influence import StoredImages, image_shape
from ntkpipe.store.manifest import ArrayRecord


@pytest.mark.parametrize(
    ("shape", "dtype", "found"),
    [
        ((784,), "float32", (1, 28, 28)),
        ((3072,), "float32", (3, 32, 32)),
        ((28, 20), "float64", (28, 20)),
        ((1, 28, 20), "float32", (1, 28, 20)),
        ((3, 32, 32), "float32", (3, 32, 32)),
        ((32, 16, 3), "uint8", (32, 16, 3)),
    ],
)
def test_what_looks_like_images(shape: tuple[int, ...], dtype: str, found: tuple[int, ...]) -> None:
    assert image_shape(ArrayRecord(shape=shape, dtype=dtype)) == found


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((), "float32"),
        ((20,), "float32"),
        ((49,), "float32"),
        ((784,), "int64"),
        ((64, 5), "float32"),
        ((5, 32, 32), "float32"),
        ((2, 3, 8, 8), "float32"),
    ],
)
def test_what_does_not(shape: tuple[int, ...], dtype: str) -> None:
    assert image_shape(ArrayRecord(shape=shape, dtype=dtype)) is None


def make(path: Path, inputs: np.ndarray) -> ntkpipe.KernelStore:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(inputs[0].size, 2)).eval()
    return ntkpipe.compute_kernel(model, inputs, store=path, kind="pntk", progress=False)


def shown_at(uri: str) -> np.ndarray:
    """Pixels of an image."""
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    return imread(io.BytesIO(b64decode(data)))


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 8, 8), (3, 8, 10), (8, 10, 3)])
def test_pixels_are_those_of_the_sample(tmp_path: Path, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    inputs = rng.random((6, *shape)).astype(np.float32)
    inputs[0].flat[:20], inputs[1].flat[:20] = 0.0, 1.0
    images = StoredImages(make(tmp_path / "k.zarr", inputs))
    assert images.why_not() is None
    found = images.read("train", [1, 0, 1])
    assert sorted(found) == [0, 1]
    for number, uri in found.items():
        wanted = inputs[number].reshape((8, 8) if shape == (64,) else shape)
        wanted = np.moveaxis(wanted, 0, -1) if shape[0] in {1, 3} else wanted
        shown = shown_at(uri)[:, :, :3]
        wanted = np.broadcast_to(wanted.reshape(*shown.shape[:2], -1), shown.shape)
        assert np.abs(shown - wanted).max() < 0.01


def test_samples_that_are_no_images_are_told_by_number(tmp_path: Path, rng: np.random.Generator) -> None:
    images = StoredImages(make(tmp_path / "k.zarr", rng.random((4, 5)).astype(np.float32)))
    assert images.read("train", [0]) == {}
    assert "do not look like images" in str(images.why_not())


def test_a_store_without_samples_says_so(tmp_path: Path, rng: np.random.Generator) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 2).eval()
    ntkpipe.compute_kernel(model, rng.random((4, 64)), store=tmp_path / "ntk.zarr", kind="ntk", progress=False)
    derived = ntkpipe.derive_kernel(tmp_path / "ntk.zarr", kind="pntk", to=tmp_path / "pntk.zarr")
    images = StoredImages(derived)
    assert "holds no inputs" in str(images.why_not())
    assert images.read("train", [0]) == {}


def test_grey_values_are_stretched_over_all_images_together(tmp_path: Path, rng: np.random.Generator) -> None:
    inputs = (8 * rng.random((4, 64)) - 3).astype(np.float32)
    inputs[0].flat[:20], inputs[1].flat[:20] = -3.0, 5.0
    found = StoredImages(make(tmp_path / "k.zarr", inputs)).read("train", [0, 1])
    for number, uri in found.items():
        shown = shown_at(uri)[:, :, 0]
        assert np.abs(shown - (inputs[number].reshape(8, 8) + 3) / 8).max() < 0.01
