"""What is said where a kernel is not positive definite: the verdict is λ_min's, and advice that is followed works."""

import re
import warnings

import numpy as np
import pytest
from matrices import matrix_with_spectrum

import ntkpipe
from ntkpipe.base.errors import IndefiniteError

EPS = float(np.finfo(np.float64).eps)
SEEDS = range(20)


def exponential(n, seed, digits=18.0):
    return matrix_with_spectrum(10.0 ** np.linspace(0.0, -digits, n), seed=seed)


def low_rank(n, seed):
    features = np.random.default_rng(seed).standard_normal((n, max(1, n // 3)))
    return features @ features.T


def duplicates(n, seed):
    rows = np.random.default_rng(seed).integers(0, n // 2 + 1, n)
    return exponential(n // 2 + 1, seed, 3.0)[np.ix_(rows, rows)]


def zero_rows(n, seed):
    matrix = exponential(n, seed, 4.0)
    matrix[:, : n // 2 + 1] = matrix[: n // 2 + 1] = 0.0
    return matrix


def one_large_row(n, seed):
    sizes = np.where(np.arange(n) == 0, 1e6, 1.0)
    return sizes[:, None] * exponential(n, seed) * sizes


def heavy_rows(n, seed):
    features = np.exp(1.5 * np.random.default_rng(seed).standard_normal((n, 2)))
    return features @ features.T


def integers(n, seed):
    features = np.random.default_rng(seed).integers(-3, 4, (n, n // 3 + 1))
    return features @ features.T


# Kernels that are positive semi-definite but for rounding.
SINGULAR = {
    "exponential": exponential,
    "exponential in float32": lambda n, seed: exponential(n, seed).astype(np.float32),
    "power law": lambda n, seed: matrix_with_spectrum((1.0 + np.arange(n)) ** -9.0, seed=seed),
    "clusters": lambda n, seed: matrix_with_spectrum(np.where(np.arange(n) < n / 2, 1.0, 1e-17), seed=seed),
    "low rank": low_rank,
    "low rank in float32": lambda n, seed: low_rank(n, seed).astype(np.float32),
    "duplicates": duplicates,
    "duplicates in float32": lambda n, seed: duplicates(n, seed).astype(np.float32),
    "small": lambda n, seed: exponential(n, seed) * 2.0**-100,
    "large": lambda n, seed: exponential(n, seed) * 2.0**100,
    "denormal in float32": lambda n, seed: (exponential(n, seed) * 2.0**-135).astype(np.float32),
    "float16": lambda n, seed: exponential(n, seed, 6.0).astype(np.float16),
    "long double": lambda n, seed: exponential(n, seed).astype(np.longdouble),
    "zero": lambda n, seed: np.zeros((n, n)),
    "zero in float32": lambda n, seed: np.zeros((n, n), np.float32),
    "zero rows": zero_rows,
    "one large row": one_large_row,
    "heavy rows in float32": lambda n, seed: heavy_rows(n, seed).astype(np.float32),
    "integers": integers,
}
INDEFINITE = {
    "slightly": lambda n, seed: matrix_with_spectrum([*10.0 ** np.linspace(0.0, -18.0, n - 1), -1e-11], seed=seed),
    "clearly": lambda n, seed: matrix_with_spectrum([*10.0 ** np.linspace(0.0, -3.0, n - 1), -0.1], seed=seed),
    "negative": lambda n, seed: -exponential(n, seed, 3.0),
    "a diagonal entry": lambda n, seed: np.diag(np.where(np.arange(n) == n - 1, -1e-3, 1.0)),
}


def regression(kernel, targets, ridge, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ntkpipe.KernelRegression(ridge=ridge, method="cholesky", **options).fit(kernel, targets).result_


# All that say which ridge helps.
CALLS = {
    "cholesky": lambda k, y, r: ntkpipe.cholesky(k, ridge=r),
    "panels": lambda k, y, r: ntkpipe.cholesky(k, ridge=r, panel_width=1),
    "solve": lambda k, y, r: ntkpipe.solve(k, y, ridge=r, method="cholesky"),
    "solve to 1e-10": lambda k, y, r: ntkpipe.solve(k, y, ridge=r, method="cholesky", tol=1e-10),
    "eigenpairs": lambda k, y, r: ntkpipe.solve(k, y, ridge=r, method="eigh"),
    "pcg": lambda k, y, r: ntkpipe.solve(k, y, ridge=r, method="pcg"),
    "block_cg": lambda k, y, r: ntkpipe.solve(k, np.stack([y, y**2], axis=1), ridge=r, method="block_cg"),
    "solve_path": lambda k, y, r: ntkpipe.solve_path(k, y, [r], method="cholesky"),
    "gaussian_process": lambda k, y, r: ntkpipe.gaussian_process(k, y, ridge=r, method="cholesky"),
    "logdet": lambda k, y, r: ntkpipe.logdet(k, ridge=r),
    "ridge_path by either": lambda k, y, r: ntkpipe.ridge_path(k, y, ridges=[r]),
    "ridge_path": lambda k, y, r: ntkpipe.ridge_path(k, y, ridges=[r], method="cholesky"),
    "ridge_path by eigenpairs": lambda k, y, r: ntkpipe.ridge_path(k, y, ridges=[r], method="eigh"),
    "regression": regression,
}


def said(call, *arguments):
    """What is said of a kernel without a ridge: an error, or a status; nothing if it passes for definite."""
    try:
        found = call(*arguments, 0.0)
    except IndefiniteError as error:
        return str(error)
    return "" if found.is_converged else found.message


@pytest.mark.parametrize("n", [1, 2, 5, 20])
@pytest.mark.parametrize("name", [*SINGULAR, *INDEFINITE])
@pytest.mark.parametrize("by", CALLS)
def test_advice_that_is_followed_works(by, name, n):
    if name in INDEFINITE and n == 1:
        pytest.skip("needs two eigenvalues")
    kernel, targets = (SINGULAR | INDEFINITE)[name](n, n), np.random.default_rng(n).standard_normal(n)
    if not (words := said(CALLS[by], kernel, targets)):
        return
    assert ("not positive semi-definite" in words) == (name in INDEFINITE)
    assert "jitter" not in words or by in {"cholesky", "panels", "logdet"}
    ridge = float(re.search(r"(?:ridge (?:of|by)|one of) at least ([-+.e\d]*\d)", words)[1])
    found = CALLS[by](kernel, targets, ridge)
    assert found.is_converged, found.message


@pytest.mark.parametrize("name", [name for name in SINGULAR if "zero" not in name])
@pytest.mark.parametrize("seed", SEEDS)
def test_rounding_alone_is_never_called_indefinite(name, seed):
    for n in (3, 40):
        kernel = SINGULAR[name](n, seed)
        words = said(CALLS["cholesky"], kernel, None)
        assert "not positive semi-definite" not in words
        if "jitter" in words:
            assert ntkpipe.cholesky(kernel, jitter="auto").jitter > 0.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("share", [0.0, 0.4, 2.5, 30.0, 1e4])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_verdict_is_that_of_the_smallest_eigenvalue(seed, share, dtype):
    """Below zero by a share of what the storage floor and arithmetic explain; a planted one may be moved by both."""
    for n in (2, 7, 40):
        values = 10.0 ** np.linspace(0.0, -18.0, n)
        values[-1] = -share * (float(np.finfo(dtype).eps) * np.linalg.norm(values) / n**0.5 + n * EPS)
        kernel = matrix_with_spectrum(values, seed=seed).astype(dtype)
        exact = kernel.astype(np.float64)
        least = np.linalg.eigvalsh(exact)[0]
        explained = float(np.finfo(dtype).eps) * np.linalg.norm(exact) / n**0.5 + n * EPS * np.linalg.norm(exact, 2)
        for by in ("cholesky", "eigenpairs"):
            words = said(CALLS[by], kernel, np.ones(n))
            assert ("not positive semi-definite" in words) == (least < -explained) or not words


def test_other_units_of_the_ridge_are_not_taken_for_absolute():
    kernel = exponential(8, 0) * 1e-6
    with pytest.raises(IndefiniteError, match="absolute ridge of at least") as caught:
        ntkpipe.solve(kernel, np.ones(8), ridge=0.0, ridge_scale="mean_diagonal", method="cholesky")
    assert regression(kernel, np.ones(8), caught.value.ridge, ridge_scale=None).is_converged
