"""How Jacobians are held, and how two of them are contracted to Gram entries.

The Jacobian of a weight is a sum of outer products d (x) a over positions. Where it pays, the two factors are kept
instead of the product (Novak, Sohl-Dickstein, Schoenholz 2022, arXiv 2206.08720, "structured derivatives"): with one
position the Gram matrix is (A A') o (D D'), n_in + n_out multiplications a pair instead of n_in * n_out.

Everything here is covector-major, (covector, sample), since its matrix products then run over contiguous memory; the
caller turns finished pieces sample-major.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Elementwise passes run at memory speed; one of them costs about as much as this many multiplications of a product.
_ELEMENTWISE_FLOPS = 16.0
# Terms of a float32 sum that are left to the matrix product.
_LONGEST_SUM = 4096
# Pairs of positions whose products are added up in the blocks' own dtype.
_MANY_TERMS = 16


@dataclass(frozen=True)
class Outer:
    """Jacobians sum_t d_t (x) [a_t, 1] by their factors.

    Attributes
    ----------
    inputs
        a, shape (T, n, n_in); none if the weight is not selected and only the bias is.
    cotangents
        d, shape (T, S, n, n_out).
    has_bias
        Whether the 1 is there: the Jacobian of a bias that is used in exactly the same calls as the weight.
    """

    inputs: Tensor
    cotangents: Tensor
    has_bias: bool


@dataclass(frozen=True)
class Piece:
    """Jacobians of a few samples: factors, and what is kept dense in one matrix.

    Attributes
    ----------
    num_samples
        Samples n of the piece.
    outers
        Factored layers.
    dense
        Everything else side by side, shape (S, n, P); P may be zero.
    """

    num_samples: int
    outers: tuple[Outer, ...]
    dense: Tensor

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [self.dense, *(t for outer in self.outers for t in (outer.inputs, outer.cotangents))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def is_finite(self) -> Tensor:
        """Per sample, whether every entry is finite; shape (n,)."""
        finite = torch.isfinite(self.dense).all(dim=2).all(dim=0)
        for outer in self.outers:
            finite &= torch.isfinite(outer.inputs).all(dim=2).all(dim=0)
            finite &= torch.isfinite(outer.cotangents).all(dim=3).all(dim=1).all(dim=0)
        return finite


class Workspace:
    """Scratch tensors that are allocated once and reused: fresh pages for each product cost more than the product."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A contiguous (rows, columns) tensor of the dtype and device of ``like``; its content is undefined."""
        rows, columns = shape
        flat = self._tensors.get(name)
        if flat is None or flat.numel() < rows * columns or flat.dtype != like.dtype or flat.device != like.device:
            flat = self._tensors[name] = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
        return flat[: rows * columns].view(rows, columns)


def is_factored_cheaper(num_positions: int, n_in: int, n_out: int, num_covectors: int) -> bool:
    """Whether keeping a layer's factors costs less per pair of samples than keeping its Jacobian.

    Factored, each pair of positions takes n_in + S^2 n_out multiplications and one elementwise pass over S^2 entries;
    the dense Jacobian takes S^2 n_in n_out.
    """
    squared = num_covectors**2
    factored = num_positions**2 * (n_in + squared * (n_out + _ELEMENTWISE_FLOPS))
    return factored <= squared * n_in * n_out


def pair_flops(outer: Outer) -> float:
    """Floating-point operations of one pair of samples."""
    positions, covectors, _, n_out = outer.cotangents.shape
    return positions**2 * (2.0 * outer.inputs.shape[2] + 2.0 * covectors**2 * n_out + 2.0 * covectors**2)


def contract(left: Piece, right: Piece, workspace: Workspace) -> Tensor:
    """Gram entries of two pieces, ``sum_p J[c, a, p] J[d, b, p]``.

    Returns
    -------
    Shape (S*n_left, S*n_right), covector-major on both sides, in the pieces' dtype. It lives in the workspace and is
    overwritten by the next call.
    """
    covectors = left.dense.shape[0]
    shape = (covectors * left.num_samples, covectors * right.num_samples)
    total = workspace.take("total", shape, like=left.dense)
    _set_dense(total, left.dense.flatten(0, 1), right.dense.flatten(0, 1), workspace)
    for one, other in zip(left.outers, right.outers, strict=True):
        _add_outer(total, one, other, workspace)
    return total


