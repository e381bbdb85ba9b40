"""Blocks that callers give become float64 of two axes, or are refused by name."""

import numpy as np
import pytest

from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.solvers.blocks import as_block


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, np.uint16, bool])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)])
def test_real_numbers_become_float64_of_two_axes(shape, dtype):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    found = as_block("targets", np.asfortranarray(values), 4)
    assert found.dtype == np.float64
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, values.reshape(4, -1))


def test_what_is_right_already_is_not_copied():
    values = np.ones((4, 2))
    assert np.shares_memory(as_block("targets", values, 4), values)


@pytest.mark.parametrize(
    "values", [np.ones(3), np.ones((4, 0)), np.ones((4, 1, 1)), np.float64(1), np.ones(4, complex), ["a"] * 4], ids=repr
)
def test_what_is_none_is_refused_by_name(values):
    with pytest.raises(ConfigError, match=r"targets of shape .*needed (\(4,\) or \(4, c\)|real numbers)"):
        as_block("targets", values, 4)


def test_no_column_is_a_block_where_that_is_allowed():
    assert as_block("targets", np.ones((4, 0)), 4, allow_none=True).shape == (4, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(NonFiniteError, match="targets hold NaN or infinity"):
        as_block("targets", [1.0, value], 2)
