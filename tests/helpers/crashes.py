"""Writers that die where they are told to."""

from typing import Any

import numpy as np
import pytest
from small import inputs

from ntkpipe.store.media.folder import Folder


def data(num_train: int, num_test: int | None = None) -> dict[str, Any]:
    """The first samples of one long set, and of another one."""
    return {
        "inputs": inputs(60, seed=2)[:num_train],
        "targets": np.arange(60)[:num_train],
        "test_inputs": None if num_test is None else inputs(40, seed=3)[:num_test],
    }


class Crash(BaseException):
    """The process is gone."""


class Crashing:
    """Raises instead of the n-th step that changes anything on the medium."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
        self.left = steps
        for name in ("put", "put_new", "delete"):
            monkeypatch.setattr(Folder, name, self.guarded(getattr(Folder, name)))

    def guarded(self, step):
        def do(*args):
            if self.left == 0:
                raise Crash
            self.left -= 1
            return step(*args)

        return do