def _set_dense(total: Tensor, left: Tensor, right: Tensor, workspace: Workspace) -> None:
    """``total = left @ right.T`` with long sums cut into parts that are added up in float64.

    A float32 product over a million parameters is off by 1e-5 on the diagonal, where all terms are positive.
    """
    length = left.shape[1]
    if length <= _LONGEST_SUM or total.dtype == torch.float64:
        torch.mm(left, right.T, out=total)
        return
    part = workspace.take("part", total.shape, like=total)
    exact = workspace.take("exact", total.shape, like=total.new_empty(0, dtype=torch.float64)).zero_()
    for start in range(0, length, _LONGEST_SUM):
        stop = start + _LONGEST_SUM
        exact += torch.mm(left[:, start:stop], right[:, start:stop].T, out=part)
    total.copy_(exact)


def _add_outer(total: Tensor, left: Outer, right: Outer, workspace: Workspace) -> None:
    """Add ``sum_tu (a_t a'_u + 1)(d_t d'_u)``: one pair of products for each pair of positions."""
    num_left, num_right = left.inputs.shape[1], right.inputs.shape[1]
    covectors = left.cotangents.shape[1]
    inputs = workspace.take("inputs", (num_left, num_right), like=total)
    # Many float32 terms are added up in float64, as in _set_dense.
    is_long = left.inputs.shape[0] * right.inputs.shape[0] > _MANY_TERMS and total.dtype != torch.float64
    if is_long:
        exact = workspace.take("exact", total.shape, like=total.new_empty(0, dtype=torch.float64)).copy_(total)
    cotangents = workspace.take("cotangents", total.shape, like=total)
    view = (covectors, num_left, covectors, num_right)
    for a, d in zip(left.inputs, left.cotangents, strict=True):
        for b, e in zip(right.inputs, right.cotangents, strict=True):
            torch.mm(a, b.T, out=inputs)
            if left.has_bias:
                inputs += 1.0
            torch.mm(d.reshape(total.shape[0], -1), e.reshape(total.shape[1], -1).T, out=cotangents)
            if is_long:
                cotangents.view(view).mul_(inputs[None, :, None, :])
                exact += cotangents
            else:
                total.view(view).addcmul_(cotangents.view(view), inputs[None, :, None, :])
    if is_long:
        total.copy_(exact)


def contract_diagonal(piece: Piece) -> Tensor:
    """Gram entries of each sample with itself, shape (n, S, S)."""
    by_sample = piece.dense.transpose(0, 1)
    total = by_sample @ by_sample.transpose(1, 2)
    for outer in piece.outers:
        for a, d in zip(outer.inputs, outer.cotangents, strict=True):
            for b, e in zip(outer.inputs, outer.cotangents, strict=True):
                inputs = (a * b).sum(dim=1) + float(outer.has_bias)
                total += inputs[:, None, None] * (d.transpose(0, 1) @ e.permute(1, 2, 0))
    return total


def materialize(inputs: Tensor, cotangents: Tensor, has_bias: bool) -> Tensor:
    """The Jacobians sum_t d_t (x) [a_t, 1] themselves, shape (S, n, n_out * (n_in + has_bias)).

    Parameters
    ----------
    inputs, cotangents, has_bias
        As in :class:`Outer`.
    """
    _, covectors, num_samples, _ = cotangents.shape
    a = inputs.permute(1, 0, 2)
    rows = torch.stack([d.permute(1, 2, 0) @ a for d in cotangents.transpose(0, 1)])
    flat = rows.reshape(covectors, num_samples, -1)
    return torch.cat([flat, cotangents.sum(dim=0)], dim=2) if has_bias else flat
