"""How the Jacobians of a few samples are held: factors d and a of their outer products, or the Jacobians themselves.

The Jacobian of a weight is a sum of outer products d (x) a over positions. Where it pays, the two factors are kept
instead of the product (Novak, Sohl-Dickstein, Schoenholz 2022, arXiv 2206.08720, "structured derivatives").
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def _is_finite(values: Tensor) -> Tensor:
    """Per entry of the first axis, whether all values are finite: a sum is if they are, and takes one pass."""
    finite = torch.isfinite(values.sum(dim=tuple(range(1, values.ndim))))
    if bool(finite.all()):
        return finite
    return torch.isfinite(values).flatten(1).all(dim=1)


@dataclass(frozen=True)
class Dense:
    """The Jacobians themselves.

    Attributes
    ----------
    matrix
        Shape (n, S, width); rows are sample-major, as in a tile.
    """

    matrix: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return (self.matrix,)

    def is_finite(self) -> Tensor:
        """Per sample, whether all entries are finite."""
        return _is_finite(self.matrix)

    def first(self) -> "Dense":
        """Those of the first sample."""
        return Dense(self.matrix[:1].contiguous())


@dataclass(frozen=True)
class Pairwise:
    """Jacobians sum_t d_t (x) [a_t, 1] by factors whose Gram matrices are multiplied entry by entry.

    Attributes
    ----------
    inputs
        a, shape (n, T, n_in).
    cotangents
        d, shape (S, n, T, n_out); shape (S, 1, 1, O) where they are the covectors, the same for every sample.
    has_bias
        Whether the 1 is there: the Jacobian of a bias that is used in exactly the same calls as the weight.
    is_constant
        Whether all samples have the same cotangents, which are then held once.
    """

    inputs: Tensor
    cotangents: Tensor
    has_bias: bool
    is_constant: bool

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return self.inputs, self.cotangents

    def is_finite(self) -> Tensor:
        """Per sample, whether all entries are finite."""
        return _is_finite(self.inputs) & _is_finite(self.cotangents.transpose(0, 1))

    def first(self) -> "Pairwise":
        """Those of the first sample."""
        return Pairwise(
            self.inputs[:1].contiguous(), self.cotangents[:, :1].contiguous(), self.has_bias, self.is_constant
        )


@dataclass(frozen=True)
class Late:
    """Jacobians sum_t d_t (x) a_t by factors that are multiplied out when they are contracted, a part at a time.

    Attributes
    ----------
    inputs
        a, shape (n, groups, T, n_in).
    cotangents
        d, shape (n, S, groups, T, n_out).
    """

    inputs: Tensor
    cotangents: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return self.inputs, self.cotangents

    def is_finite(self) -> Tensor:
        """Per sample, whether all entries are finite."""
        return _is_finite(self.inputs) & _is_finite(self.cotangents)

    def first(self) -> "Late":
        """Those of the first sample."""
        return Late(self.inputs[:1].contiguous(), self.cotangents[:1].contiguous())


@dataclass(frozen=True)
class Table:
    """Jacobians of a table that is looked up: d_t in row k_t.

    Attributes
    ----------
    indices
        k, shape (n, T).
    cotangents
        d, shape (S, n, T, n_out).
    """

    indices: Tensor
    cotangents: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return self.indices, self.cotangents

    def is_finite(self) -> Tensor:
        """Per sample, whether all entries are finite."""
        return _is_finite(self.cotangents.transpose(0, 1))

    def first(self) -> "Table":
        """Those of the first sample."""
        return Table(self.indices[:1].contiguous(), self.cotangents[:, :1].contiguous())


Factor = Dense | Pairwise | Late | Table


@dataclass(frozen=True)
class Piece:
    """Jacobians of a few samples; sums over its factors are sums over parameters.

    Attributes
    ----------
    num_samples, num_covectors
        n and S.
    factors
        Of groups of parameters, in the same order in every piece of an engine.
    """

    num_samples: int
    num_covectors: int
    factors: tuple[Factor, ...]

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for factor in self.factors for tensor in factor.tensors())

    def is_finite(self) -> Tensor:
        """Per sample, whether every entry is finite; shape (n,)."""
        return torch.stack([factor.is_finite().expand(self.num_samples) for factor in self.factors]).all(dim=0)

    def first(self) -> "Piece":
        """Jacobians of the first sample."""
        return Piece(1, self.num_covectors, tuple(factor.first() for factor in self.factors))
