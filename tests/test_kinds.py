"""The covectors of a kind, and the convention that names them."""

import numpy as np
import pytest

from ntkpipe.errors import ConfigError
from ntkpipe.kinds import KINDS, get_kind


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("num_outputs", [1, 3, 10])
def test_covectors_are_orthonormal_rows(name, num_outputs):
    kind = get_kind(name)
    covectors = kind.covectors(num_outputs)
    assert covectors.shape == (kind.num_covectors(num_outputs), num_outputs)
    np.testing.assert_allclose(covectors @ covectors.T, np.eye(len(covectors)), rtol=0, atol=1e-15)


def test_the_pseudo_kernel_sums_the_outputs():
    covector = get_kind("pntk").covectors(4)
    assert np.array_equal(covector, np.full((1, 4), 0.5))


def test_one_output_makes_both_kinds_equal():
    assert np.array_equal(get_kind("ntk").covectors(1), get_kind("pntk").covectors(1))


def test_conventions_tell_the_kinds_apart():
    assert len({kind.convention for kind in KINDS.values()}) == len(KINDS)
    assert all(kind.name == name for name, kind in KINDS.items())


def test_an_unknown_kind_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"kind='pntkk' is unknown.*'ntk'.*did you mean 'pntk'"):
        get_kind("pntkk")
