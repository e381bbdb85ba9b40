"""Pieces of random Jacobians, held in every way, and what they stand for by definition."""

import torch

from ntkpipe.jacobian.representations.dense import Dense
from ntkpipe.jacobian.representations.late import Late
from ntkpipe.jacobian.representations.pairwise import Pairwise
from ntkpipe.jacobian.representations.pieces import Piece
from ntkpipe.jacobian.representations.table import LookupTable

# Rows of every table.
NUM_INDICES = 500


class Draw:
    """Random factors of pieces of ``num_samples`` samples and ``num_covectors`` covectors."""

    def __init__(self, num_samples, num_covectors, *, seed=0, dtype=torch.float64):
        self.n, self.s, self.dtype = num_samples, num_covectors, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def dense(self, width):
        return Dense(self.normal(self.n, self.s, width))

    def pairwise(self, positions, n_in, n_out, *, has_bias=True):
        inputs, cotangents = self.normal(self.n, positions, n_in), self.normal(self.s, self.n, positions, n_out)
        return Pairwise(inputs, cotangents, has_bias, is_constant=False)

    def constant(self, n_in, covectors, *, has_bias=True):
        """Cotangents that are the covectors (S, O) for every sample."""
        cotangents = covectors.to(self.dtype)[:, None, None]
        return Pairwise(self.normal(self.n, 1, n_in), cotangents, has_bias, is_constant=True)

    def late(self, groups, positions, n_in, n_out):
        return Late(self.normal(self.n, groups, positions, n_in), self.normal(self.n, self.s, groups, positions, n_out))

    def table(self, positions, n_out, *, num_indices):
        indices = torch.randint(0, num_indices, (self.n, positions), generator=self.generator)
        return LookupTable(indices, self.normal(self.s, self.n, positions, n_out))

    def piece(self, *factors):
        return Piece(self.n, self.s, factors)


def jacobian(factor, num_samples):
    """The Jacobians (n, S, P) of a factor in float64."""
    if isinstance(factor, Dense):
        return factor.matrix.double()
    d = factor.cotangents.double()
    if isinstance(factor, Late):
        return torch.einsum("nsgto,ngti->nsgoi", d, factor.inputs.double()).flatten(2)
    d = d.expand(-1, num_samples, -1, -1)
    if isinstance(factor, LookupTable):
        hot = torch.nn.functional.one_hot(factor.indices, NUM_INDICES).double()
        return torch.einsum("snto,nti->nsoi", d, hot).flatten(2)
    weight = torch.einsum("snto,nti->nsoi", d, factor.inputs.double()).flatten(2)
    return torch.cat([weight, d.sum(2).transpose(0, 1)], dim=2) if factor.has_bias else weight


def jacobians(piece):
    """The Jacobians (n, S, P) of all factors, side by side."""
    return torch.cat([jacobian(factor, piece.num_samples) for factor in piece.factors], dim=2)


def gram(left, right, pairs="all"):
    """Gram entries by definition: (n*S, m*S); of equal covectors alone (S, n, m); and their sum (n, m)."""
    one, other = jacobians(left), jacobians(right)
    if pairs == "all":
        return one.flatten(0, 1) @ other.flatten(0, 1).T
    same = torch.einsum("nsp,msp->snm", one, other)
    return same if pairs == "same" else same.sum(0)


def error(found, exact):
    """The largest error of an entry on the scale of the largest one."""
    assert found.shape == exact.shape
    return float((found.double() - exact).abs().max() / exact.abs().max())
