"""What a run finds out before it starts does not depend on what else runs on the machine."""

from itertools import count

import pytest
import torch

from ntkpipe.build import prepare
from ntkpipe.jacobian.model.device import sizes_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ratio_of_rates_is_that_of_the_device(dtype, monkeypatch):
    """Representations, and so bits, depend on it."""
    seconds = count(1)
    monkeypatch.setattr(prepare, "_best_seconds", lambda *_: next(seconds) ** 3.0)
    device = torch.device("cpu")
    found = [prepare.measure_rates.__wrapped__(device, dtype) for _ in range(4)]
    assert len({rates.product for rates in found}) == 4
    assert {rates.product / rates.elementwise for rates in found} == {sizes_of(device).entry_flops}
