"""A rule's input rows and cotangent rows make up the gradient of its operands."""

import pytest
import torch
import torch.nn.functional as F

from ntkpipe.jacobian.rules import BIAS, LINEAR, RULES, WEIGHT


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3), (2, 1, 5, 3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_rows_of_linear_make_up_its_gradients(shape, with_bias):
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(shape, generator=generator), torch.randn(2, 3, generator=generator)
    bias = torch.randn(2, generator=generator) if with_bias else None
    bound = LINEAR.bind(inputs, weight, bias)
    operands = {role: value.requires_grad_() for role, value in bound.operands.items()}
    output = bound.call(operands)
    assert torch.equal(output, F.linear(inputs, weight, bias))
    cotangent = torch.randn(output.shape, generator=generator)
    exact = dict(zip(operands, torch.autograd.grad(output, list(operands.values()), cotangent), strict=True))
    rows = LINEAR.output_rows(cotangent)
    assert torch.allclose(rows.T @ LINEAR.input_rows(bound.input), exact[WEIGHT], atol=1e-5)
    assert set(operands) == ({WEIGHT, BIAS} if with_bias else {WEIGHT})
    if with_bias:
        assert torch.allclose(rows.sum(0), exact[BIAS], atol=1e-5)


def test_arguments_are_found_by_name_too():
    weight = torch.ones(2, 3)
    bound = LINEAR.bind(input=torch.ones(1, 3), weight=weight, bias=None)
    assert bound.operands[WEIGHT] is weight
    assert RULES[F.linear] is LINEAR
