"""A report of a small store that has everything: images, classes, a test set, a certificate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ntkpipe
from ntkpipe.report.report import write_report


def make_store(
    path: Path,
    *,
    num_train: int = 60,
    num_test: int = 20,
    seed: int = 0,
    labels: Sequence[Any] = (0, 1, 2),
    **options: object,
) -> ntkpipe.KernelStore:
    """Images of 8 × 8 pixels of a class for each label, a bright bar in each at another place."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3)).eval()
    classes = rng.integers(0, len(labels), num_train + num_test)
    images = 0.3 * rng.random((num_train + num_test, 8, 8))
    for image, number in zip(images, classes, strict=True):
        image[1 + 2 * number : 3 + 2 * number] += 0.5
    inputs = images.reshape(-1, 64).astype(np.float32)
    targets = np.asarray(labels)[classes]
    arguments = {"kind": "pntk", "tile": 16, "progress": False, **options}
    train, test = slice(num_train), slice(num_train, None)
    store = ntkpipe.compute_kernel(
        model,
        inputs[train],
        targets=targets[train],
        test_inputs=inputs[test],
        test_targets=targets[test],
        store=path,
        **arguments,
    )
    ntkpipe.verify(store, model, progress=False)
    return store


def write_small_report(folder: Path) -> Path:
    """Its path."""
    store = make_store(folder / "small.zarr")
    return Path(write_report(store, folder / "small.html", progress=False).path)
