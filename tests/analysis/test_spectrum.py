"""The spectrum in numbers: definitions written out, streamed against exact, what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law

from ntkpipe.analysis.spectrum import spectrum
from ntkpipe.base.errors import ConfigError, ResourceError

RIDGES = [1e-2, 1.0, 50.0]


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return power_law(300, condition=1e4)


@pytest.fixture(scope="module")
def matrix(values: np.ndarray) -> np.ndarray:
    return matrix_with_spectrum(values, seed=3)


def test_exact_numbers_are_their_definitions(values, matrix):
    found = spectrum(matrix, ridges=np.array(RIDGES))
    assert found.method == "exact"
    np.testing.assert_allclose(found.eigenvalues, values, rtol=1e-9)
    assert found.largest == pytest.approx(values[0], rel=1e-10)
    assert found.smallest_low == found.smallest_high == pytest.approx(values[-1], rel=1e-8)
    assert found.condition_low == found.condition_high == pytest.approx(1e4, rel=1e-8)
    assert found.trace == pytest.approx(values.sum(), rel=1e-10)
    assert found.effective_rank == pytest.approx(values.sum() / values[0], rel=1e-10)
    assert found.participation_ratio == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-10)
    shares = values / values.sum()
    assert found.entropy_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-10)
    expected = [(values / (values + ridge)).sum() for ridge in RIDGES]
    np.testing.assert_allclose(found.effective_dimension, expected, rtol=1e-9)
    assert not found.effective_dimension_error.any()
    exponent = np.log(1e4) / np.log(300)
    assert found.tail_exponent == pytest.approx(exponent, rel=1e-6)
    assert (found.tail_first_rank, found.tail_last_rank) == (10, 75)
    # The density holds all eigenvalues: per decade, over decades.
    assert np.trapezoid(found.density, np.log10(found.density_grid)) == pytest.approx(300, rel=1e-3)


def test_a_limit_of_a_tenth_of_the_kernel_is_streamed_and_says_how_far_off_it_is(values, matrix):
    exact = spectrum(matrix, ridges=RIDGES)
    found = spectrum(matrix, ridges=RIDGES, k=30, memory_limit=matrix.nbytes // 10)
    assert found.method == "streamed"
    assert "do not fit" in found.why
    assert found.is_converged
    np.testing.assert_allclose(found.eigenvalues, values[:30], rtol=1e-8)
    for name in ("largest", "trace", "frobenius", "effective_rank", "participation_ratio"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=1e-6), name
    assert found.smallest_low is not None
    assert found.smallest_low <= values[-1] * (1 + 1e-9)
    assert found.smallest_high >= values[-1] * (1 - 1e-9)
    assert found.smallest_high - found.smallest_low < 0.1 * values[-1]
    assert found.condition_low <= 1e4 * (1 + 1e-6)
    assert found.condition_high >= 1e4 * (1 - 1e-6)
    for name in ("entropy_rank", "effective_dimension"):
        gap = np.abs(getattr(found, name) - getattr(exact, name))
        error = getattr(found, f"{name}_error")
        assert np.all(gap <= 3 * error + 1e-6 * getattr(exact, name)), name
        assert np.all(error < 0.02 * getattr(exact, name)), name
    assert found.num_below_floor <= 3 * found.num_below_floor_error


def test_few_steps_are_covered_by_the_error(matrix):
    """After five steps of many probes what is missing are steps, and the error says so."""
    exact = spectrum(matrix, ridges=[1e-2, 1.0])
    found = spectrum(matrix, ridges=[1e-2, 1.0], method="streamed", k=5, num_probes=60, max_passes=5)
    gap = np.abs(found.effective_dimension - exact.effective_dimension)
    assert np.all(gap <= found.effective_dimension_error)
    assert gap.max() > 1e-3 * exact.effective_dimension.max()
    more = spectrum(matrix, ridges=[1e-2, 1.0], method="streamed", k=5, num_probes=60, max_passes=40)
    assert np.all(more.effective_dimension_error < found.effective_dimension_error / 2)


def test_all_pairs_make_it_exact_and_a_few_are_spliced_in(values, matrix):
    ascending, vectors = np.linalg.eigh(matrix)
    every = SimpleNamespace(eigenvalues=ascending[::-1], eigenvectors=vectors[:, ::-1])
    found = spectrum(matrix, eigenpairs=every, memory_limit=matrix.nbytes // 10, ridges=RIDGES)
    assert found.method == "exact"
    assert found.effective_dimension == pytest.approx(spectrum(matrix, ridges=RIDGES).effective_dimension, rel=1e-9)
    few = SimpleNamespace(eigenvalues=every.eigenvalues[:20], eigenvectors=every.eigenvectors[:, :20])
    streamed = spectrum(matrix, eigenpairs=few, method="streamed", ridges=RIDGES)
    np.testing.assert_allclose(streamed.eigenvalues, values[:20], rtol=1e-9)
    other = SimpleNamespace(eigenvalues=2 * every.eigenvalues, eigenvectors=every.eigenvectors)
    with pytest.raises(ConfigError, match="not of this matrix"):
        spectrum(matrix, eigenpairs=other)


def test_what_lies_below_the_storage_floor_is_not_known():
    values = power_law(120, condition=1e10)
    found = spectrum(matrix_with_spectrum(values).astype(np.float32))
    assert found.num_below_floor > 0
    assert found.condition_high is None
    assert found.condition_low is not None
    assert found.condition_low < 1e10


def test_isotropic_kernels_have_full_rank_by_every_count():
    found = spectrum(3.0 * np.eye(40), ridges=[1.0], ridge_scale="mean_diagonal")
    assert found.ridges == pytest.approx([3.0])
    assert found.effective_rank == pytest.approx(40)
    assert found.entropy_rank == pytest.approx(40)
    assert found.participation_ratio == pytest.approx(40)
    assert found.effective_dimension == pytest.approx([20])
    assert found.tail_exponent is None


def test_it_prints_and_is_refused_with_what_to_do(matrix):
    text = str(spectrum(matrix))
    assert "effective rank" in text
    assert "condition number" in text
    with pytest.raises(ResourceError):
        spectrum(matrix, method="exact", memory_limit=1)
    with pytest.raises(ConfigError, match="method='fast'"):
        spectrum(matrix, method="fast")
    for ranks in ([10], [10, 40, 80], []):
        with pytest.raises(ConfigError, match="needed two numbers, the first and the last rank"):
            spectrum(matrix, tail_ranks=ranks)
    with pytest.raises(ConfigError, match=r"spectrum\(\): tail_ranks='10'; needed a list of integers or None"):
        spectrum(matrix, tail_ranks="10")
    assert spectrum(matrix, tail_ranks=[12, 60]).tail_last_rank == 60
    with pytest.raises(TypeError, match=r"spectrum\(\) has no argument 'num_probe'; the nearest is 'num_probes'"):
        spectrum(matrix, num_probe=3)
    with pytest.raises(ConfigError, match="no ridge is given"):
        spectrum(matrix, ridges=[])
    with pytest.raises(ConfigError, match="ridges=-1"):
        spectrum(matrix, ridges=[-1.0])
