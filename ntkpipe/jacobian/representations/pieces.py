"""Pieces: the Jacobians of a few samples by all parameters."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkpipe.jacobian.representations.interface import Representation


@dataclass(frozen=True)
class Piece:
    """Jacobians of a few samples; sums over its factors are sums over parameters."""

    num_samples: int  # n
    num_covectors: int  # S
    factors: tuple[Representation, ...]  # each by some parameters, in the same order in every piece of an engine
    # For each factor, the number of the group that its parameters are in, with one more number for those in none;
    # empty if there are no groups
    groups: tuple[int, ...] = ()

    @property
    def like(self) -> Tensor:
        """Some tensor, whose dtype and device are those of the piece."""
        return self.factors[0].tensors()[-1]

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for factor in self.factors for tensor in factor.tensors())

    def is_finite(self) -> Tensor:
        """Per sample, whether every entry is finite; shape (n,)."""
        return self._all(lambda values: torch.isfinite(values).flatten(1).all(dim=1))

    def has_finite_sums(self) -> Tensor:
        """As :meth:`is_finite` in one pass, by sums; it may say no where a sum of finite entries overflows."""
        return self._all(lambda values: torch.isfinite(values.sum(dim=tuple(range(1, values.ndim)))))

    def _all(self, check: Callable[[Tensor], Tensor]) -> Tensor:
        found = [check(values) for factor in self.factors for values in factor.by_sample()]
        return torch.stack([each.expand(self.num_samples) for each in found]).all(dim=0)

    def part(self, start: int, stop: int) -> "Piece":
        """Jacobians of samples ``start:stop`` of the piece, as views."""
        factors = tuple(factor.part(slice(start, stop)) for factor in self.factors)
        return Piece(stop - start, self.num_covectors, factors, self.groups)

    def first(self) -> "Piece":
        """Jacobians of the first sample."""
        return Piece(1, self.num_covectors, tuple(factor.first() for factor in self.factors), self.groups)

    def of_group(self, number: int) -> "Piece":
        """Jacobians by the parameters of one group alone, as views; no factors if the outputs depend on none."""
        factors = tuple(f for f, group in zip(self.factors, self.groups, strict=True) if group == number)
        return Piece(self.num_samples, self.num_covectors, factors)
