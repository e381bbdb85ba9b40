"""Log determinants by a factor, and how far stored entries let them be known."""

import json

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law, spectra

from ntkpipe.base.errors import ConfigError, IndefiniteError
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.spectral.logdet import logdet

N = 300
DEFINITE = ("power_law_1e4", "power_law_1e6", "power_law_1e8", "power_law_1e10", "clustered", "spiked")


@pytest.mark.parametrize("name", DEFINITE)
def test_it_is_lapacks(name, tmp_path):
    matrix = matrix_with_spectrum(spectra(N)[name])
    for path in (None, tmp_path):
        found = logdet(matrix, path=path)
        assert found.value == pytest.approx(np.linalg.slogdet(matrix)[1], rel=1e-10)
        assert found.is_converged
        assert json.loads(json.dumps(found.to_json()))["value"] == found.value
        assert f"{found.value:.12g}" in str(found)


@pytest.mark.parametrize("condition", [1e4, 1e6, 3e7])
def test_the_storage_error_is_what_rounding_to_float32_does(condition):
    errors = []
    for seed in range(6):
        matrix = matrix_with_spectrum(power_law(N, condition=condition), seed=seed)
        stored = matrix.astype(np.float32)
        found = logdet((stored + stored.T) / 2)
        errors.append((found.value - np.linalg.slogdet(matrix)[1]) / found.storage_error)
    # The deviation of an entry is taken for the largest that rounding can have, so the estimate is on the safe side.
    size = np.sqrt(np.mean(np.square(errors)))
    assert 0.05 < size < 1.5
    assert np.abs(errors).max() < 3


def test_a_determinant_that_storage_leaves_open_is_not_called_converged():
    """Many eigenvalues near the storage floor: definite with a ridge of its size, but which determinant?"""
    matrix = matrix_with_spectrum(np.concatenate([np.full(10, 1e4), np.zeros(N - 10)])).astype(np.float32)
    matrix = (matrix + matrix.T) / 2
    floor = DenseOperator(matrix).storage_floor()
    found = logdet(matrix, ridge=2 * floor)
    assert found.status == "indefinite at storage precision"
    assert "larger ridge" in found.message
    assert logdet(matrix, ridge=1e4 * floor).is_converged


def test_it_costs_a_pass_and_a_half_and_goes_on_from_a_stored_factor(tmp_path):
    operator = DenseOperator(matrix_with_spectrum(spectra(N)["clustered"]))
    first = logdet(operator, path=tmp_path)
    assert first.work.passes <= 2
    before = operator.work
    assert logdet(operator, path=tmp_path).value == first.value
    assert operator.work == before


def test_an_indefinite_matrix_has_none():
    with pytest.raises(IndefiniteError):
        logdet(matrix_with_spectrum(spectra(N)["indefinite"]))


@pytest.mark.parametrize("size", [1, 8])
def test_small_matrices(size):
    assert logdet(2.0 * np.eye(size)).value == pytest.approx(size * np.log(2.0), rel=1e-15)


def test_either_method_records_its_options_and_counts_its_work_once():
    matrix, seen = matrix_with_spectrum(power_law(60, condition=1e3)), []
    for method in ("cholesky", "slq"):
        operator = DenseOperator(matrix)
        found = logdet(operator, ridge=1.0, method=method, memory_limit="64GiB")
        assert found.work.passes == operator.work.passes
        assert (found.options["method"], found.options["memory_limit"]) == (method, 2**36)
        seen.append(found.value)
    assert seen[0] == pytest.approx(seen[1], abs=0.05 * 60)
    for wrong in ({"method": "slq", "jitter": "auto"}, {"rank": 3}, {"seed": 0}):
        with pytest.raises(ConfigError, match="no option of method="):
            logdet(matrix, ridge=1.0, **wrong)
