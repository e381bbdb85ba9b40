"""Comparisons of kernels against the dense formulas, whatever their tiles, kinds and dtypes are."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import stored
import torch

import ntkpipe
from ntkpipe.analysis.comparing import spectra as ends_of_spectra
from ntkpipe.analysis.comparing.compare import compare_kernels
from ntkpipe.analysis.comparing.entries import TileEntries, measure_differences
from ntkpipe.analysis.comparing.inputs import inputs_of
from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.operators.opening import as_operator

N, M, OUTPUTS, K = 60, 15, 3, 4
_RNG = np.random.default_rng(0)
CLASSES, TEST_CLASSES = _RNG.integers(0, 4, N), _RNG.integers(0, 4, M)
CLASSES[:4] = range(4)


def kernel_of(factor: np.ndarray, *, size: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Train and test × train kernel of features with a mean, which centring takes away."""
    whole = (factor + 1) @ (factor + 1).T / factor.shape[1] + 0.05 * np.eye(len(factor))
    return whole[:size, :size], whole[size:, :size]


FACTOR = _RNG.standard_normal((N + M, 100))
A, TEST_A = kernel_of(FACTOR + 0.3 * _RNG.standard_normal(FACTOR.shape))
B, TEST_B = kernel_of(FACTOR)


def centred_alignment(a: np.ndarray, b: np.ndarray, width: int = 1) -> float:
    count = len(a) // width
    centre = np.kron(np.eye(count) - 1 / count, np.eye(width))
    a, b = centre @ a @ centre, centre @ b @ centre
    return float(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))


