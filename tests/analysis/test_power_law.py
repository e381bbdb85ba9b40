"""Power laws by rank: exact ones are found, errors cover what noise does, bends show."""

import numpy as np
import pytest

from ntkpipe.analysis.power_law import default_ranks, fit_power_law
from ntkpipe.base.errors import ConfigError


def test_an_exact_power_law_is_found_exactly():
    found = fit_power_law(7.0 * np.arange(1.0, 301) ** -1.3, first_rank=5, last_rank=200)
    assert found.exponent == pytest.approx(1.3, rel=1e-12)
    assert found.prefactor == pytest.approx(7.0, rel=1e-11)
    assert found.exponent_error < 1e-12
    assert found.scatter < 1e-12
    assert found.exponent_of_first_half == pytest.approx(found.exponent_of_second_half, rel=1e-10)


def test_error_is_what_independent_draws_scatter_by(rng):
    """Noise that is shared by neighbours, as ordered eigenvalues have it: a plain regression would be too sure."""
    ranks = np.arange(1.0, 401)
    places = np.linspace(0, np.log(400), 13)
    fits = []
    for _ in range(200):
        noise = np.interp(np.log(ranks), places, 0.2 * rng.standard_normal(13))
        fits.append(fit_power_law(np.exp(-1.5 * np.log(ranks) + noise), first_rank=10, last_rank=400))
    scatter = np.std([fit.exponent for fit in fits], ddof=1)
    claimed = np.sqrt(np.mean([fit.exponent_error**2 for fit in fits]))
    assert abs(np.mean([fit.exponent for fit in fits]) - 1.5) < 4 * scatter / 200**0.5
    assert 0.7 < claimed / scatter < 2.0


def test_a_bend_shows_in_the_halves():
    ranks = np.arange(1.0, 401)
    found = fit_power_law(np.exp(-0.2 * np.log(ranks) ** 2), first_rank=10, last_rank=400)
    assert found.exponent_of_second_half - found.exponent_of_first_half > 5 * found.exponent_error / 2


def test_the_least_squares_line_is_the_weighted_one(rng):
    values = np.sort(rng.random(100))[::-1] + 1e-3
    found = fit_power_law(values, first_rank=3, last_rank=90)
    ranks = np.arange(3.0, 91)
    slope, intercept = np.polyfit(np.log(ranks), np.log(values[2:90]), 1, w=ranks**-0.5)
    assert found.exponent == pytest.approx(-slope, rel=1e-10)
    assert found.prefactor == pytest.approx(np.exp(intercept), rel=1e-10)


def test_ranges():
    assert default_ranks(4000, 4000) == (10, 1000)
    assert default_ranks(4000, 100) == (10, 100)
    assert default_ranks(100, 100) is None
    with pytest.raises(ConfigError, match="tail_ranks=20"):
        fit_power_law(np.ones(50), first_rank=5, last_rank=20)
    with pytest.raises(ConfigError, match="eigenvalue 31 is not positive"):
        fit_power_law(np.concatenate([np.ones(30), np.zeros(20)]), first_rank=5, last_rank=40)
