"""A small kernel whose blocks take about a second without using the processor."""

import time
from typing import Any

import numpy as np
import torch


class Slow(torch.nn.Module):
    """A network that waits before each forward pass."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.layers(x)


def slow(seconds: float) -> torch.nn.Module:
    return Slow(seconds).eval()


def samples(num_train: int, num_test: int) -> dict[str, Any]:
    draw = np.random.default_rng(0).standard_normal
    return {
        "inputs": draw((num_train, 6)).astype(np.float32),
        "targets": np.arange(num_train) % 3,
        "test_inputs": draw((num_test, 6)).astype(np.float32),
    }
