"""Reading rows of a table: embedding, indexing, index_select."""

# ruff: noqa: A002 - arguments are named as in torch

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ntkpipe.jacobian.tracing.rules.form import Bound, Lookup, Rules


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
    F.embedding: embedding,
    _T.__getitem__: getitem,
    **dict.fromkeys((torch.index_select, _T.index_select), index_select),
}
