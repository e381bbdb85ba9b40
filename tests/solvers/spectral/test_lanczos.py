"""Leading pairs are those of LAPACK whatever the spectrum; residuals are true; interrupted calls end in equal bits."""

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law, spectra

from ntkpipe.base import config
from ntkpipe.base.errors import ConfigError, NonFiniteError, ResourceError
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.spectral.lanczos import eigsh
from ntkpipe.store.results import Checkpoint


def counted(matrix):
    """An operator that notes the columns of each product."""
    operator, widths = DenseOperator(matrix), []
    multiply = operator._multiply

    def watched(block):
        widths.append(block.shape[1])
        return multiply(block)

    operator._multiply = watched
    return operator, widths


def check(found, matrix, *, tol=1e-6):
    """Everything that a result says of itself, against LAPACK and plain products."""
    matrix = np.asarray(matrix, np.float64)
    k = len(found.eigenvalues)
    exact = np.linalg.eigvalsh(matrix)[::-1]
    norms = np.linalg.norm(matrix @ found.eigenvectors - found.eigenvectors * found.eigenvalues, axis=0)
    scale = np.maximum(abs(found.eigenvalues), max(found.floor, 1e-300))
    rounding = 1e-13 * abs(exact).max()
    np.testing.assert_allclose(found.residuals * scale, norms, atol=rounding)
    assert (norms <= tol * scale + rounding).all()
    gram = found.eigenvectors.T @ found.eigenvectors - np.eye(k)
    assert abs(gram).max() <= found.orthogonality + 1e-14 < 1e-12
    assert (np.diff(found.eigenvalues) <= rounding).all()
    # Each value is within its residual of some eigenvalue; that none was missed makes it the one of the same place.
    np.testing.assert_allclose(found.eigenvalues, exact[:k], atol=rounding, rtol=tol)


@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("name", spectra(400))
def test_pairs_are_those_of_lapack(name, k):
    matrix = matrix_with_spectrum(spectra(400)[name])
    found = eigsh(matrix, k)
    assert found.status == "converged"
    check(found, matrix)
    assert found.work.passes == len(found.history) + 1


@pytest.mark.parametrize("name", spectra(120))
def test_all_pairs(name):
    matrix = matrix_with_spectrum(spectra(120)[name])
    found = eigsh(matrix, 120)
    assert found.status == "converged"
    check(found, matrix)


@pytest.mark.parametrize(
    ("matrix", "k"),
    [
        (np.ones((1, 1)), 1),
        (np.zeros((5, 5)), 3),
        (np.eye(8), 8),
        (np.eye(200), 10),
        (np.ones((90, 90)), 20),
        (np.diag(np.arange(60.0)), 60),
        (-np.diag(np.arange(1.0, 61.0)), 5),
        (np.diag([1.0, *[0.0] * 199]), 3),
        (np.diag(np.repeat([3.0, 1.0], [70, 230])), 60),
    ],
)
def test_spaces_that_are_exhausted(matrix, k):
    found = eigsh(matrix, k)
    assert found.status == "converged"
    check(found, matrix)


def test_three_lines_on_a_small_array(rng):
    rows = rng.standard_normal((8, 8))
    found = eigsh(rows @ rows.T, 2)
    check(found, rows @ rows.T)
    assert "2 of 2 residuals" in str(found)
    assert found.eigenvectors.shape == (8, 2)


def test_a_higher_multiplicity_than_the_block_is_not_missed():
    matrix = matrix_with_spectrum(np.concatenate([np.full(30, 5.0), np.full(270, 1.0)]))
    found = eigsh(matrix, 30, block=8)
    np.testing.assert_allclose(found.eigenvalues, 5.0, rtol=1e-9)


def test_kernel_like_spectra_take_few_passes():
    matrix = matrix_with_spectrum(power_law(1500, condition=1e6))
    operator, widths = counted(matrix)
    found = eigsh(operator, 60)
    assert widths == [30] * (len(widths) - 1) + [60]
    assert sum(widths) <= 14 * 30
    assert found.work.passes == len(widths)


