"""The whole spectrum is LAPACK's, in one pass, within the memory that it names; a wrong one is an error."""

import tracemalloc

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law, spectra

from ntkpipe.base import config
from ntkpipe.base.errors import ConfigError, NonFiniteError, ResourceError, SelfCheckError
from ntkpipe.base.resources import process_memory
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.direct import eigh as dense
from ntkpipe.solvers.direct.eigh import eigh, eigvalsh, has_64_bit_integers


@pytest.fixture(params=["syevd", "syevr in place"])
def limit(request):
    """Memory limits under which that driver is chosen, as a function of n and of whether there are vectors."""
    least = {("syevd", False): 2, ("syevd", True): 5, ("syevr in place", False): 1, ("syevr in place", True): 2}

    def of(num_rows, with_vectors):
        panels = 2 * 8 * min(dense._ROWS_AT_ONCE, num_rows) * num_rows
        return int(8 * (least[request.param, with_vectors] + 0.9) * num_rows**2) + panels

    return request.param, of


@pytest.mark.parametrize("name", spectra(300))
def test_spectra_are_those_asked_for(name, monkeypatch, limit):
    driver, of = limit
    monkeypatch.setattr(config, "process_memory", lambda: 0)
    monkeypatch.setattr(dense, "_ROWS_AT_ONCE", 70)
    spectrum = spectra(300)[name]
    matrix = matrix_with_spectrum(spectrum)
    values = eigvalsh(matrix, memory_limit=of(300, False))
    found = eigh(matrix, memory_limit=of(300, True))
    for result in (values, found):
        assert result.status == "converged"
        assert result.options["driver"] == driver
        np.testing.assert_allclose(result.eigenvalues, spectrum, atol=1e-13 * spectrum[0])
        assert max(result.trace_error, result.frobenius_error) < 1e-13
    assert values.eigenvectors is None
    vectors = found.eigenvectors
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(300), atol=1e-12)
    np.testing.assert_allclose(matrix @ vectors, vectors * found.eigenvalues, atol=1e-12 * spectrum[0])


@pytest.mark.parametrize("num_rows", [1, 2, 8, 1025])
def test_float32_kernels_are_solved_in_float64(num_rows):
    matrix = matrix_with_spectrum(power_law(num_rows, condition=1e6) if num_rows > 1 else [2.0]).astype(np.float32)
    operator, copy = DenseOperator(matrix), matrix.copy()
    found = eigvalsh(operator)
    exact = np.linalg.eigvalsh(matrix.astype(np.float64))[::-1]
    np.testing.assert_allclose(found.eigenvalues, exact, atol=1e-12 * exact[0], rtol=0)
    assert found.floor == pytest.approx(operator.storage_floor(), rel=1e-12)
    np.testing.assert_array_equal(matrix, copy)


def test_each_entry_is_read_once():
    operator = DenseOperator(matrix_with_spectrum(power_law(1500, condition=1e4)))
    assert eigvalsh(operator).work.passes <= 1.0


def test_a_zero_matrix_has_zero_eigenvalues():
    found = eigh(np.zeros((5, 5)))
    np.testing.assert_array_equal(found.eigenvalues, np.zeros(5))
    assert found.status == "converged"


def test_in_place_no_second_matrix_is_made(monkeypatch):
    monkeypatch.setattr(config, "process_memory", lambda: 0)
    num_rows = 1200
    operator = DenseOperator(matrix_with_spectrum(power_law(num_rows, condition=1e4)))
    matrix_bytes = 8 * num_rows**2
    tracemalloc.start()
    eigvalsh(operator, memory_limit=int(1.2 * matrix_bytes) + 2 * 8 * 1024 * num_rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * matrix_bytes + 2 * 8 * 1024 * num_rows


def test_what_does_not_fit_is_refused_with_what_does():
    operator = DenseOperator(matrix_with_spectrum(power_law(200, condition=1e4)))
    with pytest.raises(ResourceError, match=r"200 rows takes .* 14 passes and .* density\(matrix\)"):
        eigvalsh(operator, memory_limit=process_memory() + 100_000)
    assert operator.work.passes == 0


def test_beyond_32_bits_numpy_must_count_in_64(monkeypatch):
    matrix = np.diag(np.arange(30.0))
    monkeypatch.setattr(dense, "MOST_ROWS_OF_32_BITS", 29)
    monkeypatch.setattr(dense, "has_64_bit_integers", lambda: True)
    assert eigh(matrix).options["driver"] == "syevd"
    monkeypatch.setattr(dense, "has_64_bit_integers", lambda: False)
    assert eigh(matrix).options["driver"] == "syevr in place"
    monkeypatch.setattr(dense, "MOST_ROWS_OF_32_BITS", 30)
    assert eigh(matrix).options["driver"] == "syevd"


@pytest.mark.parametrize(
    ("configuration", "expected"),
    [
        ("OpenBLAS 0.3.31 USE64BITINT DYNAMIC_ARCH", True),
        ("mkl-dynamic-ilp64-seq", True),
        ("OpenBLAS 0.3.31 DYNAMIC_ARCH", False),
    ],
)
def test_the_integers_of_numpy_are_read_from_its_build(monkeypatch, configuration, expected):
    build = {"Build Dependencies": {"lapack": {"name": "x", "openblas configuration": configuration}}}
    monkeypatch.setattr(np, "show_config", lambda mode: build)
    assert has_64_bit_integers() is expected


@pytest.mark.parametrize(
    ("broken", "error", "words"),
    [
        (lambda values: values * np.nan, NonFiniteError, "NaN"),
        (lambda values: values * 0, SelfCheckError, "trace"),
        (lambda values: values + 1e-9 * values[-1], SelfCheckError, "trace"),
        (lambda values: values * np.where(np.arange(len(values)) % 2, 1 + 1e-10, 1 - 1e-10), SelfCheckError, "trace"),
    ],
)
def test_wrong_eigenvalues_are_an_error(monkeypatch, broken, error, words):
    right = np.linalg.eigvalsh
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda matrix, **options: broken(right(matrix, **options)))
    with pytest.raises(error, match=words):
        eigvalsh(matrix_with_spectrum(power_law(60, condition=10.0)))


@pytest.mark.parametrize("broken", [lambda v: v[:, ::-1], lambda v: v * 1.0000001, lambda v: np.roll(v, 1, axis=0)])
def test_wrong_eigenvectors_are_an_error(monkeypatch, broken):
    right = np.linalg.eigh

    def wrong(matrix, **options):
        values, vectors = right(matrix, **options)
        return values, broken(vectors)

    matrix = matrix_with_spectrum(power_law(60, condition=10.0))
    monkeypatch.setattr(np.linalg, "eigh", wrong)
    with pytest.raises(SelfCheckError, match="eigenvectors"):
        eigh(matrix)


def test_a_failure_of_lapack_is_an_error_of_ours(monkeypatch):
    def fail(matrix, **options):
        raise np.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(np.linalg, "eigvalsh", fail)
    with pytest.raises(SelfCheckError, match="no convergence"):
        eigvalsh(np.eye(4))


@pytest.mark.parametrize("limit_bytes", [0, -1])
def test_a_memory_limit_is_bytes(limit_bytes):
    with pytest.raises(ConfigError, match="memory_limit"):
        eigvalsh(np.eye(4), memory_limit=limit_bytes)


def test_results_print_what_to_trust():
    text = str(eigh(matrix_with_spectrum(power_law(50, condition=1e4))))
    assert "all 50, 10000 to 1" in text
    assert "orthogonality" in text
