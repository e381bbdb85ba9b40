"""The model and the samples of the stores below ``data/old``: of small integers, so that every kernel is exact.

Sums of products of them stay far below 2²⁴, whatever their order: float32 holds outputs, Jacobians and kernels as they
are, on any machine. With four outputs the factor 1/√O of a pseudo-NTK is 1/2.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ntkpipe import KernelStore

NUM_INPUTS, WIDTH, NUM_OUTPUTS = 6, 24, 4


def integers(shape: tuple[int, ...], seed: int, low: int, high: int) -> NDArray[np.int64]:
    """Numbers from ``low`` to ``high``, those of one seed the first ones of any larger shape along the first axis.

    A hash of their position, which no version of numpy changes.
    """
    hashed = (np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(seed << 20)) * np.uint64(0x9E3779B97F4A7C15)
    hashed = (hashed ^ (hashed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return low + ((hashed >> np.uint64(33)) % np.uint64(high - low + 1)).astype(np.int64).reshape(shape)


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(NUM_INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, NUM_OUTPUTS)).eval()
    with torch.no_grad():
        for seed, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.from_numpy(integers(tuple(parameter.shape), seed, -1, 2)))
    return made


def data(num_train: int, num_test: int = 0) -> dict[str, Any]:
    """Samples and classes; fewer of them are the first ones."""
    found = {
        "inputs": integers((num_train, NUM_INPUTS), 10, -2, 2).astype(np.float32),
        "targets": integers((num_train,), 11, 0, NUM_OUTPUTS - 1),
    }
    if num_test:
        found["test_inputs"] = integers((num_test, NUM_INPUTS), 12, -2, 2).astype(np.float32)
        found["test_targets"] = integers((num_test,), 13, 0, NUM_OUTPUTS - 1)
    return found


def readable(store: KernelStore) -> dict[str, NDArray[Any]]:
    """All arrays that a store is read for, by name."""
    sets: dict[str, Any] = {"": store} | {f"{name}/": store.group(name) for name in store.groups}
    if store.manifest.kind == "diagonal":
        sets = {f"{name}{k}/": each.output(k) for name, each in sets.items() for k in range(NUM_OUTPUTS)}
    splits = [""] if store.manifest.test is None else ["", "test_"]
    found = {f"{split}{name}": getattr(store, f"{split}{name}") for split in splits for name in ("outputs", "targets")}
    for name, each in sets.items():
        found[f"{name}train"] = each.train.to_numpy()
        if store.manifest.test is not None:
            found |= {f"{name}test_train": each.test_train.to_numpy(), f"{name}test_diagonal": each.test_diagonal}
    return found


def described(found: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON, arrays by what decides whether they are the same to the last bit."""

    def describe(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        content = hashlib.sha256(np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<")).tobytes())
        return {"dtype": value.dtype.name, "shape": list(value.shape), "sha256": content.hexdigest()}

    return {name: describe(value) for name, value in sorted(found.items())}
