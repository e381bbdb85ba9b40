"""The covectors of a kind, and the convention that names them."""

import numpy as np
import pytest

from ntkpipe.base.errors import ConfigError
from ntkpipe.base.kinds import KINDS, get_kind


@pytest.mark.parametrize("name", ["ntk", "pntk", "output:0"])
@pytest.mark.parametrize("num_outputs", [1, 3, 10])
def test_covectors_are_orthonormal_rows(name, num_outputs):
    kind = get_kind(name)
    covectors = kind.covectors(num_outputs)
    assert covectors.shape == (kind.num_covectors(num_outputs), num_outputs)
    np.testing.assert_allclose(covectors @ covectors.T, np.eye(len(covectors)), rtol=0, atol=1e-15)


def test_the_trace_has_one_row_a_sample_and_a_covector_an_output():
    kind = get_kind("trace")
    assert (kind.num_covectors(4), kind.pairs) == (1, "sum")
    assert np.array_equal(kind.covectors(4), np.eye(4) / 2)


def test_the_diagonal_is_a_matrix_of_one_row_a_sample_for_each_output():
    kind = get_kind("diagonal")
    assert (kind.num_covectors(4), kind.num_matrices(4), kind.pairs) == (1, 4, "same")
    assert [get_kind(name).num_matrices(4) for name in ("ntk", "pntk", "trace", "output:1")] == [1, 1, 1, 1]
    assert np.array_equal(kind.covectors(4), np.eye(4))


def test_one_output_is_a_unit_vector():
    assert np.array_equal(get_kind("output:2").covectors(3), [[0, 0, 1]])
    with pytest.raises(ConfigError, match="the model has outputs 0 to 2"):
        get_kind("output:3").covectors(3)


@pytest.mark.parametrize("name", ["output:", "output:-1", "output:one", "output"])
def test_an_output_is_a_number(name):
    with pytest.raises(ConfigError, match="'output:k'"):
        get_kind(name)


@pytest.mark.parametrize("name", ["pntk", "output:7"])
def test_one_covector_of_very_many_outputs_is_one_row(name):
    covectors = get_kind(name).covectors(10**6)  # a matrix of all outputs would have 8 TB
    assert covectors.shape == (1, 10**6)
    assert np.linalg.norm(covectors) == pytest.approx(1, rel=1e-12)


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
