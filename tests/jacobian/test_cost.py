"""Operations are counted, and the bytes of what is allocated, but not of views."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ntkpipe.jacobian.cost import Meter, make_meter

A, B = torch.ones(5, 7), torch.ones(7, 3)
# What runs, operations, bytes.
RUNS = {
    "a product": (lambda: A @ B, 2 * 5 * 7 * 3, 4 * 5 * 3),
    "two products": (lambda: (A @ B) @ B.T, 2 * 5 * 7 * 3 + 2 * 5 * 3 * 7, 4 * (15 + 35)),
    "a product in place": (lambda: torch.mm(A, B, out=torch.empty(5, 3)), 2 * 5 * 7 * 3, 4 * 15),
    "an elementwise operation": (lambda: A + 1, 0, 4 * 35),
    "an operation in place": (lambda: A.add_(0), 0, 0),
    "views": (lambda: A.T[1:].unsqueeze(0).expand(3, -1, -1), 0, 0),
    "a copy": (lambda: A.T.contiguous(), 0, 4 * 35),
    "nothing": (lambda: None, 0, 0),
}


def measured(run):
    """A meter that has watched ``run``."""
    with Meter() as meter:
        run()
    return meter


@pytest.mark.parametrize("name", RUNS)
def test_operations_and_bytes(name):
    run, flops, num_bytes = RUNS[name]
    meter = measured(run)
    assert (meter.num_flops, meter.num_bytes) == (flops, num_bytes)


def test_the_largest_tensor_is_found():
    assert measured(lambda: (A @ B) @ B.T).largest_bytes == 4 * 35
    assert measured(lambda: None).largest_bytes == 0


def test_backward_is_counted():
    weight = torch.ones(3, 7, requires_grad=True)
    outputs = F.linear(A, weight)
    assert measured(lambda: F.linear(A, weight)).num_flops == 2 * 5 * 7 * 3
    assert measured(lambda: torch.autograd.grad(outputs.sum(), weight)).num_flops == 2 * 5 * 7 * 3


def test_a_meter_imports_no_compiler_and_counts_the_same_beside_one(monkeypatch):
    lines = (
        "import sys, torch; from ntkpipe.jacobian.cost import make_meter",
        "with make_meter(): torch.ones(3, 3) @ torch.ones(3)",
        "assert 'torch._dynamo' not in sys.modules",
    )
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False)
    assert found.returncode == 0
    monkeypatch.setitem(sys.modules, "torch._dynamo", torch._dynamo)
    with make_meter() as meter:
        RUNS["two products"][0]()
    assert type(meter) is not Meter
    assert (meter.num_flops, meter.num_bytes) == RUNS["two products"][1:]
