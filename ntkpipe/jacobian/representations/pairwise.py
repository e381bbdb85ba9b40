"""``pairwise``: inputs and cotangents of every position, whose Gram matrices are multiplied entry by entry."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ntkpipe.jacobian.representations.interface import Factored, Setup, Term
from ntkpipe.jacobian.representations.sums import GramSums
from ntkpipe.jacobian.tracing.rules.form import Outer


@dataclass(frozen=True)
class Pairwise(Factored):
    """Jacobians sum_t d_t (x) [a_t, 1]; the 1 is the Jacobian of a bias."""

    inputs: Tensor  # a, shape (n, T, n_in)
    cotangents: Tensor  # d, shape (S, n, T, n_out), or (S, 1, 1, O): the covectors, the same for every sample
    has_bias: bool  # whether the 1 is there: for a bias that is used in exactly the same calls as the weight
    is_constant: bool  # whether all samples have the same cotangents, which are then held once

    word: ClassVar[str] = "pairwise"
    meaning: ClassVar[str] = "inputs a and cotangents d of every position; Gram entries are sums of (a·a′)(d·d′)"
    num_additions: ClassVar[float] = 1
    takes_bias: ClassVar[bool] = True
    can_be_constant: ClassVar[bool] = True

    @classmethod
    def suits(cls, term: Term, setup: Setup) -> bool:
        """Whether it takes less time than the Jacobians themselves."""
        # Each pair of positions takes n_in + S^2 n_out multiplications and an elementwise pass over S^2 entries; the
        # Jacobian itself takes S^2 n_in n_out for a pair of samples, and S T n_in n_out once for each sample.
        first, rates = term.uses[0], setup.rates
        if first.kind != Outer.kind or first.groups != 1:
            return False
        positions, squared, width = term.num_positions, setup.num_pairs, first.n_in * first.n_out
        once = 2.0 * setup.num_covectors * positions * width / rates.product  # to multiply out one sample
        per_pair = positions**2 * (2.0 * (first.n_in + squared * first.n_out) / rates.product)
        per_pair += positions**2 * squared / rates.elementwise
        return per_pair <= 2.0 * squared * width / rates.product + 2.0 * once / max(1, setup.num_samples)

    @classmethod
    def pair_flops(cls, term: Term, setup: Setup) -> float:
        """Operations for all pairs of positions."""
        first = term.uses[0]
        cotangents = 0 if term.is_constant else setup.num_pairs * (first.n_out + 1)
        return 2.0 * term.num_positions**2 * (first.n_in + cotangents)

    @classmethod
    def sample_flops(cls, term: Term, num_covectors: int) -> float:
        """Nothing is multiplied out."""
        return 0.0

    @classmethod
    def empty(cls, term: Term, num_samples: int, covectors: Tensor) -> "Pairwise":
        """Room for the factors at all positions; constant cotangents are there already."""
        first, positions = term.uses[0], term.num_positions
        inputs = covectors.new_empty((num_samples, positions, first.n_in))
        if term.is_constant:
            cotangents = covectors[:, None, None]
        else:
            cotangents = covectors.new_empty((len(covectors), num_samples, positions, first.n_out))
        return cls(inputs, cotangents, term.has_bias, term.is_constant)

    @cached_property
    def covectors(self) -> Tensor:
        """Constant cotangents (S, O) on the host, fetched once."""
        return self.cotangents[:, 0, 0].cpu()

    def add_gram(self, other: "Pairwise", sums: GramSums) -> None:
        """Multiply Gram matrices of inputs and of cotangents."""
        if self.is_constant:
            self._add_constant(other, sums)
        elif self.inputs.shape[1] > 1:
            self._add_positions(other, sums)
        else:
            self._add_one_position(other, sums)

    def _products(self, left: Tensor, right: Tensor, sums: GramSums) -> Tensor:
        entries = sums.product("inputs", left, right)
        return entries.add_(1.0) if self.has_bias else entries

    def _add_constant(self, other: "Pairwise", sums: GramSums) -> None:
        """Cotangents that are the covectors: their Gram matrix is known, and often diagonal."""
        target, gram = sums.blocks(), self.covectors @ other.covectors.T
        wanted = [(c, d) for c, d in torch.nonzero(gram).tolist() if sums.pairs == "all" or c == d]
        # Unit covectors are orthogonal; of other ones all blocks are needed.
        cells = sums.cells(sums.rows, sums.columns)
        if any(c != d for c, d in wanted):
            cells = ((slice(0, sums.rows), slice(0, sums.columns)),)
        for rows, columns in cells:
            entries = self._products(self.inputs[rows, 0], other.inputs[columns, 0], sums)
            for c, d in wanted:
                high, wide = sums.place(c, d)
                target[high, rows, wide, columns].add_(entries, alpha=float(gram[c, d]))

    def _add_one_position(self, other: "Pairwise", sums: GramSums) -> None:
        """``(A A' + 1) o (D D')``: n_in + S*S*n_out multiplications a pair instead of S*S*n_in*n_out."""
        target, a, b = sums.blocks(), self.inputs.flatten(0, 1), other.inputs.flatten(0, 1)
        left, right = self.cotangents[:, :, 0], other.cotangents[:, :, 0]
        whole = None if sums.covectors == 1 else self._products(a, b, sums)  # of one covector a block at a time

        def add_equal(covector: int) -> None:
            high, wide = sums.place(covector, covector)
            for rows, columns in sums.cells(sums.rows, sums.columns):
                entries = self._products(a[rows], b[columns], sums) if whole is None else whole[rows, columns]
                part = sums.product("product", left[covector, rows], right[covector, columns])
                _add_product(target[high, rows, wide, columns], part, entries)

        if whole is None or sums.pairs != "all":
            for covector in range(sums.covectors):
                add_equal(covector)
            return
        for some, others in sums.cells(sums.covectors, sums.covectors, least=sums.rows):
            if sums.is_mirrored and some == slice(others.start, others.start + 1):
                add_equal(some.start)  # a covector with itself: half of it is enough
                others = slice(some.stop, others.stop)
                if others.start == others.stop:
                    continue
            part = sums.product("product", left[some].flatten(0, 1), right[others].flatten(0, 1))
            shape = (some.stop - some.start, sums.rows, others.stop - others.start, sums.columns)
            _add_product(target[some, :, others], part.view(shape), whole[None, :, None, :])

    def _add_positions(self, other: "Pairwise", sums: GramSums) -> None:
        """``sum_tu (a_t a'_u + 1)(d_t d'_u)`` by products over all positions of a few samples."""
        target, positions, is_all = sums.blocks(), (self.inputs.shape[1], other.inputs.shape[1]), sums.pairs == "all"
        row_bytes = sums.columns * positions[1] * self.inputs.element_size()
        step = max(1, min(sums.sizes.position_rows, sums.sizes.position_bytes // row_bytes) // positions[0])
        for start in range(0, sums.rows, step):
            rows = slice(start, min(start + step, sums.rows))
            first = start if sums.is_mirrored and (sums.covectors == 1 or not is_all) else 0
            inputs = self._products(self.inputs[rows].flatten(0, 1), other.inputs[first:].flatten(0, 1), sums)
            for row in range(sums.covectors):
                for column in range(row if sums.is_mirrored else 0, sums.covectors) if is_all else (row,):
                    d, e = self.cotangents[row, rows], other.cotangents[column, first:]
                    part = sums.product("product", d.flatten(0, 1), e.flatten(0, 1)).mul_(inputs)
                    summed = part.view(len(d), positions[0], -1).sum(dim=1).view(len(d), len(e), -1).sum(dim=2)
                    high, wide = sums.place(row, column)
                    target[high, rows, wide, first:] += summed

    def _input_gram(self, samples: slice) -> Tensor:
        a = self.inputs[samples].double()
        return (a @ a.transpose(1, 2) + float(self.has_bias))[:, None]


def _add_product(target: Tensor, cotangents: Tensor, inputs: Tensor) -> None:
    if target.dtype == cotangents.dtype:
        target.addcmul_(cotangents, inputs)
    else:
        target.add_(cotangents.mul_(inputs))
