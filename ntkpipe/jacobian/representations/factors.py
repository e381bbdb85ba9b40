"""How the Jacobians of a few samples are held: factors d and a of their outer products, or the Jacobians themselves.

The Jacobian of a weight is a sum of outer products d (x) a over positions. Where it pays, the two factors are kept
instead of the product (Novak, Sohl-Dickstein, Schoenholz 2022, arXiv 2206.08720, "structured derivatives").
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def _is_finite(values: Tensor) -> Tensor:
    """Per entry of the first axis, whether all values are finite."""
    return torch.isfinite(values).flatten(1).all(dim=1)


def _has_finite_sum(values: Tensor) -> Tensor:
    """Per entry of the first axis, whether the sum of all values is finite: then they are, and it takes one pass."""
    return torch.isfinite(values.sum(dim=tuple(range(1, values.ndim))))


@dataclass(frozen=True)
class Dense:
    """The Jacobians themselves."""

    matrix: Tensor  # shape (n, S, width); rows are sample-major, as in a tile

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return (self.matrix,)

    def by_sample(self) -> tuple[Tensor, ...]:
        """What has to be finite, first axis the sample."""
        return (self.matrix,)

    def part(self, samples: slice) -> "Dense":
        """Those of some samples, a view."""
        return Dense(self.matrix[samples])

    def first(self) -> "Dense":
        """Those of the first sample."""
        return Dense(self.matrix[:1].contiguous())


@dataclass(frozen=True)
class Pairwise:
    """Jacobians sum_t d_t (x) [a_t, 1] by factors whose Gram matrices are multiplied entry by entry."""

    inputs: Tensor  # a, shape (n, T, n_in)
    # D, shape (S, n, T, n_out); shape (S, 1, 1, O) where they are the covectors, the same for every sample
    cotangents: Tensor
    # Whether the 1 is there: the Jacobian of a bias that is used in exactly the same calls as the weight
    has_bias: bool
    is_constant: bool  # whether all samples have the same cotangents, which are then held once

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return self.inputs, self.cotangents

    def by_sample(self) -> tuple[Tensor, ...]:
        """What has to be finite, first axis the sample; of length one where it is the same for all."""
        return self.inputs, self.cotangents.transpose(0, 1)

    @cached_property
    def covectors(self) -> Tensor:
        """Constant cotangents (S, O) on the host, fetched once."""
        return self.cotangents[:, 0, 0].cpu()

    def part(self, samples: slice) -> "Pairwise":
        """Those of some samples, views."""
        cotangents = self.cotangents if self.is_constant else self.cotangents[:, samples]
        return Pairwise(self.inputs[samples], cotangents, self.has_bias, self.is_constant)

    def first(self) -> "Pairwise":
        """Those of the first sample."""
        return Pairwise(
            self.inputs[:1].contiguous(), self.cotangents[:, :1].contiguous(), self.has_bias, self.is_constant
        )


@dataclass(frozen=True)
class Late:
    """Jacobians sum_t d_t (x) a_t by factors that are multiplied out when they are contracted, a part at a time."""

    inputs: Tensor  # a, shape (n, groups, T, n_in)
    cotangents: Tensor  # d, shape (n, S, groups, T, n_out)

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return self.inputs, self.cotangents

    def by_sample(self) -> tuple[Tensor, ...]:
        """What has to be finite, first axis the sample."""
        return self.inputs, self.cotangents

    def part(self, samples: slice) -> "Late":
        """Those of some samples, views."""
        return Late(self.inputs[samples], self.cotangents[samples])

    def first(self) -> "Late":
        """Those of the first sample."""
        return Late(self.inputs[:1].contiguous(), self.cotangents[:1].contiguous())


@dataclass(frozen=True)
class Table:
    """Jacobians of a table that is looked up: d_t in row k_t."""

    indices: Tensor  # k, shape (n, T)
    cotangents: Tensor  # d, shape (S, n, T, n_out)

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return self.indices, self.cotangents

    def by_sample(self) -> tuple[Tensor, ...]:
        """What has to be finite, first axis the sample."""
        return (self.cotangents.transpose(0, 1),)

    def part(self, samples: slice) -> "Table":
        """Those of some samples, views."""
        return Table(self.indices[samples], self.cotangents[:, samples])

    def first(self) -> "Table":
        """Those of the first sample."""
        return Table(self.indices[:1].contiguous(), self.cotangents[:, :1].contiguous())


Factor = Dense | Pairwise | Late | Table


@dataclass(frozen=True)
class Piece:
    """Jacobians of a few samples; sums over its factors are sums over parameters."""

    num_samples: int  # num_samples, num_covectors: n and S
    num_covectors: int
    factors: tuple[Factor, ...]  # of some parameters each, in the same order in every piece of an engine
    # For each factor, the number of the group that its parameters are in, with one more number for those in none;
    # empty if there are no groups
    groups: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.factors[0].tensors()[0].device

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for factor in self.factors for tensor in factor.tensors())

    def is_finite(self) -> Tensor:
        """Per sample, whether every entry is finite; shape (n,)."""
        return self._all([_is_finite(values) for factor in self.factors for values in factor.by_sample()])

    def has_finite_sums(self) -> Tensor:
        """As :meth:`is_finite` in one pass; it may say no where a sum of finite entries overflows."""
        return self._all([_has_finite_sum(values) for factor in self.factors for values in factor.by_sample()])

    def _all(self, found: list[Tensor]) -> Tensor:
        return torch.stack([each.expand(self.num_samples) for each in found]).all(dim=0)

    def part(self, start: int, stop: int) -> "Piece":
        """Jacobians of samples ``start:stop`` of the piece, views."""
        samples = slice(start, stop)
        factors = tuple(factor.part(samples) for factor in self.factors)
        return Piece(stop - start, self.num_covectors, factors, self.groups)

    def first(self) -> "Piece":
        """Jacobians of the first sample."""
        return Piece(1, self.num_covectors, tuple(factor.first() for factor in self.factors), self.groups)

    def of_group(self, number: int) -> "Piece":
        """Jacobians by the parameters of one group alone, views; without factors if the outputs depend on none."""
        factors = tuple(f for f, group in zip(self.factors, self.groups, strict=True) if group == number)
        return Piece(self.num_samples, self.num_covectors, factors)