@pytest.mark.parametrize("max_basis", [None, 160])
def test_restarts_find_the_same_pairs(max_basis):
    matrix = matrix_with_spectrum(power_law(600, condition=1e4))
    found = eigsh(matrix, 40, block=12, max_basis=max_basis, tol=1e-9)
    assert found.status == "converged"
    assert len(found.history) * 12 > (max_basis or 0)
    check(found, matrix, tol=1e-9)


def test_residuals_of_the_history_are_true():
    """After p passes without refinement they are those of the Rayleigh-Ritz pairs of the whole block Krylov space."""
    matrix, history = matrix_with_spectrum(power_law(200, condition=1e4)), []
    found = eigsh(matrix, 10, monitor=lambda step: history.append(step.residual))
    start = np.linalg.qr(np.random.default_rng(0).standard_normal((200, 8)))[0]
    powers = [start]
    for passes, expected in enumerate(found.history[:5], 1):
        basis = np.linalg.qr(np.concatenate(powers, axis=1))[0]
        values, turn = np.linalg.eigh(basis.T @ matrix @ basis)
        vectors = (basis @ turn)[:, ::-1][:, :10]
        norms = np.linalg.norm(matrix @ vectors - vectors * values[::-1][:10], axis=0)
        if passes > 1:
            np.testing.assert_allclose(expected[1], (norms / values[::-1][:10]).max(), rtol=1e-6)
        powers.append(np.linalg.qr(matrix @ powers[-1])[0])
    assert np.isnan(found.history[0]).all()
    np.testing.assert_array_equal(found.history[1:, 1], history[1:-1])


def test_float32_storage_says_what_is_not_known():
    spectrum = np.concatenate([np.geomspace(1e4, 1.0, 20), np.geomspace(1e-6, 1e-8, 180)])
    matrix = matrix_with_spectrum(spectrum).astype(np.float32)
    found = eigsh(matrix, 40)
    check(found, matrix)
    assert found.floor == pytest.approx(DenseOperator(matrix).storage_floor(), rel=1e-6)
    assert "below the storage floor" in found.message


def test_too_few_passes_are_said():
    matrix = matrix_with_spectrum(power_law(300, condition=1e4))
    found = eigsh(matrix, 30, max_passes=3)
    assert found.status == "step limit"
    assert found.residuals.max() > 1e-6
    assert "raise max_passes" in found.message


def test_a_tolerance_below_rounding_is_not_said_to_be_met():
    matrix = matrix_with_spectrum(power_law(300, condition=1e8))
    found = eigsh(matrix, 30, tol=1e-15)
    assert "at the rounding of float64 products" in found.message


def test_a_matrix_that_is_none_stagnates():
    """Products that are wrong by more than rounding, as of a faulty worker, are seen by the check."""
    operator = DenseOperator(matrix_with_spectrum(power_law(200, condition=1e4)))
    multiply, noise = operator._multiply, np.random.default_rng(0)
    operator._multiply = lambda block: multiply(block) + 1e-3 * noise.standard_normal(block.shape)
    found = eigsh(operator, 10, tol=1e-8, max_passes=40)
    assert found.status in {"stagnated", "step limit"}
    assert found.residuals.max() > 1e-8


def same(first, second):
    """Equal to the last bit."""
    assert (first.status, first.message) == (second.status, second.message)
    for name, values in first.arrays().items():
        np.testing.assert_array_equal(values, second.arrays()[name])


@pytest.mark.parametrize("k_and_basis", [(12, None), (12, 30), (50, None)])
def test_interrupted_at_any_pass_it_goes_on_to_the_same_bits(tmp_path, k_and_basis):
    k, max_basis = k_and_basis
    matrix = matrix_with_spectrum(power_law(300, condition=1e4))
    matrix = matrix if k == 12 else matrix_with_spectrum(spectra(100)["singular"])
    options = {"k": k, "max_basis": max_basis}
    whole = eigsh(matrix, **options)
    num_passes = int(whole.work.passes)
    for stop in range(1, num_passes + 1):
        checkpoint = Checkpoint(tmp_path / str(stop), "pairs")

        def interrupt(step, stop=stop):
            if step.work.passes >= stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            eigsh(matrix, **options, checkpoint=checkpoint, monitor=interrupt)
        operator = DenseOperator(matrix)
        resumed = eigsh(operator, **options, checkpoint=checkpoint)
        assert operator.work.passes == num_passes - stop
        assert resumed.work.passes == num_passes
        same(resumed, whole)


