"""Factored Jacobians contract to the Grams of the Jacobians that they stand for."""

import pytest
import torch

from ntkpipe.jacobian.factors import (
    Outer,
    Piece,
    Workspace,
    contract,
    contract_diagonal,
    is_factored_cheaper,
    materialize,
    pair_flops,
)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def outer(positions, covectors, samples, n_in, n_out, *, has_bias=True, seed=0):
    return Outer(
        draw(positions, samples, n_in, seed=seed), draw(positions, covectors, samples, n_out, seed=seed + 1), has_bias
    )


def dense(one):
    """The Jacobians (S, n, P) by definition."""
    weight = torch.einsum("tcno,tni->cnoi", one.cotangents, one.inputs).flatten(2)
    return torch.cat([weight, one.cotangents.sum(0)], dim=2) if one.has_bias else weight


def whole(piece):
    rows = torch.cat([piece.dense, *map(dense, piece.outers)], dim=2)
    return rows.flatten(0, 1)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 3, 4, 2), (3, 2, 4, 5, 3), (2, 3, 1, 1, 1)])
def test_materialize_is_the_sum_of_outer_products(shape, has_bias):
    one = outer(*shape, has_bias=has_bias)
    assert torch.allclose(materialize(one.inputs, one.cotangents, has_bias), dense(one), rtol=1e-13)


def piece(samples, covectors, dense_width, seed):
    outers = (
        outer(3, covectors, samples, 4, 2, seed=seed),
        outer(1, covectors, samples, 5, 3, has_bias=False, seed=seed + 5),
    )
    return Piece(samples, outers, draw(covectors, samples, dense_width, seed=seed + 9))


@pytest.mark.parametrize("covectors", [1, 3])
@pytest.mark.parametrize("dense_width", [0, 7])
def test_contraction_is_the_gram_of_the_jacobians(covectors, dense_width):
    left, right = piece(4, covectors, dense_width, seed=0), piece(3, covectors, dense_width, seed=20)
    found = contract(left, right, Workspace())
    assert torch.allclose(found, whole(left) @ whole(right).T, rtol=0, atol=1e-12)


def test_diagonal_blocks_are_those_of_the_contraction():
    one = piece(4, 2, 6, seed=0)
    full = contract(one, one, Workspace()).view(2, 4, 2, 4)
    expected = torch.stack([full[:, i, :, i] for i in range(4)])
    assert torch.allclose(contract_diagonal(one), expected, rtol=0, atol=1e-12)


def test_long_float32_sums_are_as_good_as_float64():
    rows = draw(1, 3, 300_000, dtype=torch.float32).abs()
    found = contract(Piece(3, (), rows), Piece(3, (), rows), Workspace())
    exact = rows[0].double() @ rows[0].double().T
    assert float(((found - exact) / exact).abs().max()) < 5e-7
    assert found.dtype == torch.float32


def test_workspace_is_reused_and_follows_dtype():
    workspace = Workspace()
    first = workspace.take("a", (3, 4), torch.zeros(1))
    assert workspace.take("a", (2, 5), torch.zeros(1)).data_ptr() == first.data_ptr()
    assert workspace.take("b", (3, 4), torch.zeros(1)).data_ptr() != first.data_ptr()
    assert workspace.take("a", (3, 4), torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_factors_are_kept_where_they_cost_less():
    assert is_factored_cheaper(1, 784, 1024, 10)
    assert not is_factored_cheaper(200, 16, 16, 1)
    assert pair_flops(outer(2, 3, 1, 4, 5)) == 4 * (2 * 4 + 2 * 9 * 5 + 2 * 9)


@pytest.mark.parametrize("where", ["dense", "inputs", "cotangents"])
def test_samples_that_are_not_finite_are_named(where):
    one = piece(4, 2, 6, seed=0)
    target = one.dense if where == "dense" else getattr(one.outers[0], where)
    target[(..., 2, slice(None))][..., 0] = torch.nan
    assert one.is_finite().tolist() == [True, True, False, True]


def test_bytes_are_those_of_all_tensors():
    one = Piece(2, (outer(1, 1, 2, 3, 4),), draw(1, 2, 5))
    assert one.num_bytes() == 8 * (2 * 3 + 2 * 4 + 2 * 5)
