"""Alignments by hand, powers along eigendirections, full kernels, streamed against exact."""

from types import SimpleNamespace

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law

from ntkpipe.analysis.alignment import alignment
from ntkpipe.base.errors import ConfigError

CLASSES = np.arange(200) % 4


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    return matrix_with_spectrum(power_law(200, condition=1e4), seed=5) + 2.0


def cosine(kernel: np.ndarray, ideal: np.ndarray) -> float:
    return float(np.sum(kernel * ideal) / np.sqrt(np.sum(kernel**2) * np.sum(ideal**2)))


def centring(num_rows: int) -> np.ndarray:
    return np.eye(num_rows) - 1 / num_rows


@pytest.mark.parametrize("limit", [None, 1])
def test_alignments_are_cosines_of_the_matrices_written_out(matrix, limit, rng):
    for targets in (CLASSES, rng.standard_normal(200), rng.standard_normal((200, 3)) + 1):
        rows = np.eye(4)[CLASSES] if targets is CLASSES else targets.reshape(200, -1)
        found = alignment(matrix, targets, memory_limit=limit, k=20)
        assert found.method == ("exact" if limit is None else "streamed")
        centre = centring(200)
        assert found.alignment == pytest.approx(cosine(matrix, rows @ rows.T), abs=1e-12)
        by_hand = cosine(centre @ matrix @ centre, centre @ rows @ rows.T @ centre)
        assert found.centred_alignment == pytest.approx(by_hand, abs=1e-10)


def test_full_kernel_centres_each_output_by_itself(rng):
    factor = rng.standard_normal((90, 40)) + 0.5
    kernel, targets = factor @ factor.T, rng.standard_normal((30, 3)) + np.array([2.0, 0.0, -1.0])
    found = alignment(kernel, targets)
    column = targets.reshape(90, 1)
    assert found.num_outputs == 1
    assert found.alignment == pytest.approx(cosine(kernel, column @ column.T), rel=1e-12)
    centre = np.kron(centring(30), np.eye(3))
    by_hand = cosine(centre @ kernel @ centre, centre @ column @ column.T @ centre)
    assert found.centred_alignment == pytest.approx(by_hand, rel=1e-10)


def test_targets_in_few_directions_have_their_power_there(matrix):
    values, vectors = np.linalg.eigh(matrix)
    values, vectors = values[::-1], vectors[:, ::-1]
    targets = vectors[:, [0, 7]] * np.array([3.0, 2.0])
    found = alignment(matrix, targets)
    assert found.cumulative_power[[0, 6, 7, -1]] == pytest.approx([9 / 13, 9 / 13, 1.0, 1.0], abs=1e-10)
    assert found.num_directions == (1, 8, 8)
    assert found.powers[0, 0] == pytest.approx(9, abs=1e-9)
    np.testing.assert_allclose(found.eigenvalues, values, rtol=1e-8, atol=1e-10)


def test_a_limit_of_a_tenth_of_the_kernel_gives_the_same_leading_powers(matrix):
    exact = alignment(matrix, CLASSES)
    found = alignment(matrix, CLASSES, memory_limit=matrix.nbytes // 10, k=25)
    assert found.method == "streamed"
    assert found.is_converged
    assert found.cumulative_power.shape == (25,)
    np.testing.assert_allclose(found.cumulative_power, exact.cumulative_power[:25], rtol=1e-6)
    gap = np.abs(found.cumulative_power - exact.cumulative_power[:25])
    assert np.all(gap <= found.cumulative_power_error + 1e-12)
    assert found.cumulative_power_error.max() < 1e-4
    assert not exact.cumulative_power_error.any()
    assert found.num_directions[2] is None
    assert "99% in more than 25 of 200" in str(found)


def test_directions_that_are_known_roughly_have_powers_within_their_errors(matrix):
    exact = alignment(matrix, CLASSES)
    rough = alignment(matrix, CLASSES, method="streamed", k=25, tol=1e-2)
    gap = np.abs(rough.cumulative_power - exact.cumulative_power[:25])
    assert gap.max() > 1e-7
    assert np.all(gap <= rough.cumulative_power_error)
    assert np.median(rough.cumulative_power_error) < 0.5


def test_a_constant_kernel_has_no_centred_alignment():
    found = alignment(np.ones((20, 20)), np.arange(20.0))
    assert found.centred_alignment == 0
    assert found.alignment > 0


def test_pairs_of_another_matrix_and_targets_that_do_not_fit_are_refused(matrix):
    values, vectors = np.linalg.eigh(matrix)
    ascending = SimpleNamespace(eigenvalues=values, eigenvectors=vectors)
    with pytest.raises(ConfigError, match="descending"):
        alignment(matrix, CLASSES, eigenpairs=ascending)
    with pytest.raises(ConfigError, match="targets of 7 samples for a kernel of 200 rows"):
        alignment(matrix, np.arange(7.0))