def sines(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """Sines of the principal angles between leading eigenspaces, ascending: singular values of (I - UU') V."""
    u, v = (np.linalg.eigh(matrix)[1][:, ::-1][:, :k] for matrix in (a, b))
    return np.linalg.svd(v - u @ (u.T @ v), compute_uv=False)[::-1]


def parts_by_outputs(a: np.ndarray, b: np.ndarray, width: int) -> list[float]:
    """Norms of A - B between outputs, of equal ones around their mean, and of that mean, over the norm of B."""
    outputs = np.tile(np.arange(width), len(a) // width)
    equal = (a - b) * (outputs[:, None] == outputs)
    mean = np.kron(sum((a - b)[o::width, o::width] for o in range(width)) / width, np.eye(width))
    return [float(np.linalg.norm(part) / np.linalg.norm(b)) for part in (a - b - equal, equal - mean, mean)]


def assert_is_dense(found: Any, a: np.ndarray, b: np.ndarray, k: int, width: int = 1, rel: float = 1e-8) -> None:
    """Everything that is said of entries and spectra, from the whole matrices."""
    norm = np.linalg.norm(b)
    scale = np.sum(a * b) / np.sum(a * a)
    relative = np.abs(a - b) / np.sqrt(np.outer(np.diag(b), np.diag(b)))
    of_a, of_b = np.linalg.eigvalsh(a)[::-1], np.linalg.eigvalsh(b)[::-1]
    expected = {
        "frobenius_a": np.linalg.norm(a),
        "frobenius_b": norm,
        "relative_difference": np.linalg.norm(a - b) / norm,
        "scale": scale,
        "scaled_difference": np.linalg.norm(scale * a - b) / norm,
        "alignment": np.sum(a * b) / np.linalg.norm(a) / norm,
        "centred_alignment": centred_alignment(a, b, width),
        "largest_entry_difference": relative.max(),
        "largest_eigenvalue_ratio": of_a[0] / of_b[0],
        "smallest_eigenvalue_a": of_a[-1],
        "smallest_eigenvalue_b": of_b[-1],
        "smallest_eigenvalue_ratio": of_a[-1] / of_b[-1],
        "condition_number_ratio": (of_a[0] / of_a[-1]) / (of_b[0] / of_b[-1]),
    }
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=rel)
    assert found.difference_by_outputs == (
        None if width == 1 else pytest.approx(parts_by_outputs(a, b, width), rel=rel)
    )
    row, column = found.largest_entry
    assert row <= column
    assert relative[row, column] == pytest.approx(relative.max(), rel=1e-12)
    np.testing.assert_allclose(found.eigenvalues_a, of_a[:k], rtol=rel)
    np.testing.assert_allclose(found.eigenvalues_b, of_b[:k], rtol=rel)
    np.testing.assert_allclose(np.sin(found.principal_angles), sines(a, b, k), atol=max(1e-8, found.angle_error))
    assert found.overlap == pytest.approx(1 - np.mean(sines(a, b, k) ** 2), abs=1e-7)
    for name, value in (("a", of_a[-1]), ("b", of_b[-1])):
        low, high = getattr(found, f"smallest_eigenvalue_bounds_{name}")
        assert low <= value <= high
    low, high = found.smallest_eigenvalue_ratio_bounds
    assert low <= of_a[-1] / of_b[-1] <= high


def regression(kernel: np.ndarray, test: np.ndarray, targets: np.ndarray, ridge: float) -> np.ndarray:
    return test @ np.linalg.solve(kernel + ridge * np.eye(len(kernel)), targets)


@pytest.mark.parametrize("tiles", [(None, None), (16, 16), (16, 8), (7, 16), (60, None), (None, 25)])
def test_every_number_is_that_of_the_dense_matrices_whatever_the_tiles(tmp_path: Path, tiles: Any) -> None:
    pair = [
        matrix if tile is None else stored.store_matrix(matrix, tmp_path / name, tile=tile)
        for name, matrix, tile in zip("ab", (A, B), tiles, strict=True)
    ]
    found = compare_kernels(
        *pair, targets=CLASSES, test_targets=TEST_CLASSES, test_kernels=(TEST_A, TEST_B), k=K, ridge=0.1
    )
    assert found.is_converged
    assert_is_dense(found, A, B, K)
    for ridge, logdet, matrix in ((0.1, found.log_determinant_a, A), (0.1, found.log_determinant_b, B)):
        assert logdet == pytest.approx(np.linalg.slogdet(matrix + ridge * np.eye(N))[1], rel=1e-10)
    one_hot, wanted = np.eye(4)[CLASSES], np.eye(4)[TEST_CLASSES]
    of_a, of_b = regression(A, TEST_A, one_hot, 0.1), regression(B, TEST_B, one_hot, 0.1)
    np.testing.assert_allclose(found.predictions_a, of_a, atol=1e-9)
    np.testing.assert_allclose(found.predictions_b, of_b, atol=1e-9)
    assert found.prediction_difference == pytest.approx(np.linalg.norm(of_a - of_b) / np.linalg.norm(of_b), rel=1e-8)
    assert found.disagreement == np.mean(of_a.argmax(1) != of_b.argmax(1))
    assert 0 < found.disagreement < 1
    assert found.test_loss_a == pytest.approx(np.mean((of_a - wanted) ** 2), rel=1e-9)
    assert found.test_loss_b == pytest.approx(np.mean((of_b - wanted) ** 2), rel=1e-9)
    assert found.test_accuracy_a == np.mean(of_a.argmax(1) == TEST_CLASSES)
    assert found.test_accuracy_b == np.mean(of_b.argmax(1) == TEST_CLASSES)
    assert (found.ridge_a, found.ridge_b) == (0.1, 0.1)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ntkpipe.KernelStore]:
    """Stores of one network and data: full NTK and pNTK, in other tiles, pNTK in float32, and of other data."""
    folder, rng = tmp_path_factory.mktemp("networks"), np.random.default_rng(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.Tanh(), torch.nn.Linear(64, OUTPUTS)).double().eval()
    inputs, test_inputs = rng.standard_normal((24, 6)), rng.standard_normal((9, 6))
    directions = rng.standard_normal((6, OUTPUTS))
    made = {
        "ntk": ("ntk", 8, "float64", inputs),
        "pntk": ("pntk", 5, "float64", inputs),
        "pntk32": ("pntk", 8, "float32", inputs),
        "other": ("pntk", 8, "float64", inputs[::-1].copy()),
    }
    return {
        name: ntkpipe.compute_kernel(
            model,
            data,
            targets=(data @ directions).argmax(axis=1),
            test_inputs=test_inputs,
            test_targets=(test_inputs @ directions).argmax(axis=1),
            store=folder / f"{name}.zarr",
            kind=kind,
            tile=tile,
            compute_dtype="float64",
            store_dtype=dtype,
            progress=False,
        )
        for name, (kind, tile, dtype, data) in made.items()
    }


