"""Densities: counts within their stated errors, errors that cover as often as they say, exact pairs spliced in."""

from types import SimpleNamespace

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law, spectra

from ntkpipe.base.errors import ConfigError
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.spectral.density import density


def top_pairs(matrix, k):
    values, vectors = np.linalg.eigh(matrix)
    return SimpleNamespace(eigenvalues=values[::-1][:k], eigenvectors=vectors[:, ::-1][:, :k])


def exact_counts(matrix, thresholds):
    return (np.linalg.eigvalsh(matrix)[:, None] > thresholds).sum(axis=0)


@pytest.mark.parametrize("name", spectra(300))
@pytest.mark.parametrize("num_steps", [3, 10, 40, None])
def test_counts_are_within_their_errors_however_few_the_steps(name, num_steps):
    matrix = matrix_with_spectrum(spectra(300)[name])
    found = density(matrix, num_steps=num_steps, max_passes=60)
    thresholds = np.geomspace(found.floor, 1e5, 100) * (1 + 1e-6)
    counts = found.count_above(thresholds)
    gap = abs(counts.values - exact_counts(matrix, thresholds))
    assert (gap <= 3.5 * counts.standard_errors + counts.truncation_errors + 1e-6).all()


def test_few_steps_of_an_ill_conditioned_spectrum_are_not_called_converged():
    """Half as many steps agree below the smallest node, where counts are wrong by half of n."""
    matrix = matrix_with_spectrum(power_law(400, condition=1e10))
    found = density(matrix, num_steps=20)
    counts = found.count_above(1e-6)
    assert found.status == "step limit"
    assert abs(counts.values - exact_counts(matrix, 1e-6)) > 100
    assert counts.truncation_errors > 100


def test_standard_errors_cover_as_often_as_they_say():
    """All of the spectrum is resolved, so that nothing but Monte-Carlo error is there."""
    values = np.repeat([4.0, 3.0, 2.0, 1.0], 50)
    matrix = matrix_with_spectrum(values)
    inside = {1: 0, 2: 0}
    for seed in range(100):
        counts = density(matrix, seed=seed).count_above([2.5])
        assert counts.truncation_errors < 1e-6
        for width in inside:
            inside[width] += int(abs(counts.values[0] - 100) <= width * counts.standard_errors[0])
    assert 60 <= inside[1] <= 82
    assert 90 <= inside[2] <= 100


def test_more_probes_have_smaller_errors():
    matrix = matrix_with_spectrum(np.repeat([2.0, 1.0], 100))
    few, many = (density(matrix, num_probes=p).count_above(1.5).standard_errors[0] for p in (4, 64))
    assert 2.5 < few / many < 8


def test_exact_pairs_are_counted_exactly_and_the_rest_knows_nothing_of_them():
    matrix = matrix_with_spectrum(power_law(300, condition=1e4))
    found = density(matrix, top=top_pairs(matrix, 30))
    values = np.linalg.eigvalsh(matrix)[::-1]
    np.testing.assert_allclose(found.eigenvalues, values[:30])
    assert found.nodes.max() <= values[30] * (1 + 1e-9)
    thresholds = (values[:29] + values[1:30]) / 2
    counts = found.count_above(thresholds)
    np.testing.assert_allclose(counts.values, np.arange(1, 30))
    assert (counts.standard_errors == 0).all()
    assert (counts.truncation_errors == 0).all()
    assert found.status == "converged"
    assert density(matrix).count_above(thresholds).standard_errors.max() > 0
    np.testing.assert_allclose(found.weights.sum(axis=1), 270)


@pytest.mark.parametrize("k", [7, 8])
def test_exact_pairs_may_be_nearly_all_or_all(k):
    matrix = matrix_with_spectrum(np.arange(1.0, 9.0))
    found = density(matrix, top=top_pairs(matrix, k))
    np.testing.assert_allclose(found.count_above([0.5, 1.5, 5.5]).values, [8, 7, 3])
    assert "8" in str(found)


