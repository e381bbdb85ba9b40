"""Which torch functions have a factored Jacobian: one entry for each function.

A rule covers a function whose output rows z_r depend on its weight as ``z_r = W a_r (+ b)``. With d_r the covector
pulled back to z_r, the Jacobian of the weight is ``sum_r d_r (x) a_r`` and that of the bias ``sum_r d_r``, the sums
running over the rows of one sample. To add a function, say where its input and parameters are among the arguments, and
how its input and its cotangent become rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

WEIGHT, BIAS = "weight", "bias"


@dataclass(frozen=True)
class Bound:
    """One call of a function that has a rule.

    Attributes
    ----------
    input
        What the weight is applied to.
    operands
        The tensors in the roles of weight and bias, as far as the call has them.
    call
        Calls the function with other operands.
    """

    input: Tensor
    operands: dict[str, Tensor]
    call: Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Rule:
    """How one torch function is factored.

    Attributes
    ----------
    name
        For reports and manifests.
    bind
        Finds input and operands among the arguments of a call.
    input_rows, output_rows
        The input as (rows, n_in) and a tensor like the output as (rows, n_out), rows in the same order.
    """

    name: str
    bind: Callable[..., Bound]
    input_rows: Callable[[Tensor], Tensor]
    output_rows: Callable[[Tensor], Tensor]


def _flatten_leading(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _bind_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Bound:  # noqa: A002 - torch's name
    operands = {WEIGHT: weight} if bias is None else {WEIGHT: weight, BIAS: bias}
    return Bound(input, operands, lambda given: F.linear(input, given[WEIGHT], given.get(BIAS)))


LINEAR = Rule("linear", _bind_linear, _flatten_leading, _flatten_leading)

RULES: dict[Callable[..., Any], Rule] = {F.linear: LINEAR}
