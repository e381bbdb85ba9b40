"""The three ways in which a parameter enters the output of an operation, and so what its Jacobian is made of.

An operation's output has *rows*: what one position of one sample becomes. With d_r the covector pulled back to row r,
the Jacobian of a sample is a sum over its rows. Rows of inputs and of cotangents are in the same order; which sample a
row belongs to is found by tracing and is not a rule's business.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Thunk = Callable[[], Tensor]
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outer:
    """Rows z_r = W a_r, group by group: the Jacobian is ``sum_r d_r (x) a_r``.

    Attributes
    ----------
    row_dims
        How many leading axes of inputs and cotangents number the rows.
    inputs
        Makes a, shape (*rows, groups, *in); may be a strided view, as windows of an image are.
    cotangents
        Takes a gradient of the output to d, shape (*rows, groups, *out).
    arrange
        Takes Jacobians (..., groups, n_out, n_in) to the operand's own axes (..., *operand.shape).
    order
        Names the order of elements in (groups, n_out, n_in): two uses of one function in the same order may be added up
        before they are arranged.
    """

    row_dims: int
    inputs: Thunk
    cotangents: Map
    arrange: Map
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scale:
    """Rows z_r = w o x_r, or w + x_r: the Jacobian is ``sum_r d_r o x_r``, or ``sum_r d_r``.

    Attributes
    ----------
    row_dims
        As in :class:`Outer`.
    inputs
        Makes x, shape (*rows, n), the operand's elements in order along the last axis; none stands for ones.
    cotangents
        Takes a gradient of the output to d, shape (*rows, n).
    """

    row_dims: int
    inputs: Thunk | None
    cotangents: Map


@dataclass(frozen=True)
class Lookup:
    """Rows z_r = W[k_r]: the Jacobian has d_r in row k_r, added up where an index repeats.

    Attributes
    ----------
    row_dims
        As in :class:`Outer`.
    inputs
        Makes the indices k, shape (*rows).
    cotangents
        Takes a gradient of the output to d, shape (*rows, n).
    """

    row_dims: int
    inputs: Thunk
    cotangents: Map


Form = Outer | Scale | Lookup


@dataclass(frozen=True)
class Operand:
    """One argument of a call that may be a parameter, and how it enters the output."""

    tensor: Tensor
    form: Form


@dataclass(frozen=True)
class Bound:
    """What a rule says of one call.

    Attributes
    ----------
    operands
        By role, as ``weight`` and ``bias``.
    saved
        Tensors that the forms will read later: they must not change in place after the call.
    """

    operands: dict[str, Operand]
    saved: tuple[Tensor, ...] = ()


Rule = Callable[..., Bound | None]
