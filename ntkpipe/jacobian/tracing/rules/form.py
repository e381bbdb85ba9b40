"""The three ways in which a parameter enters the output of an operation, and so what its Jacobian consists of.

An operation's output has *rows*: what one position of one sample becomes. With d_r the covector pulled back to row r,
the Jacobian of a sample is a sum over its rows. Rows of inputs and of cotangents are in the same order; which sample a
row belongs to is found by tracing, not by rules.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

Thunk = Callable[[], Tensor]
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """How a parameter enters; the kinds of it are below."""

    kind: ClassVar[str]
    row_dims: int  # how many leading axes of inputs and cotangents number the rows
    inputs: Thunk | None  # makes a, x or k; None stands for ones
    cotangents: Map  # takes a gradient of the output to d


@dataclass(frozen=True)
class Outer(Form):
    """Rows z_r = W a_r, group by group: the Jacobian is ``sum_r d_r (x) a_r``."""

    # Shapes are (*rows, groups, *in) and (*rows, groups, *out); a may be a strided view, as windows of an image are.
    kind = "outer"
    arrange: Map  # takes Jacobians (..., groups, n_out, n_in) to the operand's own axes (..., *operand.shape)
    order: tuple[int, ...] = ()  # of elements in (groups, n_out, n_in); equal in uses that are added


@dataclass(frozen=True)
class Scale(Form):
    """Rows z_r = w o x_r, or w + x_r: the Jacobian is ``sum_r d_r o x_r``, or ``sum_r d_r``."""

    kind = "scale"  # shapes are (*rows, n), in the order of the operand's elements


@dataclass(frozen=True)
class Lookup(Form):
    """Rows z_r = W[k_r]: the Jacobian has d_r in row k_r, added up where an index repeats."""

    kind = "lookup"  # shapes are (*rows) and (*rows, n)


@dataclass(frozen=True)
class Bound:
    """The operands of one call that a rule found: arguments that may be parameters, and how they enter the output."""

    operands: Mapping[str, tuple[Tensor, Form]]  # by role, such as `weight`
    saved: tuple[Tensor, ...] = ()  # tensors that the forms read later: they must not change in place after the call


Rules = dict[Callable[..., Any], Callable[..., Bound | None]]  # by torch function
