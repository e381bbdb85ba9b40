"""Operations are counted, and the bytes of what is allocated, but not of views."""

import pytest
import torch
import torch.nn.functional as F

from ntkpipe.jacobian.cost import measure

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


@pytest.mark.parametrize("name", RUNS)
def test_operations_and_bytes(name):
    run, flops, num_bytes = RUNS[name]
    assert measure(run)[:2] == (flops, num_bytes)


def test_the_result_is_returned():
    assert torch.equal(measure(lambda: A @ B)[2], A @ B)


def test_backward_is_counted():
    weight = torch.ones(3, 7, requires_grad=True)
    forward, _, outputs = measure(lambda: F.linear(A, weight))
    backward, _, _ = measure(lambda: torch.autograd.grad(outputs.sum(), weight))
    assert (forward, backward) == (2 * 5 * 7 * 3, 2 * 5 * 7 * 3)