def test_top_pairs_that_do_not_fit_are_refused():
    matrix = np.eye(4)
    with pytest.raises(ConfigError, match=r"top .*shape \(3, 1\); needed .*\(4, k\)"):
        density(matrix, top=SimpleNamespace(eigenvalues=np.ones(1), eigenvectors=np.ones((3, 1))))
    with pytest.raises(ConfigError, match="orthonormal to 3"):
        density(matrix, top=SimpleNamespace(eigenvalues=np.ones(1), eigenvectors=np.ones((4, 1))))


def test_the_smooth_density_has_the_area_of_the_eigenvalues_above_the_floor():
    values = spectra(300)["singular"]
    matrix = matrix_with_spectrum(values)
    found = density(matrix, top=top_pairs(matrix, 20), max_passes=150)
    places, heights = found.smooth(num_points=1000)
    area = np.trapezoid(heights, np.log10(places))
    counts = found.count_above(found.floor)
    assert abs(area - 225) < 3 * counts.standard_errors[0] + counts.truncation_errors[0] + 1
    assert (heights >= 0).all()


def test_a_smooth_density_is_where_the_eigenvalues_are():
    found = density(np.diag(np.repeat([100.0, 1.0], 50)), num_probes=8)
    places, heights = found.smooth(width=0.05)
    assert heights[abs(np.log10(places) - 1) < 0.5].max() < 1e-6 * heights.max()


@pytest.mark.parametrize("size", [1, 2, 8])
def test_tiny_matrices_are_as_good_as_exact_after_n_steps(size):
    matrix = matrix_with_spectrum(np.arange(1.0, size + 1))
    found = density(matrix, num_steps=size, num_probes=256)
    counts = found.count_above([0.5, size / 2 + 0.25])
    np.testing.assert_allclose(counts.truncation_errors, 0, atol=1e-9)
    assert counts.values[0] == pytest.approx(size)
    assert str(found)


def test_negative_eigenvalues_are_said():
    found = density(matrix_with_spectrum(np.append(np.ones(150), -np.ones(50))))
    assert abs(found.count_above(0.0).values[0] - 150) < 10
    assert "below minus that 5" in str(found) or "below minus that 4" in str(found)
    assert "below minus that 0" in str(density(matrix_with_spectrum(power_law(200, condition=1e4))))


def test_the_zero_matrix_has_nothing_above_zero():
    found = density(np.zeros((5, 5)))
    assert found.count_above([0.0, 1.0]).values.tolist() == [0, 0]
    assert str(found)


def test_equal_seeds_give_equal_bits_and_one_pass_serves_all_probes():
    operator = DenseOperator(matrix_with_spectrum(power_law(200, condition=1e4)))
    operator.statistics()
    first, second = (density(operator, num_steps=15) for _ in range(2))
    np.testing.assert_array_equal(first.nodes, second.nodes)
    np.testing.assert_array_equal(first.weights, second.weights)
    assert first.work.passes == 15
    assert (density(operator, num_steps=15, seed=1).weights != first.weights).any()


def test_monitors_are_called_after_each_pass_and_end_it_by_raising():
    seen = []
    density(matrix_with_spectrum(power_law(100, condition=1e4)), num_steps=12, monitor=seen.append)
    assert len(seen) == 12
    assert seen[-1].residual is not None

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        density(np.eye(4), monitor=stop)


@pytest.mark.parametrize(
    "options", [{"num_probes": 1}, {"num_steps": 0}, {"tol": -1.0}, {"max_passes": 0}, {"tol": float("nan")}]
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        density(np.eye(4), **options)


@pytest.mark.parametrize("top", ["abc", 3, np.ones(2), {}, SimpleNamespace(eigenvalues=np.ones(2))])
def test_what_are_no_pairs_is_named(top):
    with pytest.raises(ConfigError, match=r"^top.*needed both, as ntkpipe.eigh or ntkpipe.eigsh return"):
        density(np.eye(4), top=top)
