"""What representations by factors have in common: inputs a and cotangents d are held position by position.

The Jacobian of a weight is a sum of outer products d (x) a over positions. Where it pays, the two factors are kept
instead of the product (Novak, Sohl-Dickstein, Schoenholz 2022, arXiv 2206.08720, "structured derivatives").
"""

from abc import abstractmethod
from collections.abc import Iterator

from torch import Tensor

from ntkpipe.jacobian.model.device import sizes_of
from ntkpipe.jacobian.representations.interface import Pulled, Representation, Term, count
from ntkpipe.jacobian.representations.workspace import copy_merged
from ntkpipe.jacobian.tracing.recorder import Call
from ntkpipe.jacobian.tracing.uses import Use


class Factored(Representation):
    """Inputs, the first field of a subclass, by sample, and cotangents; covector-major unless it says otherwise."""

    cotangents: Tensor  # a field of each subclass; d, shape (S, n, T, n_out)

    def fill_inputs(self, term: Term, calls: list[Call], samples: slice) -> None:
        """Copy the inputs of every use."""
        for use, positions in _places(term):
            copy_merged(self._inputs_at(samples, positions), use.inputs(calls[use.call], count(samples)))

    def fill_cotangents(self, term: Term, pulled: Pulled) -> None:
        """Copy the cotangents of every use, zeros where nothing flows back."""
        calls, covectors, samples = pulled.calls, pulled.covectors, pulled.samples
        for use, positions in _places(term):
            grads = pulled.grads.get(use.call)
            for number in range(covectors.start, covectors.stop):
                target = self._cotangents_at(number, samples, positions)
                if grads is None:
                    target.zero_()
                else:
                    grad = grads[number - covectors.start]
                    copy_merged(target, use.cotangents(calls[use.call], grad, len(target)))

    def _inputs_at(self, samples: slice, positions: slice) -> Tensor:
        """A view, with the axes of :meth:`Use.inputs`, some merged."""
        return self.tensors()[0][samples, positions]

    def _cotangents_at(self, covector: int, samples: slice, positions: slice) -> Tensor:
        """A view, with the axes of :meth:`Use.cotangents`, some merged."""
        return self.cotangents[covector, samples, positions]

    def _groups_and_positions(self) -> tuple[int, int]:
        return 1, self.tensors()[0].shape[1]

    def samples_at_once(self) -> int:
        """Factors, cotangents once more, and Gram matrices of positions in float64 stay small."""
        inputs, (groups, positions) = self.tensors()[0], self._groups_and_positions()
        per_sample = sum(tensor.numel() for tensor in self.tensors()) // len(inputs)
        return max(1, sizes_of(inputs.device).late_bytes // (8 * (2 * per_sample + groups * positions**2)))

    def diagonal(self, samples: slice, *, is_all: bool) -> Tensor:
        """By Gram matrices of positions."""
        d, gram = self._grouped_cotangents(samples), self._input_gram(samples)
        other = gram[:, None] @ d
        return d.flatten(2) @ other.flatten(2).transpose(1, 2) if is_all else (d * other).flatten(2).sum(dim=2)

    def _grouped_cotangents(self, samples: slice) -> Tensor:
        """Cotangents in float64, shape (n, S, groups, T, n_out)."""
        cotangents = self.cotangents.expand(-1, len(self.tensors()[0]), -1, -1)
        return cotangents[:, samples].double().transpose(0, 1)[:, :, None]

    @abstractmethod
    def _input_gram(self, samples: slice) -> Tensor:
        """Products of each sample's inputs at all pairs of positions, in float64; shape (n, groups, T, T)."""


def _places(term: Term) -> Iterator[tuple[Use, slice]]:
    """The uses of a term, and their positions among all of its positions."""
    start = 0
    for use in term.uses:
        yield use, slice(start, start + use.num_positions)
        start += use.num_positions
