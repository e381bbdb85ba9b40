"""Products with a matrix: linear, addmm, matmul and its relatives, einsum, bilinear; reading rows of one."""

# ruff: noqa: A002 - arguments are named as in torch

from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkpipe.jacobian.tracing.rules.elementwise import with_bias
from ntkpipe.jacobian.tracing.rules.form import Bound, Lookup, Outer, Rules


def contraction(x: Tensor, weight: Tensor, *labels: Sequence[str], scale: float = 1.0) -> Outer | None:
    """The form of a product of x with a weight, or None if it is not a matrix product; axes are labelled for einsum."""
    # Axes that x and weight share and that are summed over belong to the inputs a, axes of the weight alone to the
    # cotangents d; axes of x alone number the rows, and axes of all three number the groups.
    if any(len(set(each)) < len(each) for each in labels):
        return None
    x_labels, weight_labels, out_labels = labels
    x_sizes = dict(zip(x_labels, x.shape, strict=True))
    sizes = dict(zip(weight_labels, weight.shape, strict=True))
    narrow = [axis for axis, label in enumerate(x_labels) if x_sizes[label] == 1 and sizes.get(label, 1) != 1]
    x = x.detach().squeeze(narrow)
    x_labels = [label for axis, label in enumerate(x_labels) if axis not in narrow]
    weight_labels = [label for label in weight_labels if sizes[label] != 1 or x_sizes.get(label, 1) == 1]
    if any(label not in x_labels and label not in out_labels for label in weight_labels):
        return None
    rows = [label for label in out_labels if label not in weight_labels]
    groups = [label for label in weight_labels if label in x_labels and label in out_labels]
    in_axes = [label for label in weight_labels if label not in out_labels]
    out_axes = [label for label in weight_labels if label not in x_labels]
    kept = [*rows, *groups, *in_axes]
    summed = [axis for axis, label in enumerate(x_labels) if label not in kept]
    left = [label for label in x_labels if label in kept]
    canonical = [*groups, *out_axes, *in_axes]
    order = tuple(canonical.index(label) for label in weight_labels)

    def inputs() -> Tensor:
        values = x.sum(dim=summed) if summed else x
        return _grouped(values.permute([left.index(label) for label in kept]), len(rows), len(groups), bool(in_axes))

    def cotangents(grad: Tensor) -> Tensor:
        ordered = grad.permute([out_labels.index(label) for label in (*rows, *groups, *out_axes)])
        return _grouped(ordered if scale == 1.0 else ordered * scale, len(rows), len(groups), bool(out_axes))

    def arrange(jacobian: Tensor) -> Tensor:
        lead = jacobian.shape[:-3]
        split = jacobian.reshape(*lead, *(sizes[label] for label in canonical))
        return split.permute(*range(len(lead)), *(len(lead) + axis for axis in order)).reshape(*lead, *weight.shape)

    return Outer(len(rows), inputs, cotangents, arrange, order)


def _grouped(values: Tensor, num_rows: int, num_groups: int, has_width: bool) -> Tensor:
    """The group axes behind the row axes as one; without any, or without axes behind them, new ones of size one."""
    values = values.flatten(num_rows, num_rows + num_groups - 1) if num_groups else values.unsqueeze(num_rows)
    return values if has_width else values.unsqueeze(-1)


def _product(factors: dict[str, Tensor], labels: list[list[str]], out: list[str], scale: float = 1.0) -> Bound | None:
    """A product of several tensors by role, any of which may be the parameter."""
    tensors, operands = list(factors.values()), {}
    for position, (role, weight) in enumerate(factors.items()):
        others = [number for number in range(len(tensors)) if number != position]
        x, x_labels = _joined([tensors[n] for n in others], [labels[n] for n in others], [*labels[position], *out])
        form = None if x is None else contraction(x, weight, x_labels, labels[position], out, scale=scale)
        if form is not None:
            operands[role] = (weight, form)
    return Bound(operands, tuple(tensors)) if operands else None


def _matmul(left: Tensor, right: Tensor, scale: float = 1.0) -> tuple[Bound | None, list[int]]:
    """A product either factor of which may be the parameter, and the shape of its output."""
    # Leading axes are numbered from the right.
    a = [str(axis) for axis in range(left.ndim - 2, 0, -1)] + (["n", "k"] if left.ndim > 1 else ["k"])
    b = [str(axis) for axis in range(right.ndim - 2, 0, -1)] + (["k", "m"] if right.ndim > 1 else ["k"])
    batch = max(a, b, key=len)
    out = [label for label in batch if label.isdecimal()] + [x for x in ("n", "m") if x in a or x in b]
    sizes = dict(zip([*a, *b], [*left.shape, *right.shape], strict=True))
    return _product({"weight": right, "left": left}, [b, a], out, scale), [sizes[label] for label in out]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Bound | None:
    """``input @ weight.T + bias``."""
    if weight.ndim != 2:
        return None
    rows = [str(axis) for axis in range(input.ndim - 1)]
    form = contraction(input, weight, [*rows, "i"], ["o", "i"], [*rows, "o"])
    bound = None if form is None else Bound({"weight": (weight, form)}, (input,))
    return with_bias(bound, bias, (*input.shape[:-1], weight.shape[0]))


