"""Kernels that are singular, duplicated or zero, or only rounding away from it: every solver has an honest answer."""

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law

import ntkpipe
from ntkpipe.base.errors import IndefiniteError
from ntkpipe.solvers.linear.preconditioner import nystrom, randomly_pivoted_cholesky

SIZES = (5, 64, 130)


def duplicates(n, rng):
    features = rng.standard_normal((n // 2 + 1, n)) * np.arange(1, n + 1) ** -0.8
    rows = rng.integers(0, n // 2 + 1, n)
    return (features @ features.T)[np.ix_(rows, rows)].astype(np.float32)


def rounded(n, rng):
    return matrix_with_spectrum(power_law(n, condition=1e12), seed=n).astype(np.float32)


def exactly_singular(n, rng):
    features = rng.integers(-3, 4, (n, n // 3 + 1)).astype(np.float64)
    return features @ features.T


FAMILY = {
    "duplicates": duplicates,
    "rounded": rounded,
    "exactly singular": exactly_singular,
    "constant": lambda n, rng: np.full((n, n), 2.0, np.float32),
    "one row": lambda n, rng: np.diag(np.eye(n)[0]),
    "zero": lambda n, rng: np.zeros((n, n)),
}


@pytest.fixture(params=[(name, n) for name in FAMILY for n in SIZES], ids=str)
def matrix(request, rng):
    name, n = request.param
    values = FAMILY[name](n, rng)
    return (values + values.T) / 2


@pytest.mark.parametrize("make", [randomly_pivoted_cholesky, nystrom])
@pytest.mark.parametrize("rank", [None, "most"])
def test_preconditioners_are_positive_definite(make, rank, matrix, rng):
    rhs = rng.standard_normal((len(matrix), 2))
    found = make(matrix, rank and len(matrix))
    whitened = found.inverse_sqrt(found.inverse_sqrt(rhs))
    assert np.isfinite(found.logdet())
    np.testing.assert_allclose(whitened, found.solve(rhs), rtol=1e-6, atol=1e-9 * np.abs(whitened).max())
    assert (np.einsum("ij,ij->j", rhs, whitened) > 0).all()
    assert (found.values >= 0).all()


def test_no_solver_calls_them_indefinite(matrix, rng):
    targets = rng.standard_normal((len(matrix), 2))
    values = np.linalg.eigvalsh(matrix.astype(np.float64))
    smallest = ntkpipe.smallest(matrix)
    found = [
        smallest,
        ntkpipe.eigh(matrix),
        ntkpipe.eigsh(matrix, 2),
        ntkpipe.density(matrix),
        ntkpipe.slq_logdet(matrix),
        ntkpipe.solve(matrix, targets),
        ntkpipe.dynamics(matrix, targets, times=[0.0, 1.0], learning_rate=0.1),
    ]
    try:
        found.append(ntkpipe.logdet(matrix))
    except IndefiniteError as error:
        messages = [str(error)]
    else:
        messages = []
    messages += [one.message for one in found]
    assert not [message for message in messages if "semi-definite" in message or "beyond what" in message]
    assert smallest.high >= values[0] - 1e-12 * max(values[-1], 1e-300)
    if matrix.any():
        assert np.isfinite(ntkpipe.logdet(matrix, jitter="auto").value)
