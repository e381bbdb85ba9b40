"""Scratch is allocated once for each name, dtype and device, and grows."""

import pytest
import torch

from ntkpipe.jacobian.representations.workspace import Workspace


def test_memory_is_taken_again_if_it_is_large_enough():
    workspace, like = Workspace(), torch.zeros(1)
    first = workspace.take("a", (3, 4), like)
    assert workspace.take("a", (2, 5), like).data_ptr() == first.data_ptr()
    grown = workspace.take("a", (5, 5), like)
    assert workspace.take("a", (3, 4), like).data_ptr() == grown.data_ptr()


def test_names_and_dtypes_do_not_share_memory():
    workspace, like = Workspace(), torch.zeros(1)
    taken = [
        workspace.take("a", (3, 4), like),
        workspace.take("b", (3, 4), like),
        workspace.take("a", (3, 4), like, torch.float64),
        workspace.take("a", (3, 4), torch.zeros(1, dtype=torch.int64)),
    ]
    assert [tensor.dtype for tensor in taken] == [torch.float32, torch.float32, torch.float64, torch.int64]
    for number, tensor in enumerate(taken):
        tensor.fill_(number)
    assert [int(tensor.max()) for tensor in taken] == [int(tensor.min()) for tensor in taken] == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4)])
def test_tensors_are_contiguous_and_of_the_shape_asked_for(shape):
    workspace = Workspace()
    workspace.take("a", (9, 9), torch.zeros(1))
    found = workspace.take("a", shape, torch.zeros(1))
    assert found.shape == shape
    assert found.is_contiguous()
