"""Scratch is allocated once for each name, dtype and device, and grows."""

import pytest
import torch

from ntkpipe.jacobian.representations.sums import Workspace, copy_merged


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


SHAPES = {
    "the same": ((3, 4, 5), (3, 4, 5)),
    "positions merged": ((3, 12, 5), (3, 4, 3, 5)),
    "everything merged": ((3, 24, 30), (3, 4, 3, 2, 5, 6)),
    "axes of one": ((3, 1, 12, 1), (3, 4, 1, 3)),
    "one value": ((1, 1), (1, 1, 1)),
    "one sample": ((1, 6), (1, 2, 3)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_strided", [True, False])
def test_values_are_copied_with_axes_merged(name, is_strided):
    merged, apart = SHAPES[name]
    values = torch.randn(apart[::-1], dtype=torch.float64)
    values = values.permute(*reversed(range(len(apart)))) if is_strided else values.reshape(apart)
    target = torch.full(merged, torch.nan, dtype=torch.float32)
    copy_merged(target, values)
    assert torch.equal(target, values.reshape(merged).float())
