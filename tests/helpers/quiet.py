"""Warnings that models of tests cause and that are no finding: of torch about itself, and ours that a loop is slow."""

import pytest

QUIET = [
    pytest.mark.filterwarnings(f"ignore:{words}")
    for words in (
        "torch.func.vmap cannot run this model:UserWarning",
        "There is a performance drop:UserWarning",
        "`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
        "Converting a tensor with requires_grad=True to a scalar:UserWarning",
        "Using padding='same' with even kernel lengths:UserWarning",
        "The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning",
    )
]
