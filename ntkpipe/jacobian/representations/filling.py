"""A piece while it is filled batch by batch: which Jacobians share a matrix, and which are cut by group."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.interface import Pulled, Representation, Setup, Term
from ntkpipe.jacobian.representations.pieces import Piece
from ntkpipe.jacobian.tracing.recorder import Call

# Dense Jacobians of fewer entries share one matrix.
_SMALL_WIDTH = 4096


class PieceFilling:
    """Room for the Jacobians of ``num_samples`` samples by all terms, and by parameters of the fallback.

    The covectors (S, O) say in which dtype and on which device.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        fallback: Sequence[str],
        parameters: Mapping[str, Tensor],
        setup: Setup,
        covectors: Tensor,
        num_samples: int,
    ) -> None:
        self._num_samples, self._covectors, self._setup = num_samples, covectors, setup
        self._parameters = parameters
        self._filled: list[tuple[Term, Representation]] = []
        self._fallback = tuple(fallback)
        self._fallback_matrices: dict[str, Tensor] = {}
        self._factors: list[tuple[int, Representation]] = []
        # The last number is that of parameters in no group: of all, where there are no groups.
        for group in range(len(setup.groups) + 1):
            small = [term for term in terms if self._is_small(term) and self._groups_of(term)[0] == group]
            self._factors += [(group, Dense(matrix)) for matrix in self._shared(small, group)]
        self._factors += chain.from_iterable(self._own(term) for term in terms if not self._is_small(term))

    def _groups_of(self, term: Term) -> list[int]:
        return [self._setup.group_of(name) for name in term.parameters]

    def _is_small(self, term: Term) -> bool:
        is_dense = issubclass(term.held_as, Dense)
        return is_dense and term.width < _SMALL_WIDTH and len(set(self._groups_of(term))) == 1

    def _side_by_side(self, widths: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A matrix (n, S, sum of widths), and its parts."""
        matrix = self._covectors.new_empty((self._num_samples, len(self._covectors), sum(widths)))
        return matrix, matrix.split(widths, dim=2)

    def _shared(self, small: Sequence[Term], group: int) -> Iterator[Tensor]:
        """Matrices that several parameters of a group share: those of small terms, and those of the fallback."""
        if small:
            matrix, parts = self._side_by_side([term.width for term in small])
            for term, part in zip(small, parts, strict=True):
                assert issubclass(term.held_as, Dense)
                self._filled.append((term, term.held_as(part)))
            yield matrix
        names = [name for name in self._fallback if self._setup.group_of(name) == group]
        if names:
            matrix, parts = self._side_by_side([self._parameters[name].numel() for name in names])
            self._fallback_matrices |= zip(names, parts, strict=True)
            yield matrix

    def _own(self, term: Term) -> Iterator[tuple[int, Representation]]:
        """What a term holds by itself; Jacobians that span groups parameter by parameter."""
        groups, held = self._groups_of(term), term.held_as.empty(term, self._num_samples, self._covectors)
        self._filled.append((term, held))
        if len(set(groups)) == 1:
            yield groups[0], held
            return
        assert isinstance(held, Dense), "only what is joined spans groups"
        parts = held.matrix.split([self._parameters[name].numel() for name in term.parameters], dim=2)
        yield from ((group, Dense(part)) for group, part in zip(groups, parts, strict=True))

    def fill_inputs(self, calls: list[Call], samples: slice) -> None:
        """Fill in what does not depend on the covectors from a batch, which has these samples of the piece."""
        for term, held in self._filled:
            held.fill_inputs(term, calls, samples)

    def fill_cotangents(self, pulled: Pulled) -> None:
        """Fill in a few covectors that were pulled back through a batch."""
        with torch.no_grad():
            for term, held in self._filled:
                held.fill_cotangents(term, pulled)

    def fill_fallback(self, jacobians: Tensor, samples: slice) -> None:
        """Fill in Jacobians (n, S, P) by the parameters of the fallback, side by side."""
        targets = [self._fallback_matrices[name] for name in self._fallback]
        for target, part in zip(targets, jacobians.split([each.shape[2] for each in targets], dim=2), strict=True):
            target[samples] = part

    def piece(self) -> Piece:
        """The piece, once every batch is in."""
        numbers, factors = zip(*self._factors, strict=True)
        return Piece(self._num_samples, len(self._covectors), factors, numbers if self._setup.groups else ())
