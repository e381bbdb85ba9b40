"""Theory of test losses: explicit inverses and refits, simulations where KARE is right, streamed against exact."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge

from ntkpipe.analysis.eigenlearning import eigenlearning
from ntkpipe.analysis.generalisation import generalisation
from ntkpipe.base.errors import ConfigError

RIDGES = [0.0, 1e-3, 0.3, 5.0, 400.0]


def features(num_rows: int, num_features: int, rng: np.random.Generator, exponent: float = 1.2) -> np.ndarray:
    return rng.standard_normal((num_rows, num_features)) * np.arange(1, num_features + 1) ** (-exponent / 2)


@pytest.fixture(scope="module")
def problem() -> SimpleNamespace:
    rng = np.random.default_rng(7)
    every = features(170, 400, rng)
    targets = every @ rng.standard_normal((400, 2)) + 0.1 * rng.standard_normal((170, 2))
    kernel = every @ every.T
    return SimpleNamespace(
        kernel=kernel[:120, :120], test_kernel=kernel[120:, :120], targets=targets[:120], test_targets=targets[120:]
    )


def test_every_number_is_its_formula_with_an_explicit_inverse(problem):
    found = generalisation(
        problem.kernel,
        problem.targets,
        ridges=RIDGES,
        test_kernel=problem.test_kernel,
        test_targets=problem.test_targets,
    )
    n = 120
    for index, ridge in enumerate(RIDGES):
        inverse = np.linalg.inv(problem.kernel + ridge * np.eye(n))
        # As in the paper: the ridge is on K/n.
        theirs = np.linalg.inv(problem.kernel / n + ridge / n * np.eye(n))
        upper = [y @ theirs @ theirs @ y / n for y in problem.targets.T]
        assert found.kare[index] == pytest.approx(np.mean(upper) / (np.trace(theirs) / n) ** 2, rel=1e-8)
        hat = problem.kernel @ inverse
        rest = np.eye(n) - hat
        if ridge:
            crossed = np.mean((rest @ problem.targets) ** 2) / (np.trace(rest) / n) ** 2
            assert found.generalised_cross_validation[index] == pytest.approx(crossed, rel=1e-8)
        assert found.train_loss[index] == pytest.approx(np.mean((rest @ problem.targets) ** 2), rel=1e-6, abs=1e-12)
        assert found.effective_dimension[index] == pytest.approx(np.trace(hat), rel=1e-8)
        assert found.kappa[index] == pytest.approx(1 / np.trace(inverse), rel=1e-8)
        coefficient = n * np.trace(inverse @ inverse) / np.trace(inverse) ** 2
        assert found.overfitting_coefficient[index] == pytest.approx(coefficient, rel=1e-8)
        model = KernelRidge(alpha=max(ridge, 1e-12), kernel="precomputed").fit(problem.kernel, problem.targets)
        predicted = model.predict(problem.test_kernel)
        assert found.test_loss[index] == pytest.approx(np.mean((predicted - problem.test_targets) ** 2), rel=1e-8)
        values, vectors = np.linalg.eigh(problem.kernel)
        powers = (vectors.T @ problem.targets) ** 2 / n
        expected = eigenlearning(np.maximum(values, 0) / n, powers, n, ridge).test_loss.mean()
        assert found.eigenlearning[index] == pytest.approx(expected, rel=1e-7, abs=1e-12)
        assert found.canatar[index] == pytest.approx(expected, rel=1e-7, abs=1e-12)
        total = found.learnabilities[index].sum() + (ridge / found.eigenlearning_kappa[index] if ridge else 0)
        assert total == pytest.approx(n, rel=1e-9)
    assert found.kare_ratio == pytest.approx(found.kare / found.test_loss)
    assert found.eigenlearning_ratio == pytest.approx(found.eigenlearning / found.test_loss)


@pytest.mark.parametrize("width", [1, 2])
def test_leave_one_out_equals_refits_without_each_sample(problem, width):
    kernel = problem.kernel if width == 1 else np.kron(problem.kernel[:60, :60], np.eye(2)) + problem.kernel
    targets = problem.targets[: 120 // width]
    found = generalisation(kernel, targets, ridges=[0.2, 3.0])
    for index, ridge in enumerate([0.2, 3.0]):
        errors = []
        rows = targets if width == 1 else targets.reshape(-1, 1)
        for sample in range(120 // width):
            out = np.arange(sample * width, (sample + 1) * width)
            kept = np.delete(np.arange(120), out)
            system = kernel[np.ix_(kept, kept)] + ridge * np.eye(len(kept))
            errors.append(kernel[np.ix_(out, kept)] @ np.linalg.solve(system, rows[kept]) - rows[out])
        assert found.leave_one_out_loss[index] == pytest.approx(np.mean(np.square(errors)), rel=1e-8)


def test_full_kernel_of_outputs_apart_has_the_losses_of_the_small_one(problem):
    """K ⊗ I is a full NTK whose outputs do not interact: it predicts the same."""
    small = generalisation(
        problem.kernel,
        problem.targets,
        ridges=[0.5],
        test_kernel=problem.test_kernel,
        test_targets=problem.test_targets,
    )
    full = generalisation(
        np.kron(problem.kernel, np.eye(2)),
        problem.targets,
        ridges=[0.5],
        test_kernel=np.kron(problem.test_kernel, np.eye(2)),
        test_targets=problem.test_targets,
    )
    for name in ("test_loss", "test_loss_error", "train_loss", "kare", "leave_one_out_loss", "overfitting_coefficient"):
        assert getattr(full, name) == pytest.approx(getattr(small, name), rel=1e-9), name


def test_kare_is_right_for_gaussian_features_and_trusted_there(rng):
    ratios = []
    for _ in range(40):
        train, test = features(150, 600, rng), features(400, 600, rng)
        direction = rng.standard_normal(600)
        found = generalisation(
            train @ train.T,
            train @ direction,
            ridges=[1e-3, 1.0],
            test_kernel=test @ train.T,
            test_targets=test @ direction,
        )
        ratios.append(found.kare_ratio)
        alone = generalisation(train @ train.T, train @ direction, ridges=[1e-3, 1.0], tolerance=0.2)
        assert alone.kare_is_trusted == (True, True)
    mean, error = np.mean(ratios, axis=0), np.std(ratios, axis=0, ddof=1) / 40**0.5
    assert np.all(np.abs(mean - 1) < 3 * error)
    assert error.max() < 0.06


def test_samples_unlike_each_other_make_kare_untrusted(rng):
    """Half of the samples are copies but for a little: G_ii is large for them and small for the rest."""
    near = np.repeat(rng.standard_normal((20, 30)), 5, axis=0) + 0.02 * rng.standard_normal((100, 30))
    inputs = np.vstack([near, 2 * rng.standard_normal((100, 30))])
    kernel = np.exp(-0.05 * ((inputs[:, None] - inputs[None]) ** 2).sum(-1))
    found = generalisation(kernel, np.sin(inputs[:, 0]), ridges=[1e-6, 1e3])
    assert found.kare_is_trusted == (False, True)
    assert abs(found.kare[0] / found.leave_one_out_loss[0] - 1) > 0.1
    assert "off leave-one-out" in found.reasons[0]
    assert "trust none" in str(found)
    assert not found.eigenlearning_is_trusted[0]


def test_a_kernel_that_knows_its_train_targets_is_not_trusted(problem):
    """As after training: their direction is in the kernel of train samples, and theory is wrong about new ones."""
    seen = problem.targets[:, 0]
    kernel = problem.kernel + 5.0 * np.outer(seen, seen)
    arguments = {"ridges": [0.5], "test_kernel": problem.test_kernel, "test_targets": problem.test_targets[:, 0]}
    found = generalisation(kernel, seen, **arguments)
    assert found.leave_one_out_ratio[0] < 0.8
    assert found.kare_is_trusted == (False,)
    assert "as after training" in found.reasons[0]
    without = generalisation(kernel, seen, ridges=[0.5], tolerance=0.3)
    assert without.kare_is_trusted == (True,)


def test_what_storage_does_not_know_is_not_trusted(problem):
    """The smallest eigenvalue of float32 entries is three storage floors: positive, and not known."""
    values, vectors = np.linalg.eigh(problem.kernel)
    floor = np.finfo(np.float32).eps * np.linalg.norm(values) / 120**0.5
    values[0] = 3 * floor
    kernel = ((vectors * values) @ vectors.T).astype(np.float32)
    kernel = (kernel + kernel.T) / 2
    found = generalisation(kernel, problem.targets, ridges=[0.0, 10.0], tolerance=1.0)
    assert 0 < np.linalg.eigvalsh(kernel.astype(np.float64))[0] < 10 * found.floor
    assert found.kare_is_trusted == (False, True)
    assert "storage floor" in found.reasons[0]
    assert "raise λ" in found.reasons[0]


def test_a_limit_of_a_tenth_of_the_kernel_is_streamed_with_errors_that_hold(problem):
    arguments = {
        "ridges": RIDGES,
        "test_kernel": problem.test_kernel,
        "test_targets": problem.test_targets,
    }
    exact = generalisation(problem.kernel, problem.targets, **arguments)
    found = generalisation(
        problem.kernel, problem.targets, memory_limit=problem.kernel.nbytes // 10, tol=1e-11, **arguments
    )
    assert found.method == "streamed"
    assert found.is_converged
    for name in ("test_loss", "train_loss"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), rtol=1e-6, err_msg=name)
    for name in ("kare", "leave_one_out_loss", "kappa", "overfitting_coefficient", "effective_dimension"):
        gap, error = np.abs(getattr(found, name) - getattr(exact, name)), getattr(found, f"{name}_error")
        assert np.all(gap <= 4 * error + 1e-9), name
        assert not getattr(exact, f"{name}_error").any(), name
    assert np.all(found.kare_error < 0.1 * found.kare)
    assert np.isnan(found.eigenlearning).all()


def test_streamed_full_kernels_leave_all_rows_of_a_sample_out(problem):
    kernel = np.kron(problem.kernel[:60, :60], np.eye(2)) + problem.kernel
    given = {"ridges": [1e-2, 1e3], "num_probes": 60, "tol": 1e-12}
    found = generalisation(kernel, problem.targets[:60], method="streamed", **given)
    exact = generalisation(kernel, problem.targets[:60], method="exact", **given)
    np.testing.assert_allclose(found.leave_one_out_loss, exact.leave_one_out_loss, rtol=1e-6)
    assert found.eigenlearning_is_trusted == (False, False)


def test_given_pairs_are_used(problem):
    ascending, vectors = np.linalg.eigh(problem.kernel)
    pairs = SimpleNamespace(eigenvalues=ascending[::-1], eigenvectors=vectors[:, ::-1])
    found = generalisation(problem.kernel, problem.targets, ridges=RIDGES, eigenpairs=pairs)
    expected = generalisation(problem.kernel, problem.targets, ridges=RIDGES)
    assert found.method == "exact"
    assert found.kare == pytest.approx(expected.kare, rel=1e-9)
    assert np.isnan(found.test_loss).all()
    assert "no test data" in str(found)


def test_ridges_in_mean_diagonals_and_the_order_they_were_given_in(problem):
    scale = problem.kernel.diagonal().mean()
    found = generalisation(problem.kernel, problem.targets, ridges=[1.0, 0.01, 0.1], ridge_scale="mean_diagonal")
    assert found.ridges == pytest.approx([scale, 0.01 * scale, 0.1 * scale])
    assert found.effective_dimension[1] > found.effective_dimension[2] > found.effective_dimension[0]


def test_bad_input_is_refused(problem):
    with pytest.raises(ConfigError, match="without test targets"):
        generalisation(problem.kernel, problem.targets, test_kernel=problem.test_kernel)
    with pytest.raises(ConfigError, match="test targets of shape"):
        generalisation(
            problem.kernel, problem.targets, test_kernel=problem.test_kernel, test_targets=problem.test_targets[:3]
        )
    with pytest.raises(ConfigError, match="a test kernel of shape"):
        generalisation(
            problem.kernel,
            problem.targets,
            test_kernel=problem.test_kernel[:, :50],
            test_targets=problem.test_targets,
        )
    unknown = np.full(50, 3)
    found = generalisation(
        problem.kernel, np.arange(120) % 3, test_kernel=problem.test_kernel, test_targets=unknown, ridges=[1.0]
    )
    assert "50 test samples of classes that training does not have count as wrong" in found.message
    with pytest.raises(ConfigError, match="tolerance=2"):
        generalisation(problem.kernel, problem.targets, tolerance=2.0)
