"""Pieces: the Jacobians of a few samples by all parameters; how two become Gram entries."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkpipe.jacobian.model.device import sizes_of, without_tf32
from ntkpipe.jacobian.representations.interface import Representation
from ntkpipe.jacobian.representations.sums import GramSums, Pairs, Workspace, cuts

_FEW = 8  # products of Gram matrices that are added up in their own dtype; more of them in float64


@dataclass(frozen=True)
class Piece:
    """Jacobians of a few samples; sums over its factors are sums over parameters."""

    num_samples: int  # n
    num_covectors: int  # S
    factors: tuple[Representation, ...]  # each by some parameters, in the same order in every piece of an engine
    groups: tuple[int, ...] = ()  # number of each factor's group, one more for those in none; empty without groups

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
        """The same in one pass, by sums; it may say no where a sum of finite entries overflows."""
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


def contract(left: Piece, right: Piece, workspace: Workspace, pairs: Pairs = "all") -> Tensor:
    """Gram entries of two pieces, ``sum_p J[a, c, p] J[b, d, p]``; float32 ones by true float32 products."""
    count, rows, columns = left.num_covectors, left.num_samples, right.num_samples
    shape = {"all": (count * rows, count * columns), "same": (count, rows, columns), "sum": (rows, columns)}[pairs]
    out = left.like.new_empty(shape)
    contract_planes(left, right, workspace, pairs, list(out) if pairs == "same" else [out])
    return out


def contract_planes(left: Piece, right: Piece, workspace: Workspace, pairs: Pairs, outs: Sequence[Tensor]) -> None:
    """Do as :func:`contract` for every plane at once: by all parameters, and by each group of them."""
    # Factors are contracted once, group by group; the entries by all parameters are the sum, added up in float64.
    apart = left.num_covectors if pairs == "same" else 1
    whole, *groups = (outs[start : start + apart] for start in range(0, len(outs), apart))
    with without_tf32(left.like.device):
        if not groups:
            _spread(_added_up(left, right, workspace, pairs).apart(), whole)
            return
        total = None
        for number in sorted({*left.groups, *range(len(groups))}):
            one = left.of_group(number)
            other = one if right is left else right.of_group(number)
            if not one.factors:
                for out in groups[number]:
                    out.zero_()
                continue
            found = _added_up(one, other, workspace, pairs).apart()
            is_first = total is None
            if total is None:
                total = workspace.take("planes", found.shape, found, torch.float64)
            _spread(found, groups[number] if number < len(groups) else None, total, is_first=is_first)
        assert total is not None
        _spread(total, whole)


def _added_up(left: Piece, right: Piece, workspace: Workspace, pairs: Pairs) -> GramSums:
    is_long = sum(factor.num_additions for factor in left.factors) > _FEW
    sizes = left.num_samples, right.num_samples, left.num_covectors
    sums = GramSums(*sizes, pairs, left.like, workspace, is_mirrored=left is right, is_long=is_long)
    for one, other in zip(left.factors, right.factors, strict=True):
        one.add_gram(other, sums)
    return sums


def _spread(
    found: Tensor, outs: Sequence[Tensor] | None, total: Tensor | None = None, *, is_first: bool = False
) -> None:
    """Copy sums (k, n, S, m, S) to k tensors, add them to ``total`` or begin it, a few rows at a time: in the cache."""
    entries = sizes_of(found.device).unfolded_bytes // 8
    for number, values in enumerate(found):
        size, covectors, width, _ = values.shape
        for rows in cuts(0, size, max(1, entries // (covectors * width * covectors))):
            part = values[rows]
            if outs is not None:
                place = outs[number].unflatten(1, (width, covectors)).unflatten(0, (size, covectors))[rows]
                place.copy_(part)
                # Where that lost nothing, the entries are now in order.
                part = place if place.dtype in {part.dtype, torch.float64} else part
            if total is not None:
                place = total[number, rows]
                place.copy_(part) if is_first else place.add_(part)


def contract_diagonal_planes(piece: Piece, pairs: Pairs, num_planes: int) -> list[Tensor]:
    """Entries of each sample with itself, plane by plane, in the piece's dtype; sums over parameters are float64."""
    with without_tf32(piece.like.device):
        by_factor = torch.stack([factor.diagonal(is_all=pairs == "all") for factor in piece.factors])
    groups = torch.tensor(piece.groups)
    num_groups = num_planes // (piece.num_covectors if pairs == "same" else 1) - 1
    parts = [by_factor, *(by_factor[groups == number] for number in range(num_groups))]
    found = [part.sum(dim=0) for part in parts]
    if pairs == "same":
        found = [total[:, covector, None, None] for total in found for covector in range(piece.num_covectors)]
    elif pairs == "sum":
        found = [total.sum(dim=1)[:, None, None] for total in found]
    return [values.to(piece.like.dtype) for values in found]