@pytest.mark.parametrize("order", [("pntk", "ntk"), ("ntk", "pntk")])
def test_a_pntk_beside_a_full_ntk_is_its_kronecker_product(
    networks: dict[str, ntkpipe.KernelStore], order: tuple[str, str]
) -> None:
    dense = {name: networks[name].train.to_numpy() for name in order}
    tests = {name: networks[name].test_train.to_numpy() for name in order}
    for held in (dense, tests):
        held["pntk"] = np.kron(held["pntk"], np.eye(OUTPUTS))
    found = compare_kernels(*(networks[name] for name in order), k=2, ridge=1e-3, ridge_scale="mean_diagonal")
    first, second = (dense[name] for name in order)
    assert_is_dense(found, first, second, 2 * OUTPUTS, OUTPUTS)
    assert found.outer == "ab"[order.index("pntk")]
    targets = np.eye(OUTPUTS)[networks["ntk"].targets].reshape(-1)
    for name, side in zip(order, "ab", strict=True):
        ridge = 1e-3 * np.diag(dense[name]).mean()
        expected = regression(dense[name], tests[name], targets, ridge).reshape(-1, OUTPUTS)
        np.testing.assert_allclose(getattr(found, f"predictions_{side}"), expected, atol=1e-9)
        determinant = np.linalg.slogdet(dense[name] + ridge * np.eye(len(targets)))[1]
        assert getattr(found, f"log_determinant_{side}") == pytest.approx(determinant, rel=1e-9)
        assert getattr(found, f"ridge_{side}") == pytest.approx(ridge, rel=1e-12)


@pytest.mark.parametrize("targets", [None, np.arange(12) % 2], ids=["none", "two classes"])
def test_a_finite_network_beside_its_limit_differs_less_as_it_widens(tmp_path: Path, targets: Any) -> None:
    """Θ ⊗ I_O whatever number of outputs its store knows, and all parts of the difference fall like 1/√width."""
    net = ntkpipe.infinite.FullyConnected(2, "relu", W_std=2**0.5, b_std=0.3)
    x = np.random.default_rng(2).standard_normal((12, 8))
    options = {"targets": targets, "test_inputs": x[:4] + 0.3, "progress": False}
    limit = ntkpipe.compute_infinite_kernel(net, x, store=tmp_path / "limit.zarr", **options)
    found = []
    for width in (64, 1024):
        model = ntkpipe.parametrised.matching(net, width, n_in=8, n_out=OUTPUTS, dtype=torch.float64)
        options |= {"kind": "ntk", "compute_dtype": "float64", "store": tmp_path / f"{width}.zarr"}
        store = ntkpipe.compute_kernel(model, x, **options)
        found.append(compare_kernels(store, limit, targets=np.eye(OUTPUTS)[np.arange(12) % OUTPUTS], k=2, ridge=0.1))
    wide = found[-1]
    assert_is_dense(wide, store.train.to_numpy(), np.kron(limit.train.to_numpy(), np.eye(OUTPUTS)), 6, OUTPUTS)
    assert (wide.outer, wide.kinds) == ("b", ("ntk", limit.manifest.kind))
    # A quarter, give or take a factor of two for a single draw.
    parts = [(one.relative_difference, *one.difference_by_outputs, one.prediction_difference) for one in found]
    assert (np.divide(*parts[::-1]) < 0.5).all()
    assert np.sum(np.square(wide.difference_by_outputs)) == pytest.approx(wide.relative_difference**2, rel=1e-12)
    assert "between outputs" in str(wide)
    with pytest.raises(ConfigError, match=r"inputs_digest.*same order, shape and dtype"):
        compare_kernels(store, ntkpipe.compute_infinite_kernel(net, x[::-1], store=tmp_path / "o.zarr", progress=False))


def test_full_ntks_are_centred_output_by_output(networks: dict[str, ntkpipe.KernelStore]) -> None:
    full = networks["ntk"]
    other = full.train.to_numpy() + 0.1 * np.kron(B[:24, :24], np.ones((OUTPUTS, OUTPUTS)))
    found = compare_kernels(full, other, k=K)
    assert_is_dense(found, full.train.to_numpy(), other, K, OUTPUTS, rel=1e-7)
    assert found.outer is None


def test_arrays_of_a_full_ntk_need_their_number_of_outputs(networks: dict[str, ntkpipe.KernelStore]) -> None:
    full, small = networks["ntk"].train.to_numpy(), networks["pntk"].train.to_numpy()
    with pytest.raises(ConfigError, match="num_outputs=O"):
        compare_kernels(small, full)
    found = compare_kernels(small, full, num_outputs=OUTPUTS, k=2)
    assert_is_dense(found, np.kron(small, np.eye(OUTPUTS)), full, 2 * OUTPUTS, OUTPUTS)
    assert compare_kernels(networks["pntk"], full, num_outputs=OUTPUTS, k=2).relative_difference == pytest.approx(
        found.relative_difference, rel=1e-12
    )
    with pytest.raises(ConfigError, match="no multiple of 7"):
        compare_kernels(small, full, num_outputs=7)


