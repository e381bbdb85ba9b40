"""Sparse matrices and linear operators of other libraries are matrices for every solver."""

import numpy as np
import pytest
import scipy.sparse
from matrices import check_operator, matrix_with_spectrum, power_law
from scipy.sparse.linalg import LinearOperator, aslinearoperator

import ntkpipe
from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.operators.opening import as_operator
from ntkpipe.operators.products import ProductOperator

N = 30
K = matrix_with_spectrum(power_law(N, condition=1e3, largest=10.0))
Y = np.random.default_rng(0).standard_normal((N, 2))


def by_vectors(matrix):
    return LinearOperator(matrix.shape, matvec=lambda x: matrix.astype(np.float64) @ x, dtype=matrix.dtype)


class Own:
    """Just a shape and products."""

    def __init__(self, matrix):
        self._matrix, self.shape = matrix, matrix.shape

    def __matmul__(self, block):
        return self._matrix @ block


FORMS = {
    "csr_array": scipy.sparse.csr_array,
    "coo_array": scipy.sparse.coo_array,
    "csr_matrix": scipy.sparse.csr_matrix,
    "lil_array": scipy.sparse.lil_array,
    "dia_array": scipy.sparse.dia_array,
    "aslinearoperator": aslinearoperator,
    "by vectors": by_vectors,
    "sum of operators": lambda matrix: 0.5 * aslinearoperator(matrix) + 0.5 * aslinearoperator(matrix),
    "ours and back": lambda matrix: as_operator(matrix).aslinearoperator(),
    "of another library": Own,
}


@pytest.mark.parametrize("make", [scipy.sparse.csr_array, by_vectors])
def test_they_are_operators(make):
    """Entries are exact: a product with a unit vector adds zeros to one."""
    check_operator(lambda matrix: as_operator(make(matrix)), sizes=(1, 7, 40))


@pytest.mark.parametrize("form", FORMS)
def test_solvers_find_what_they_find_of_the_array(form):
    held = FORMS[form](K)
    assert isinstance(as_operator(held), ProductOperator)
    wanted = np.linalg.solve(K + 0.1 * np.eye(N), Y)
    for method in ("auto", "pcg", "cholesky"):
        found = ntkpipe.solve(held, Y, ridge=0.1, method=method, tol=1e-13)
        assert found.is_converged
        np.testing.assert_allclose(found.coefficients, wanted, rtol=0, atol=1e-10)
    values = np.linalg.eigvalsh(K)
    np.testing.assert_allclose(ntkpipe.eigvalsh(held).eigenvalues, values[::-1], rtol=0, atol=1e-13)
    np.testing.assert_allclose(ntkpipe.smallest(held).eigenvalues, values[:1], rtol=0, atol=1e-10)
    np.testing.assert_allclose(ntkpipe.logdet(held).value, np.log(values).sum(), rtol=1e-12)
    assert ntkpipe.spectrum(held).is_converged
    assert ntkpipe.eigsh(held, 3).matrix == ntkpipe.eigsh(FORMS[form](K.copy()), 3).matrix


@pytest.mark.parametrize("dtype", ["f4", "f8", "i8"])
def test_the_dtype_decides_what_is_taken_for_rounding(dtype):
    entries = (100 * K).astype(dtype)
    operator = as_operator(scipy.sparse.csr_array(entries))
    assert operator.storage_dtype == (np.float64 if dtype == "i8" else dtype)
    bent = entries.astype("f8")
    bent[3, 20] += 1e-5 * np.abs(bent).max()
    with pytest.raises(ConfigError, match="not symmetric"):
        as_operator(scipy.sparse.csr_array(bent))


@pytest.mark.parametrize(
    ("matrix", "error", "words"),
    [
        (scipy.sparse.csr_array(K[:, :-1]), ConfigError, r"needed \(n, n\)"),
        (aslinearoperator(np.triu(K)), ConfigError, "not symmetric"),
        (scipy.sparse.csr_array(np.tril(K)), ConfigError, "not symmetric"),
        (aslinearoperator(K + 1j * (np.triu(K) - np.triu(K).T)), ConfigError, "complex128"),
        (scipy.sparse.csr_array(K + 0j), ConfigError, "complex128"),
        (scipy.sparse.csr_array(np.where(np.eye(N) > 0, np.nan, K)), NonFiniteError, "NaN or infinity"),
        (LinearOperator((N, N), matvec=lambda x: x * np.inf, dtype=float), NonFiniteError, "NaN or infinity"),
        (Own(scipy.sparse.csr_array(K)[:-1]), ConfigError, "needed"),
    ],
)
def test_what_is_no_symmetric_matrix(matrix, error, words):
    with pytest.raises(error, match=words):
        ntkpipe.eigsh(matrix, 3)


def test_a_product_that_fails_is_named():
    class Failing(Own):
        def __matmul__(self, block):
            raise self.error

    for error in (TypeError, ZeroDivisionError, KeyError, FloatingPointError):
        Failing.error = error("only tensors")
        with pytest.raises(ConfigError, match=r"the matrix: a Failing whose product .*only tensors"):
            as_operator(Failing(K))

    class Shorter(Own):
        def __matmul__(self, block):
            return (self._matrix @ block)[:-1]

    with pytest.raises(ConfigError, match="product of shape"):
        as_operator(Shorter(K))


def test_work_is_counted_and_one_product_opens_it():
    operator = as_operator(scipy.sparse.csr_array(K))
    assert operator.work.passes == 1
    operator.diagonal()
    operator.frobenius()
    assert operator.work.passes == 2
