"""Krylov spaces: orthonormal, exact recurrences, blocks of any rank, nothing left where a space ends."""

import numpy as np
import pytest
from matrices import matrix_with_spectrum, spectra

from ntkpipe.base import config
from ntkpipe.base.config import Budget
from ntkpipe.base.errors import ResourceError
from ntkpipe.solvers.probe_lanczos import ProbeLanczos
from ntkpipe.solvers.spectral.krylov import BlockLanczos, steps_that_fit


def run(lanczos, matrix, steps):
    for _ in range(steps):
        lanczos.absorb(matrix @ lanczos.block)
    return lanczos


@pytest.mark.parametrize("name", spectra(300))
def test_probes_have_orthonormal_vectors_and_the_matrix_in_them(name, rng):
    matrix = matrix_with_spectrum(spectra(300)[name])
    lanczos = run(ProbeLanczos(rng.standard_normal((300, 3)), 40), matrix, 40)
    alphas, betas = lanczos.coefficients(40)
    for column in range(3):
        length = int(min(lanczos._lengths[column], 40))
        vectors = lanczos._basis[column, :length]
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(length), atol=1e-12)
        tridiagonal = np.diag(alphas[column, :length])
        tridiagonal += np.diag(betas[column, : length - 1], 1) + np.diag(betas[column, : length - 1], -1)
        np.testing.assert_allclose(vectors @ matrix @ vectors.T, tridiagonal, atol=1e-13 * abs(matrix).max() * 300)


def test_a_probe_of_a_clustered_spectrum_ends_after_as_many_steps_as_there_are_eigenvalues(rng):
    matrix = np.diag(np.repeat([4.0, 3.0, 2.0, 1.0], 50))
    lanczos = run(ProbeLanczos(rng.standard_normal((200, 2)), 10), matrix, 6)
    assert lanczos.ended.all()
    assert lanczos._lengths.tolist() == [4, 4]
    alphas, betas = lanczos.coefficients(6)
    assert (betas[:, 3:] == 0).all()
    np.testing.assert_array_equal(alphas[:, 4:], alphas[:, :1].repeat(2, axis=1))


def test_probes_that_are_kept_out_of_eigenvectors_see_the_rest_alone(rng):
    values = spectra(200)["power_law_1e8"]
    matrix = matrix_with_spectrum(values)
    vectors = np.linalg.eigh(matrix)[1][:, ::-1][:, :20]
    lanczos = run(ProbeLanczos(rng.standard_normal((200, 3)), 60, vectors), matrix, 60)
    alphas, betas = lanczos.coefficients(60)
    tridiagonal = np.diag(alphas[0]) + np.diag(betas[0, :-1], 1) + np.diag(betas[0, :-1], -1)
    assert np.linalg.eigvalsh(tridiagonal)[-1] <= values[20] * (1 + 1e-9)
    assert abs(lanczos._basis[:, :61] @ vectors).max() < 1e-12


def test_a_probe_in_the_span_of_what_is_deflated_has_no_weight(rng):
    vectors = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    lanczos = ProbeLanczos(np.stack([vectors[:, 0], vectors[:, 5]], axis=1), 5, vectors[:, :3])
    assert lanczos.ended.tolist() == [True, False]
    np.testing.assert_allclose(lanczos.squared_norms, [0.0, 1.0])
    assert ProbeLanczos(rng.standard_normal((30, 2)), 5, vectors).ended.all()


def test_probes_of_a_tiny_matrix_end_at_its_size(rng):
    matrix = matrix_with_spectrum([3.0, 2.0, 1.0])
    lanczos = run(ProbeLanczos(rng.standard_normal((3, 2)), 8), matrix, 8)
    assert lanczos._lengths.tolist() == [3, 3]
    alphas, betas = lanczos.coefficients(3)
    tridiagonal = np.diag(alphas[1]) + np.diag(betas[1, :-1], 1) + np.diag(betas[1, :-1], -1)
    np.testing.assert_allclose(np.linalg.eigvalsh(tridiagonal), [1, 2, 3])


@pytest.mark.parametrize("name", spectra(300))
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_block_of_any_rank_has_an_orthonormal_space_and_an_exact_recurrence(name, rank, rng):
    matrix = matrix_with_spectrum(spectra(300)[name])
    block = rng.standard_normal((300, rank)) @ rng.standard_normal((rank, 4))
    lanczos = BlockLanczos(block, 20)
    steps = 0
    while steps < 20 and not lanczos.is_exhausted:
        lanczos.absorb(matrix @ lanczos.block)
        steps += 1
    size = lanczos.dimension
    assert size <= rank * steps
    vectors = lanczos._vectors[:size].T
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(vectors[:, : len(lanczos.start)] @ lanczos.start, block, atol=1e-12)
    out = np.zeros((300, size))
    last = lanczos.coupling.shape[1]
    out[:, size - last :] = lanczos.block @ lanczos.coupling
    np.testing.assert_allclose(
        matrix @ vectors, vectors @ lanczos.matrix() + out, atol=1e-12 * np.linalg.norm(matrix, 2)
    )


def test_a_block_fills_a_small_space_and_ends(rng):
    matrix = matrix_with_spectrum(np.arange(1.0, 9.0))
    lanczos = BlockLanczos(rng.standard_normal((8, 3)), 10)
    while not lanczos.is_exhausted:
        lanczos.absorb(matrix @ lanczos.block)
    assert lanczos.dimension == 8
    assert lanczos.num_steps == 3
    np.testing.assert_allclose(np.linalg.eigvalsh(lanczos.matrix()), np.arange(1.0, 9.0))


def test_a_block_of_zeros_spans_nothing():
    lanczos = BlockLanczos(np.zeros((5, 2)), 4)
    assert lanczos.is_exhausted
    assert lanczos.start.shape == (0, 2)


def test_steps_are_what_memory_holds(monkeypatch):
    monkeypatch.setattr(config, "process_memory", lambda: 5 * 10**8)
    assert steps_that_fit(1000, 10, 50, Budget(10**9)) == 50
    assert steps_that_fit(1000, 10, 50, Budget(5 * 10**8 + 80_000 * 23)) == 20
    with pytest.raises(ResourceError, match="fewer columns or raise memory_limit"):
        steps_that_fit(1000, 10, 50, Budget(5 * 10**8 + 80_000 * 4))
