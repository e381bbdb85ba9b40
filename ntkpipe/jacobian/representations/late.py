"""``late``: Jacobians much larger than their factors, multiplied out whenever they are contracted."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ntkpipe.jacobian.representations.dense import add_products
from ntkpipe.jacobian.representations.interface import Factored, Setup, Term
from ntkpipe.jacobian.representations.sums import GramSums, Workspace, cuts
from ntkpipe.jacobian.tracing.rules.form import Outer

_SHARE = 0.25  # of the contraction: what multiplying out, which is done for each pair of pieces, may cost at most
_GAIN = 2  # how many times smaller than the Jacobians the factors must be
_OUTPUTS = 16  # whose Jacobians are multiplied out at a time, at least, with up to twice the scratch for that


@dataclass(frozen=True)
class Late(Factored):
    """Jacobians sum_t d_t (x) a_t by factors that are multiplied out for a few outputs at a time."""

    inputs: Tensor  # a, shape (n, groups, T, n_in)
    cotangents: Tensor  # d, shape (n, S, groups, T, n_out)

    word: ClassVar[str] = "late"
    meaning: ClassVar[str] = "a and d as well, multiplied out a part at a time, whenever they are contracted"
    sample_axes: ClassVar[tuple[int, ...]] = (0, 0)

    @classmethod
    def suits(cls, term: Term, setup: Setup) -> bool:
        """Jacobians that are larger than their factors, where multiplying out adds little or memory is short."""
        first, covectors = term.uses[0], setup.num_covectors
        if first.kind != Outer.kind:
            return False
        positions, width = term.num_positions, first.groups * first.n_in * first.n_out
        factors = positions * first.groups * (first.n_in + covectors * first.n_out)
        if factors * _GAIN > covectors * width:
            return False
        rows = setup.num_samples * (covectors if setup.pairs == "all" else 1)
        share = 2.0 * positions / setup.piece_rows if rows > setup.piece_rows else 0.0
        return share <= _SHARE or width * covectors * 4.0 * setup.num_samples > setup.memory_bytes

    @classmethod
    def pair_flops(cls, term: Term, setup: Setup) -> float:
        """Operations that include multiplying out: two pieces of n samples for n^2 pairs."""
        at_a_time = max(1, min(setup.num_samples, setup.piece_rows // setup.num_covectors))
        return super().pair_flops(term, setup) + 2.0 * cls.sample_flops(term, setup.num_covectors) / at_a_time

    @classmethod
    def empty(cls, term: Term, num_samples: int, covectors: Tensor) -> "Late":
        """Room for the factors at all positions."""
        first, positions = term.uses[0], term.num_positions
        inputs = covectors.new_empty((num_samples, first.groups, positions, first.n_in))
        shape = (num_samples, len(covectors), first.groups, positions, first.n_out)
        return cls(inputs, covectors.new_empty(shape))

    def _by_position(self) -> tuple[Tensor, Tensor]:
        return self.inputs.transpose(1, 2), self.cotangents.permute(1, 0, 3, 2, 4)

    def add_gram(self, other: "Late", sums: GramSums) -> None:
        """Multiply out the Jacobians of a few outputs at a time, then multiply rows."""
        groups, n_in, n_out = self.inputs.shape[1], self.inputs.shape[3], self.cotangents.shape[4]
        output_bytes = max(sums.rows, sums.columns) * sums.covectors * n_in * self.inputs.element_size()
        most = sums.sizes.late_bytes
        few = min(_OUTPUTS, 2 * most // output_bytes)
        for group in range(groups):
            for outputs in cuts(0, n_out, max(1, few, most // output_bytes)):
                left = self._multiplied("left", group, outputs, sums.workspace)
                right = left if sums.is_mirrored else other._multiplied("right", group, outputs, sums.workspace)
                add_products(left, right, sums)

    def _multiplied(self, name: str, group: int, outputs: slice, workspace: Workspace) -> Tensor:
        a, d = self.inputs[:, group], self.cotangents[:, :, group, :, outputs]
        num_samples, covectors, positions, n_out = d.shape
        rows = d.transpose(1, 2).reshape(num_samples, positions, covectors * n_out)
        target = workspace.take(name, (num_samples, covectors * n_out, a.shape[2]), a)
        torch.bmm(rows.transpose(1, 2), a, out=target)
        return target.view(num_samples, covectors, -1)

    def _grouped_cotangents(self, samples: slice) -> Tensor:
        return self.cotangents[samples].double()

    def _input_gram(self, samples: slice) -> Tensor:
        a = self.inputs[samples].double()
        return a @ a.transpose(2, 3)
