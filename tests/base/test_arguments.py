"""Arguments are checked by their annotations, numpy's scalars as Python's."""

from typing import Any

import numpy as np
import pytest

import ntkpipe
from ntkpipe.base.errors import ArgumentError, ConfigError

K = np.diag(np.arange(1.0, 7.0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ridge": "1"}, r"solve\(\): ridge='1'; needed a number"),
        ({"max_passes": 2.5}, "max_passes=2.5; needed an integer or None"),
        ({"seed": -1}, "seed=-1; needed an integer from 0 on"),
        ({"seed": True}, "seed=True; needed an integer"),
        ({"method": "cg"}, "method='cg'; needed 'auto', 'eigh', 'cholesky', 'pcg' or 'block_cg'"),
        ({"memory_limit": "much"}, "memory_limit='much'; needed a number of bytes"),
    ],
)
def test_wrong_values_say_what_is_needed(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ntkpipe.solve(K, np.ones(6), **options)


def test_wrong_names_and_missing_arguments_are_errors_of_ours() -> None:
    with pytest.raises(ArgumentError, match=r"solve\(\) has no argument 'rigde'; the nearest is 'ridge'"):
        ntkpipe.solve(K, np.ones(6), rigde=1.0)  # type: ignore[call-arg]
    with pytest.raises(ArgumentError, match=r"solve\(\): missing a required argument: 'rhs'"):
        ntkpipe.solve(K)  # type: ignore[call-arg]
    with pytest.raises(ArgumentError, match=r"KernelRegression\(\) has no argument 'rigde'; the nearest is 'ridge'"):
        ntkpipe.KernelRegression(rigde=1.0)  # type: ignore[call-arg]


def test_numbers_of_numpy_are_numbers() -> None:
    plain = ntkpipe.solve(K, np.ones(6), ridge=0.5, max_passes=50)
    found = ntkpipe.solve(K, np.ones(6), ridge=np.float32(0.5), max_passes=np.int64(50))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.coefficients, plain.coefficients)
    assert found.options["max_passes"] == 50
    assert type(found.options["ridge"]) is float
    times = ntkpipe.dynamics(K, np.ones(6), times=range(1, 3))
    assert times.options["times"] == [1, 2]
