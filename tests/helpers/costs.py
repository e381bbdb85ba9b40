"""Costs that decide between methods, made up."""

import pytest

from ntkpipe.solvers.inverse import systems


def costs(monkeypatch: pytest.MonkeyPatch, *, iterating: float, factoring: float) -> None:
    """Let conjugate gradients and Cholesky be expected to cost so many operations."""
    monkeypatch.setattr(systems, "cost_of_iterating", lambda *_: iterating)
    monkeypatch.setattr(systems, "cost_of_factor", lambda *_, **__: factoring)