def test_what_a_dtype_costs_is_said_by_purpose(networks: dict[str, ntkpipe.KernelStore]) -> None:
    single, double = networks["pntk32"], networks["pntk"]
    found = compare_kernels(single, double, k=K, ridge=1e-4, ridge_scale="mean_diagonal")
    assert found.differs == ("store_dtype",)
    assert found.is_of_dtypes
    a, b = single.train.to_numpy().astype(np.float64), double.train.to_numpy()
    assert found.relative_difference == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-9)
    # Far below what 1 - alignment² resolves.
    scale = np.sum(a * b) / np.sum(a * a)
    assert found.scaled_difference == pytest.approx(np.linalg.norm(scale * a - b) / np.linalg.norm(b), rel=1e-6)
    assert 0 < found.relative_difference < 1e-7
    assert found.floor_a == pytest.approx(np.finfo(np.float32).eps * np.linalg.norm(a) / 24**0.5, rel=1e-6)
    low, high = found.smallest_eigenvalue_ratio_bounds
    least = found.smallest_eigenvalue_b
    assert low == pytest.approx((found.smallest_eigenvalue_a - found.floor_a) / (least + found.floor_b), rel=1e-6)
    assert low < 1 < high
    words = str(found)
    for purpose in ("regression", "log-determinant", "smallest eigenvalues", "leading eigenpairs"):
        assert f"dtype, for {purpose}" in words


def test_a_smallest_eigenvalue_below_the_floor_is_called_noise_and_has_no_ratio() -> None:
    low_rank = FACTOR[:N, :20] @ FACTOR[:N, :20].T
    found = compare_kernels(low_rank.astype(np.float32), B, k=K)
    assert found.smallest_eigenvalue_ratio is None
    assert found.condition_number_a is None
    assert found.condition_number_ratio is None
    assert found.condition_number_b == pytest.approx(np.linalg.cond(B), rel=1e-9)
    assert "below its storage floor" in found.smallest_eigenvalue_note
    assert found.log_determinant_a is None
    indefinite = compare_kernels(B - 2 * np.linalg.eigvalsh(B)[0] * np.eye(N), B, k=K)
    assert "not positive definite" in indefinite.smallest_eigenvalue_note


def test_a_singular_kernel_without_a_ridge_predicts_by_the_solution_of_smallest_norm() -> None:
    low_rank = FACTOR[:, :20] @ FACTOR[:, :20].T
    train, test = low_rank[:N, :N], low_rank[N:, :N]
    found = compare_kernels(train, B, targets=CLASSES, test_kernels=(test, TEST_B), k=K)
    assert found.is_converged
    # So small a diagonal makes it positive definite for Cholesky, and is no more than rounding.
    hidden = compare_kernels(
        train + 1e-12 * np.eye(N), B, targets=CLASSES, test_kernels=(test, TEST_B), k=K, smallest_eigenvalue=False
    )
    np.testing.assert_allclose(hidden.predictions_a, found.predictions_a, atol=1e-8)
    expected = test @ np.linalg.pinv(train, rcond=1e-10, hermitian=True) @ np.eye(4)[CLASSES]
    np.testing.assert_allclose(found.predictions_a, expected, atol=1e-8)


LARGE = 400


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, Any]]:
    folder, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(2)
    factor = rng.standard_normal((LARGE + M, 900)) * np.arange(1, 901) ** -0.5
    pair = []
    for name, tile, noise in (("a", 40, 0.05), ("b", 25, 0.0)):
        noisy = factor + noise * rng.standard_normal(factor.shape)
        train, test = kernel_of(noisy, size=LARGE)
        pair.append((stored.store_matrix(train, folder / name, tile=tile), test))
    targets = rng.integers(0, 3, LARGE)
    given = {"targets": targets, "test_kernels": (pair[0][1], pair[1][1]), "k": K, "ridge": 1e-3}
    return pair[0][0], pair[1][0], given