def test_interrupted_at_every_pass(tmp_path):
    matrix, checkpoint = matrix_with_spectrum(power_law(300, condition=1e4)), Checkpoint(tmp_path, "pairs")

    def interrupt(step):
        raise KeyboardInterrupt

    whole = eigsh(matrix, 12, max_basis=30)
    for _ in range(int(whole.work.passes)):
        with pytest.raises(KeyboardInterrupt):
            eigsh(matrix, 12, max_basis=30, checkpoint=checkpoint, monitor=interrupt)
    operator = DenseOperator(matrix)
    same(eigsh(operator, 12, max_basis=30, checkpoint=checkpoint), whole)
    assert operator.work.passes == 0


def test_more_passes_go_on_where_the_limit_was(tmp_path):
    matrix, checkpoint = matrix_with_spectrum(power_law(300, condition=1e4)), Checkpoint(tmp_path, "pairs")
    short = eigsh(matrix, np.int64(12), max_passes=np.int32(3), checkpoint=checkpoint)
    assert eigsh(matrix, 12, max_passes=3, checkpoint=checkpoint).work == short.work
    found = eigsh(matrix, 12, checkpoint=checkpoint)
    assert found.status == "converged"
    np.testing.assert_array_equal(found.eigenvalues, eigsh(matrix, 12).eigenvalues)


def test_the_checkpoint_of_another_calculation_is_refused(tmp_path):
    matrix, checkpoint = matrix_with_spectrum(power_law(100, condition=1e4)), Checkpoint(tmp_path, "pairs")
    eigsh(matrix, 5, checkpoint=checkpoint)
    for other, options, word in (
        (2 * matrix, {}, "matrix="),
        (matrix, {"seed": 1}, "seed=0 "),
        (matrix, {"tol": 1e-3}, "tol="),
    ):
        with pytest.raises(ConfigError, match=word):
            eigsh(other, 5, checkpoint=checkpoint, **options)


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"k": 21}, {"tol": -1.0}, {"tol": np.nan}, {"block": 0}, {"max_basis": 6}, {"max_passes": 0}]
)
def test_bad_numbers_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        eigsh(np.eye(20), **{"k": 5, "block": 2, **options})


def test_a_matrix_with_nan_is_refused():
    matrix = np.eye(20)
    matrix[3, 3] = np.nan
    with pytest.raises(NonFiniteError):
        eigsh(matrix, 5)


@pytest.mark.parametrize("memory_limit", [None, 10**9 + 8 * 300 * 150])
def test_vectors_that_do_not_fit_are_refused_at_once(monkeypatch, memory_limit):
    monkeypatch.setattr(config, "process_memory", lambda: 10**9)
    monkeypatch.setattr(config, "available_memory", lambda: 8 * 300 * 150)
    operator = DenseOperator(matrix_with_spectrum(power_law(300, condition=1e4)))
    with pytest.raises(ResourceError, match="smaller max_basis"):
        eigsh(operator, 20, memory_limit=memory_limit)
    assert operator.work.passes == 0
    assert eigsh(operator, 20, max_basis=45, memory_limit=memory_limit).status == "converged"


@pytest.mark.parametrize(("n", "k"), [(65, 3), (65, 8), (72, 10), (72, 11)])
def test_a_last_block_may_be_narrower_than_the_others(n, k):
    matrix = matrix_with_spectrum(np.geomspace(3.0, 0.1, n))
    found = eigsh(matrix, k)
    np.testing.assert_allclose(found.eigenvalues, np.geomspace(3.0, 0.1, n)[:k], rtol=1e-10)
