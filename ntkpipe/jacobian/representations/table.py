"""``table``: indices and cotangents of a table that is looked up; no Jacobian of the table's size exists."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from ntkpipe.jacobian.model.device import add_rows
from ntkpipe.jacobian.representations.interface import Factored, Setup, Term
from ntkpipe.jacobian.representations.sums import GramSums
from ntkpipe.jacobian.tracing.rules.form import Lookup

_GAIN = 4  # contracting a table, row by row, costs about as much as the product of so many times as many rows


@dataclass(frozen=True)
class LookupTable(Factored):
    """Jacobians of a table that is looked up: d_t in row k_t."""

    indices: Tensor  # k, shape (n, T)
    cotangents: Tensor  # d, shape (S, n, T, n_out)

    word: ClassVar[str] = "table"
    meaning: ClassVar[str] = "indices and cotangents; only samples that look up the same index meet"
    num_additions: ClassVar[float] = inf  # one for each index, of which there may be thousands

    @classmethod
    def suits(cls, term: Term, setup: Setup) -> bool:
        """Tables much longer than what a sample looks up."""
        first = term.uses[0]
        return first.kind == Lookup.kind and first.shape[0] > _GAIN * term.num_positions

    @classmethod
    def pair_flops(cls, term: Term, setup: Setup) -> float:
        """Only positions with the same index meet; few do."""
        return 2.0 * setup.num_pairs * term.num_positions * term.uses[0].n_out

    @classmethod
    def empty(cls, term: Term, num_samples: int, covectors: Tensor) -> "LookupTable":
        """Room for indices and cotangents at all positions."""
        positions, width = term.num_positions, term.uses[0].n_out
        indices = torch.empty((num_samples, positions), dtype=torch.int64, device=covectors.device)
        return cls(indices, covectors.new_empty((len(covectors), num_samples, positions, width)))

    def add_gram(self, other: "LookupTable", sums: GramSums) -> None:
        """Index by index: the samples on either side that look it up, and the products of their summed cotangents."""
        target, ones, others = sums.blocks(), self._by_index(), other._by_index()
        high = torch.arange(sums.covectors, device=target.device)
        for index in sorted(ones.keys() & others.keys()):
            (rows, d), (columns, e) = ones[index], others[index]
            if sums.pairs == "all":
                found = (d.flatten(0, 1) @ e.flatten(0, 1).T).view(len(d), len(rows), len(e), len(columns))
                target[high[:, None, None, None], rows[:, None, None], high[:, None], columns] += found
            elif sums.pairs == "same":
                target[high[:, None, None], rows[:, None], 0, columns] += d @ e.transpose(1, 2)
            else:
                target[0, rows[:, None], 0, columns] += (d @ e.transpose(1, 2)).sum(dim=0)

    def _by_index(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Index → the samples that have it, and their cotangents (S, samples, n_out), repeated ones added up."""
        num_samples, positions = self.indices.shape
        covectors, _, _, width = self.cotangents.shape
        sample = torch.arange(num_samples, device=self.indices.device).repeat_interleave(positions)
        keys, inverse = torch.unique(torch.stack([self.indices.reshape(-1), sample]), dim=1, return_inverse=True)
        summed = self.cotangents.new_zeros((covectors, keys.shape[1], width))
        add_rows(summed, 1, inverse, self.cotangents.reshape(covectors, -1, width))
        # One wait for a GPU, not one for each list.
        indices, counts = torch.stack(torch.unique_consecutive(keys[0], return_counts=True)).tolist()
        parts = zip(indices, keys[1].split(counts), summed.split(counts, dim=1), strict=True)
        return {index: (rows, d) for index, rows, d in parts}

    def _input_gram(self, samples: slice) -> Tensor:
        indices = self.indices[samples]
        return (indices[:, :, None] == indices[:, None, :]).double()[:, None]