@pytest.mark.parametrize("way", ["factor", "passes"])
def test_a_tenth_of_the_kernel_gives_the_same_numbers(large: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, given = large
    exact = compare_kernels(a, b, **given)
    assert "LAPACK" in exact.method
    if way == "factor":
        monkeypatch.setattr(ends_of_spectra, "_MOST_ROWS_OF_LAPACK", 10)
        found = compare_kernels(a, b, **given)
        assert "Cholesky in memory" in found.method
        assert found.log_determinant_a == pytest.approx(exact.log_determinant_a, rel=1e-10)
    else:
        found = compare_kernels(a, b, memory_limit=a.nbytes // 10, **given)
        assert "passes over the tiles" in found.method
        assert found.log_determinant_a is None
    assert found.is_converged
    names = [
        "relative_difference",
        "scaled_difference",
        "alignment",
        "centred_alignment",
        "largest_entry_difference",
        "largest_eigenvalue_ratio",
        "overlap",
        "prediction_difference",
        "disagreement",
    ] + ["smallest_eigenvalue_ratio", "condition_number_ratio"] * (way == "factor")
    assert [getattr(found, name) for name in names] == pytest.approx([getattr(exact, name) for name in names], rel=1e-6)
    assert found.largest_entry == exact.largest_entry
    np.testing.assert_allclose(found.principal_angles, exact.principal_angles, atol=1e-6)
    np.testing.assert_allclose(found.predictions_a, exact.predictions_a, atol=1e-7)
    low, high = found.smallest_eigenvalue_bounds_a
    assert low <= exact.smallest_eigenvalue_a <= high
    assert high - low < 2e-4 * high
    low, high = found.smallest_eigenvalue_ratio_bounds
    assert low <= exact.smallest_eigenvalue_ratio <= high
    assert high - low < 4e-4 * high


def test_each_tile_is_read_once_and_diagonal_ones_twice(large: Any) -> None:
    a, _, _ = large
    (side, other) = inputs_of(a, a)
    measured = measure_differences(side.entries(), other.entries())
    tiles = a.grid.num_tiles
    assert measured["bytes_read"] == 2 * tiles * a.tile_bytes  # in one grid no tile is left and entered again
    assert measured["relative_difference"] == 0


def test_a_finer_grid_is_read_at_most_four_times_where_edges_do_not_divide(large: Any) -> None:
    a, b, _ = large
    coarse, fine = (side.entries() for side in inputs_of(a, b))
    assert isinstance(coarse, TileEntries)
    measure_differences(coarse, fine)
    of_diagonal = a.grid.rows.num_tiles
    assert coarse.bytes_read <= (a.grid.num_tiles + of_diagonal) * a.tile_bytes
    assert fine.bytes_read <= 4 * b.grid.num_tiles * b.tile_bytes


def test_a_scale_is_taken_out_to_the_last_digits() -> None:
    noise = np.random.default_rng(3).standard_normal((N, N))
    noisy = B + 1e-9 * (noise + noise.T)
    found = compare_kernels(7 * noisy, B, k=K)
    scale = np.sum(noisy * B) / np.sum(noisy * noisy)
    assert found.scaled_difference == pytest.approx(np.linalg.norm(scale * noisy - B) / np.linalg.norm(B), rel=1e-5)
    assert found.scale == pytest.approx(1 / 7, rel=1e-7)
    assert found.largest_eigenvalue_ratio == pytest.approx(7, rel=1e-7)


def test_a_kernel_beside_itself() -> None:
    found = compare_kernels(A, A, k=K)
    assert found.relative_difference == found.scaled_difference == found.largest_entry_difference == 0
    assert found.alignment == pytest.approx(1, rel=1e-14)
    assert found.overlap == pytest.approx(1, rel=1e-12)
    assert found.smallest_eigenvalue_ratio == 1


def test_a_zero_kernel_may_be_compared_and_nothing_with_one() -> None:
    found = compare_kernels(np.zeros((N, N)), B, k=K, targets=CLASSES, test_kernels=(TEST_A, TEST_B), ridge=1.0)
    assert found.relative_difference == 1
    assert (found.scale, found.alignment, found.centred_alignment) == (None, None, None)
    assert found.largest_eigenvalue_ratio == 0
    assert found.smallest_eigenvalue_ratio is None
    assert "A is zero" in str(found)
    with pytest.raises(ConfigError, match="is zero, so nothing is relative to it"):
        compare_kernels(B, np.zeros((N, N)))


def test_rows_without_a_diagonal_are_left_out_of_the_largest_entry() -> None:
    masked = B.copy()
    masked[5] = masked[:, 5] = 0
    found = compare_kernels(A, masked, k=K)
    kept = np.delete(np.arange(N), 5)
    diagonal = np.sqrt(np.diag(B)[kept])
    expected = (np.abs(A - masked)[np.ix_(kept, kept)] / np.outer(diagonal, diagonal)).max()
    assert found.num_zero_rows == 1
    assert found.largest_entry_difference == pytest.approx(expected, rel=1e-12)
    assert 5 not in found.largest_entry


def test_a_constant_kernel_has_no_centred_alignment() -> None:
    assert compare_kernels(np.ones((N, N)), B, k=1, smallest_eigenvalue=False).centred_alignment is None


def test_other_samples_are_refused_with_the_fields_that_differ(networks: dict[str, ntkpipe.KernelStore]) -> None:
    with pytest.raises(
        ConfigError, match=r"train\.inputs_digest is .*… in a and .*… in b.*same inputs in the same order"
    ):
        compare_kernels(networks["pntk"], networks["other"])
    with pytest.raises(ConfigError, match=r"train\.inputs_digest"):
        compare_kernels(networks["pntk"].train, networks["other"].train)
    with pytest.raises(ConfigError, match="60 samples of 1 rows and"):
        compare_kernels(A, networks["pntk"])
    with pytest.raises(ConfigError, match=r"[ab] of shape \(15, 60\); needed \(n, n\)"):
        compare_kernels(A, TEST_B)


def test_bad_options_are_named(large: Any) -> None:
    for name, value in (("k", 0), ("memory_limit", 0), ("ridge", -1.0), ("ridge_scale", "trace")):
        with pytest.raises(ConfigError, match=name):
            compare_kernels(A, B, **{name: value})
    with pytest.raises(ConfigError, match="5 targets for 60 train samples"):
        compare_kernels(A, B, targets=np.arange(5) % 2, test_kernels=(TEST_A, TEST_B))
    with pytest.raises(ConfigError, match="same test samples"):
        compare_kernels(A, B, targets=CLASSES, test_kernels=(TEST_A[:3], TEST_B))
    with pytest.raises(ConfigError, match="a test kernel of shape"):
        compare_kernels(A, B, targets=CLASSES, test_kernels=(TEST_A[:, :3], TEST_B))


def test_nan_is_refused() -> None:
    broken = B.copy()
    broken[3, 40] = broken[40, 3] = np.nan
    with pytest.raises(NonFiniteError):
        compare_kernels(A, broken)


def test_known_eigenpairs_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compare_kernels(A, B, k=K)
    pairs = []
    for matrix in (A, B):
        values, vectors = np.linalg.eigh(matrix)
        pairs.append(SimpleNamespace(eigenvalues=values[::-1], eigenvectors=vectors[:, ::-1]))

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError(arguments)

    for name in ("eigsh", "eigvalsh", "smallest"):
        monkeypatch.setattr(ends_of_spectra, name, fail)
    found = compare_kernels(A, B, k=K, eigenpairs=(pairs[0], pairs[1]))
    np.testing.assert_allclose(found.principal_angles, expected.principal_angles, atol=1e-9)
    assert found.smallest_eigenvalue_ratio == pytest.approx(expected.smallest_eigenvalue_ratio, rel=1e-9)


def test_operators_and_paths_are_kernels_too(networks: dict[str, ntkpipe.KernelStore]) -> None:
    store = networks["pntk"]
    path = compare_kernels(str(store.path), store.train, k=K)
    assert path.relative_difference == 0
    assert path.prediction_note == ""
    operator = compare_kernels(as_operator(store.train).scaled(2.0), store, k=K)
    assert operator.relative_difference == pytest.approx(1.0, rel=1e-12)
    assert operator.prediction_difference is None
    assert operator.prediction_note == "no test kernels"
    assert operator.differs is None


def test_a_comparison_is_saved_as_json_and_arrays(networks: dict[str, ntkpipe.KernelStore]) -> None:
    found = compare_kernels(networks["pntk"], networks["ntk"], k=2)
    assert json.loads(json.dumps(found.to_json()))["kinds"] == ["pntk", "ntk"]
    assert set(found.arrays()) == {
        "eigenvalues_a", "eigenvalues_b", "principal_angles", "predictions_a", "predictions_b"
    }  # fmt: skip
    assert found.matrix != found.reference
