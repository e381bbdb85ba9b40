"""Small stores with targets and test sets, and dense regressions written out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import ntkpipe

NUM_TRAIN, NUM_TEST, NUM_OUTPUTS = 40, 15, 3


def make_store(path: Path, *, kind: str = "pntk", targets: str = "classes", seed: int = 0) -> ntkpipe.KernelStore:
    """A float64 kernel of a small network; targets are classes, or real columns."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    layers = torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, NUM_OUTPUTS)
    inputs, test_inputs = rng.standard_normal((NUM_TRAIN, 6)), rng.standard_normal((NUM_TEST, 6))
    directions = rng.standard_normal((6, NUM_OUTPUTS))

    def made(x: NDArray[Any]) -> NDArray[Any]:
        real = x @ directions
        return real.argmax(axis=1) if targets == "classes" else np.sin(real)

    return ntkpipe.compute_kernel(
        torch.nn.Sequential(*layers).eval(),
        inputs,
        targets=made(inputs),
        test_inputs=test_inputs,
        test_targets=made(test_inputs),
        store=path,
        kind=kind,
        compute_dtype="float64",
        tile=16,
        progress=False,
    )


@dataclass
class Categorical:
    """What pandas has for a categorical, as far as it matters here: a dtype with categories, and values."""

    values: Any
    dtype: Any = field(default_factory=lambda: type("CategoricalDtype", (), {"categories": ()})())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self.values, dtype)


def features(
    rng: np.random.Generator, num_train: int = 30, num_test: int = 9, size: int = 50
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Train kernel, test kernel, and diagonal of test samples of random features whose sizes fall."""
    phi = rng.standard_normal((num_train + num_test, size)) / np.sqrt(1.0 + np.arange(size))
    kernel = phi @ phi.T
    return kernel[:num_train, :num_train], kernel[num_train:, :num_train], kernel.diagonal()[num_train:]
