"""What representations by factors have in common: inputs a and cotangents d are held position by position.

The Jacobian of a weight is a sum of outer products d (x) a over positions. Where it pays, the two factors are kept
instead of the product (Novak, Sohl-Dickstein, Schoenholz 2022, arXiv 2206.08720, "structured derivatives").
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ntkpipe.jacobian.model.device import sizes_of
from ntkpipe.jacobian.representations.interface import Pulled, Representation, Term
from ntkpipe.jacobian.representations.sums import copy_merged, cuts


class Factored(Representation):
    """Inputs, the first field of a subclass, by sample, and cotangents; covector-major unless it says otherwise."""

    cotangents: Tensor  # a field of each subclass; d, shape (S, n, T, n_out)
    sample_axes: ClassVar[tuple[int, ...]] = (0, 1)

    def fill(self, term: Term, pulled: Pulled) -> None:
        """Copy the factors of every use; cotangents are zero where nothing flows back."""
        samples, (inputs, cotangents) = pulled.samples, self._by_position()
        size = samples.stop - samples.start
        stop = 0
        for use in term.uses:
            start, stop = stop, stop + use.num_positions
            call, grads = pulled.calls[use.call], pulled.grads.get(use.call)
            if pulled.covectors.start == 0:
                copy_merged(inputs[samples, start:stop], use.inputs(call, size))
            if term.is_constant:
                continue
            for number in range(pulled.covectors.start, pulled.covectors.stop):
                target = cotangents[number, samples, start:stop]
                if grads is None:
                    target.zero_()
                else:
                    copy_merged(target, use.cotangents(call, grads[number - pulled.covectors.start], size))

    def _by_position(self) -> tuple[Tensor, Tensor]:
        """Views of inputs (n, T, …) and cotangents (S, n, T, …)."""
        return self.tensors()[0], self.cotangents

    def diagonal(self, *, is_all: bool) -> Tensor:
        """From Gram matrices of positions, for so few samples at a time that float64 copies stay small."""
        inputs = self.tensors()[0]
        per_sample = 2 * (sum(tensor.numel() for tensor in self.tensors()) // len(inputs))
        per_sample += self._input_gram(slice(0, 1)).numel()
        found = []
        for samples in cuts(0, len(inputs), max(1, sizes_of(inputs.device).late_bytes // (8 * per_sample))):
            d, gram = self._grouped_cotangents(samples), self._input_gram(samples)
            other = gram[:, None] @ d
            found.append(
                d.flatten(2) @ other.flatten(2).transpose(1, 2) if is_all else (d * other).flatten(2).sum(dim=2)
            )
        return torch.cat(found)

    def _grouped_cotangents(self, samples: slice) -> Tensor:
        """Cotangents in float64, shape (n, S, groups, T, n_out)."""
        cotangents = self.cotangents.expand(-1, len(self.tensors()[0]), -1, -1)
        return cotangents[:, samples].double().transpose(0, 1)[:, :, None]

    @abstractmethod
    def _input_gram(self, samples: slice) -> Tensor:
        """Products of each sample's inputs at all pairs of positions, in float64; shape (n, groups, T, T)."""
