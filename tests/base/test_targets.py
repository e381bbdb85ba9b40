"""What targets are taken for, whatever container and dtype they come in."""

from typing import Any

import numpy as np
import pytest
import torch

from ntkpipe.base.errors import ConfigError
from ntkpipe.base.targets import encode

REAL = np.linspace(-1.0, 2.0, 24)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (REAL.astype(object), "1 real target"),
        (np.stack([REAL, REAL], axis=1).astype(object), "2 real targets"),
        ((np.arange(24) % 3).astype(object), "3 classes, one-hot"),
        (np.array([b"a", b"b"] * 12), "2 classes, one-hot"),
        (["a", "b"] * 12, "2 classes, one-hot"),
        (torch.arange(24) % 4, "4 classes, one-hot"),
        ((np.arange(24) % 2).astype(np.uint8), "2 classes, one-hot"),
        (range(3), "3 classes, one-hot"),
    ],
)
def test_containers_and_dtypes_do_not_change_what_targets_are(targets: Any, words: str) -> None:
    assert encode(targets).words == words


@pytest.mark.parametrize(
    ("targets", "task", "words"),
    [
        ([[1.0], [1.0, 2.0]], "auto", "targets: a list that NumPy does not take"),
        (torch.zeros(3).to_sparse(), "auto", "targets: a Tensor that NumPy does not take"),
        (np.array([1, "a", None], object), "auto", "labels of several types"),
        (np.where(REAL > 0, 2.0**63, -(2.0**63)), "classification", "needed labels"),
        (np.arange(30), "auto", "all of them different"),
        (np.arange(30) % 3, "binary", "3 classes; needed labels of two"),
    ],
)
def test_what_is_neither_is_refused_with_words(targets: Any, task: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        encode(targets, task=task)
