"""Pieces: the Jacobians of a few samples by all parameters, and how they are filled."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.interface import Pulled, Representation, Setup, Term

_SMALL_WIDTH = 4096  # dense Jacobians of fewer entries share one matrix


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


class PieceFilling:
    """A piece while it is filled, batch by batch; the covectors (S, O) say in which dtype and on which device."""

    def __init__(
        self,
        terms: Sequence[Term],
        fallback: Sequence[Term],
        parameters: Mapping[str, Tensor],
        setup: Setup,
        covectors: Tensor,
        num_samples: int,
    ) -> None:
        self._num_samples, self._covectors, self._has_groups = num_samples, covectors, bool(setup.groups)
        self._filled: list[tuple[Term, Representation]] = []
        self._fallback: dict[str, Tensor] = {}
        self._factors: list[tuple[int, Representation]] = []
        groups = {term.name: [setup.group_of(name) for name in term.parameters] for term in (*terms, *fallback)}
        small = {
            term.name: term.held_as
            for term in terms
            if issubclass(term.held_as, Dense) and term.width < _SMALL_WIDTH and len(set(groups[term.name])) == 1
        }
        # The last number is that of parameters in no group: of all, where there are no groups.
        for group in range(len(setup.groups) + 1):
            own = [term for term in terms if term.name in small and groups[term.name][0] == group]
            self._filled += [(term, small[term.name](part)) for term, part in self._share(group, own)]
            left = [term for term in fallback if groups[term.name][0] == group]
            self._fallback |= {term.name: part for term, part in self._share(group, left)}
        self._fallback = {term.name: self._fallback[term.name] for term in fallback}
        for term in terms:
            if term.name in small:
                continue
            numbers, held = groups[term.name], term.held_as.empty(term, num_samples, covectors)
            self._filled.append((term, held))
            if len(set(numbers)) == 1:
                self._factors.append((numbers[0], held))
                continue
            assert isinstance(held, Dense), "only what is joined spans groups"
            parts = held.matrix.split([parameters[name].numel() for name in term.parameters], dim=2)
            self._factors += [(group, Dense(part)) for group, part in zip(numbers, parts, strict=True)]

    def _share(self, group: int, terms: Sequence[Term]) -> Iterable[tuple[Term, Tensor]]:
        """Terms of a group and their parts of the matrix (n, S, sum of widths) that they share."""
        if not terms:
            return ()
        widths = [term.width for term in terms]
        matrix = self._covectors.new_empty((self._num_samples, len(self._covectors), sum(widths)))
        self._factors.append((group, Dense(matrix)))
        return zip(terms, matrix.split(widths, dim=2), strict=True)

    def fill(self, pulled: Pulled) -> None:
        """Fill in a few covectors that were pulled back through a batch."""
        with torch.no_grad():
            for term, held in self._filled:
                held.fill(term, pulled)

    def fill_fallback(self, jacobians: Tensor, samples: slice) -> None:
        """Fill in Jacobians (n, S, P) by the parameters of the fallback, side by side."""
        widths = [target.shape[2] for target in self._fallback.values()]
        for target, part in zip(self._fallback.values(), jacobians.split(widths, dim=2), strict=True):
            target[samples] = part

    def piece(self) -> Piece:
        """The piece, once every batch is in."""
        numbers, factors = zip(*self._factors, strict=True)
        return Piece(self._num_samples, len(self._covectors), factors, numbers if self._has_groups else ())