def matmul(input: Tensor, other: Tensor) -> Bound | None:
    """``input @ other``; also mm, bmm and mv."""
    return _matmul(input, other)[0]


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Bound | None:
    """``beta * input + alpha * mat1 @ mat2``; also baddbmm and addmv."""
    product, shape = _matmul(mat1, mat2, alpha)
    return with_bias(product, input, shape, beta)


def einsum(equation: str, *operands: Any) -> Bound | None:
    """Sums of products, where an operand enters by a matrix product."""
    tensors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else list(operands)
    parsed = _parse(equation, tensors)
    if parsed is None:
        return None
    *labels, out = parsed
    return _product({f"operand {position}": tensor for position, tensor in enumerate(tensors)}, labels, out)


def _parse(equation: str, tensors: list[Tensor]) -> list[list[str]] | None:
    """Axes of each operand and of the output, those of an ellipsis as numbers from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(tensors) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return None  # the interleaved format, which is rare
    found, widest = [], 0
    for term, tensor in zip(terms, tensors, strict=True):
        extra = tensor.ndim - len(term.replace("...", ""))
        found.append(_labels(term, extra))
        widest = max(widest, extra if "..." in term else 0)
    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        right = ("..." if "..." in left else "") + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    return [*found, _labels(right, widest)]


def _labels(term: str, extra: int) -> list[str]:
    before, dots, after = term.partition("...")
    return [*before, *((str(axis) for axis in range(extra, 0, -1)) if dots else ()), *after]


def _joined(tensors: list[Tensor], labels: list[list[str]], wanted: list[str]) -> tuple[Tensor | None, list[str]]:
    """The product of several factors as one, with those of their axes that are wanted; None without factors."""
    if len(tensors) <= 1:
        return (tensors[0], labels[0]) if tensors else (None, [])
    letters = dict(zip(dict.fromkeys(label for each in labels for label in each), ascii_letters, strict=False))
    kept = [label for label in letters if label in wanted]
    terms = ",".join("".join(letters[label] for label in each) for each in labels)
    with torch.no_grad():
        return torch.einsum(f"{terms}->{''.join(letters[label] for label in kept)}", *tensors), kept


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Bound | None:
    """``z_o = input1 @ weight[o] @ input2 + bias``."""
    bound = einsum("...i,...j,oij->...o", input1, input2, weight)
    return with_bias(bound, bias, (*input1.shape[:-1], weight.shape[0]))


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Bound | None:
    """``weight[input]``; the row of ``padding_idx`` gets no gradient."""
    if max_norm is not None or scale_grad_by_freq:
        return None  # the first changes the weight, the second gives a gradient that depends on the batch
    return _lookup(weight, input, padding_idx)


def _lookup(table: Tensor, indices: Tensor, padding_idx: int | None = None) -> Bound | None:
    if table.ndim != 2 or indices.dtype not in {torch.int64, torch.int32}:
        return None
    count = table.shape[0]

    def cotangents(grad: Tensor) -> Tensor:
        return grad if padding_idx is None else grad.masked_fill((indices == padding_idx % count).unsqueeze(-1), 0.0)

    form = Lookup(indices.ndim, lambda: indices.remainder(count), cotangents)  # indices from the end are allowed
    return Bound({"weight": (table, form)}, (indices,))


def getitem(table: Tensor, key: object) -> Bound | None:
    """``table[indices]``."""
    return _lookup(table, key) if isinstance(key, Tensor) else None


def index_select(input: Tensor, dim: int, index: Tensor) -> Bound | None:
    """``input`` at ``index`` along its first axis."""
    return _lookup(input, index) if dim in {0, -input.ndim} else None


_T: Any = torch.Tensor  # its methods
RULES: Rules = {
    F.linear: linear,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv, _T.matmul, _T.mm, _T.bmm, _T.mv), matmul),
    **dict.fromkeys((torch.addmm, torch.baddbmm, torch.addmv, _T.addmm, _T.baddbmm, _T.addmv), addmm),
    torch.einsum: einsum,
    F.bilinear: bilinear,
}
LOOKUPS: Rules = {
    F.embedding: embedding,
    _T.__getitem__: getitem,
    **dict.fromkeys((torch.index_select, _T.index_select), index_select),
}
