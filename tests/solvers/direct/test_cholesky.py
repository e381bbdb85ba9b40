"""The factor of a stored matrix, in panels: against LAPACK, cut short and continued, damaged, mistaken."""

import json
import tracemalloc
from dataclasses import fields

import numpy as np
import pytest
import zarr
from matrices import matrix_with_spectrum, power_law, spectra

from ntkpipe.base.errors import (
    ConfigError,
    IndefiniteError,
    NonFiniteError,
    ResourceError,
    StoreExistsError,
    StoreMismatchError,
    TileError,
)
from ntkpipe.base.resources import process_memory
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.direct import panels as panels_module
from ntkpipe.solvers.direct.cholesky import cholesky
from ntkpipe.solvers.direct.panels import Shape, bytes_of_panel

N = 330
DEFINITE = ("power_law_1e4", "power_law_1e6", "power_law_1e8", "power_law_1e10", "clustered", "spiked")


class KilledError(Exception):
    """What a monitor raises."""


@pytest.fixture(scope="module")
def matrices():
    return {name: matrix_with_spectrum(values) for name, values in spectra(N).items()}


@pytest.fixture
def matrix(matrices):
    return matrices["power_law_1e6"]


def lower(path):
    return np.tril(zarr.open_group(path, mode="r")["cholesky/lower"][:])


def kill_after(count):
    seen = []

    def monitor(step):
        seen.append(step)
        if len(seen) == count:
            raise KilledError

    return monitor


class Counted(DenseOperator):
    """Notes which blocks are read."""

    def __init__(self, matrix):
        super().__init__(matrix)
        self.blocks = []

    def _block(self, rows, columns):
        self.blocks.append((rows.start, columns.start))
        return super()._block(rows, columns)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("width", [16, 100, 110, 256, 400])
@pytest.mark.parametrize("name", DEFINITE)
def test_the_log_determinant_is_lapacks(matrices, tmp_path, name, width, stored):
    found = cholesky(matrices[name], panel_width=width, path=tmp_path / "l" if stored else None)
    # A backward error of ε‖K‖, of either factor, moves the sum of log λ_i by up to ε‖K‖ Σ 1/λ_i.
    eigenvalues = np.linalg.eigvalsh(matrices[name])
    rounding = np.finfo(float).eps * (eigenvalues[-1] / eigenvalues).sum()
    assert found.logdet == pytest.approx(np.linalg.slogdet(matrices[name])[1], rel=1e-13, abs=rounding)
    assert found.num_panels == -(-N // (width if width <= 256 else N))
    assert found.is_converged


@pytest.mark.parametrize("width", [16, 100])
def test_the_factor_is_the_matrix_and_lies_in_plain_zarr(matrix, tmp_path, width):
    cholesky(matrix, panel_width=width, path=tmp_path)
    factor = lower(tmp_path)
    assert np.linalg.norm(factor @ factor.T - matrix) < 1e-15 * N * np.linalg.norm(matrix)
    assert (np.diagonal(factor) > 0).all()


def test_memory_and_files_hold_the_same_factor(matrix, tmp_path):
    results = [cholesky(matrix, panel_width=48, path=path) for path in (None, tmp_path)]
    assert results[0].logdet == results[1].logdet
    rhs = np.ones(N)
    assert (results[0].solve(rhs).coefficients == results[1].solve(rhs).coefficients).all()


@pytest.mark.parametrize("ridge", [0.5, 3])
@pytest.mark.parametrize("name", ["singular", "indefinite", "power_law_1e4"])
def test_a_ridge_is_added_to_the_diagonal(matrices, name, ridge):
    matrix, shifted = matrices[name].copy(), matrices[name] + ridge * np.eye(N)
    found = cholesky(matrix, ridge=ridge, panel_width=50)
    assert found.logdet == pytest.approx(np.linalg.slogdet(shifted)[1], rel=1e-12)
    assert (matrix == matrices[name]).all()
    rhs = np.random.default_rng(0).standard_normal((N, 3))
    np.testing.assert_allclose(found.solve(rhs).coefficients, np.linalg.solve(shifted, rhs), rtol=1e-9, atol=1e-12)


def test_no_bit_depends_on_the_number_of_threads(matrix, tmp_path):
    large = matrix_with_spectrum(power_law(900, condition=1e6))
    for name, count in (("one", 1), ("three", 3)):
        cholesky(large, panel_width=300, path=tmp_path / name, threads=count)
    assert (lower(tmp_path / "one") == lower(tmp_path / "three")).all()


def test_it_reads_the_matrix_once_and_the_factor_as_often_as_is_said(matrix, tmp_path):
    operator = DenseOperator(matrix)
    found = cholesky(operator, panel_width=33, path=tmp_path)
    # Panels from their diagonals down: half of the matrix, and half of the diagonal blocks.
    assert operator.work.passes == pytest.approx(0.5 * (1 + 33 / N))
    assert found.factor_passes <= N / (3 * 33) + 1
    entries = Shape.of_width(N, 33).num_entries
    assert found.factor_bytes_written == entries * 8 + 4 * 55


@pytest.mark.parametrize("done", range(1, 8))
def test_after_a_kill_it_goes_on_after_the_last_panel_to_the_same_bits(matrix, tmp_path, done):
    whole = cholesky(matrix, ridge=0.1, panel_width=50, path=tmp_path / "whole")
    with pytest.raises(KilledError):
        cholesky(matrix, ridge=0.1, panel_width=50, path=tmp_path / "cut", monitor=kill_after(done))
    operator = Counted(matrix)
    resumed = cholesky(operator, ridge=0.1, path=tmp_path / "cut")
    assert operator.blocks == [(start, start) for start in range(50 * done, N, 50)]
    assert resumed.resumed == done
    assert resumed.logdet == whole.logdet
    assert (resumed.smallest_pivot, resumed.largest_pivot) == (whole.smallest_pivot, whole.largest_pivot)
    assert (lower(tmp_path / "cut") == lower(tmp_path / "whole")).all()


def test_a_panel_that_is_half_written_is_written_again(matrix, tmp_path, monkeypatch):
    """KilledError between two chunks of a panel: what the attributes do not name does not count."""
    whole = cholesky(matrix, panel_width=50, path=tmp_path / "whole")
    write, count = panels_module.StoredArray.write, [0]

    def write_some(self, index, values):
        count[0] += 1
        if count[0] == 10:
            raise KilledError
        write(self, index, values)

    monkeypatch.setattr(panels_module.StoredArray, "write", write_some)
    with pytest.raises(KilledError):
        cholesky(matrix, panel_width=50, path=tmp_path / "cut")
    monkeypatch.undo()
    resumed = cholesky(matrix, path=tmp_path / "cut")
    assert resumed.resumed == 1
    assert resumed.logdet == whole.logdet
    assert (lower(tmp_path / "cut") == lower(tmp_path / "whole")).all()


def test_a_factor_that_is_complete_is_used_as_it_is(matrix, tmp_path):
    first = cholesky(matrix, panel_width=50, path=tmp_path)
    operator = Counted(matrix)
    again = cholesky(operator, path=tmp_path)
    assert operator.blocks == []
    assert again.logdet == first.logdet
    assert again.resumed == again.num_panels == 7
    assert again.solve(np.ones(N)).residuals.max() < 1e-9


@pytest.mark.parametrize("change", [{"ridge": 0.2}, {"panel_width": 60}, {"matrix": None}])
def test_another_factor_at_the_path_is_refused_with_what_differs(matrix, tmp_path, change):
    cholesky(matrix, ridge=0.1, panel_width=50, path=tmp_path)
    before = lower(tmp_path)
    options = {"matrix": matrix, "ridge": 0.1, **change}
    if options["matrix"] is None:
        options["matrix"] = 2 * matrix
    with pytest.raises(StoreMismatchError) as caught:
        cholesky(path=tmp_path, **options)
    assert [name for name, _, _ in caught.value.differences] == list(change)
    assert (lower(tmp_path) == before).all()


def test_another_zarr_group_at_the_path_is_left_alone(matrix, tmp_path):
    zarr.create_group(tmp_path / "a", attributes={"mine": 1})
    with pytest.raises(StoreExistsError, match="something else"):
        cholesky(matrix, path=tmp_path / "a")
    assert dict(zarr.open_group(tmp_path / "a", mode="r").attrs) == {"mine": 1}


@pytest.mark.parametrize("name", ["results.csv", "model/weights.pt", ".hidden"])
def test_a_folder_of_something_else_is_left_as_it_is(matrix, tmp_path, name):
    there = tmp_path / name
    there.parent.mkdir(exist_ok=True)
    there.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreExistsError, match="something else; give the factor a path of its own"):
        cholesky(matrix, ridge=1.0, path=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert cholesky(matrix, ridge=1.0, path=tmp_path / "factor").is_converged


@pytest.mark.parametrize("chunk", ["5/0", "3/2"])
def test_a_damaged_chunk_is_named_and_never_used(matrix, tmp_path, chunk):
    factor = cholesky(matrix, panel_width=50, path=tmp_path)
    with pytest.raises(KilledError):
        cholesky(matrix, panel_width=50, path=tmp_path / "cut", monitor=kill_after(3))
    for path in (tmp_path, tmp_path / "cut"):
        file = path / "cholesky/lower/c" / chunk
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
    named = rf"chunk \({chunk.replace('/', ', ')}\) of cholesky/lower"
    for use in (lambda: factor.solve(np.ones(N)), lambda: cholesky(matrix, path=tmp_path / "cut")):
        with pytest.raises(TileError, match=named):
            use()


def test_a_damaged_chunk_that_is_deleted_is_made_again(matrix, tmp_path):
    """As the message says."""
    whole = cholesky(matrix, panel_width=50, path=tmp_path)
    before = lower(tmp_path)
    (tmp_path / "cholesky/lower/c/4/2").unlink()
    again = cholesky(matrix, path=tmp_path)
    assert again.resumed == 2
    assert again.logdet == whole.logdet
    assert (lower(tmp_path) == before).all()


@pytest.mark.parametrize(
    "change",
    [
        {"num_rows": 10**9},
        {"panel_width": 7},
        {"panels": [{}]},
        {"panels": 3},
        {"ridge": "x"},
        {"format": 2},
        {"chunk_rows": 0},
    ],
)
def test_damaged_attributes_are_an_error_of_the_store(matrix, tmp_path, change):
    cholesky(matrix, panel_width=50, path=tmp_path)
    document = json.loads((tmp_path / "cholesky/zarr.json").read_text())
    document["attributes"].update(change)
    (tmp_path / "cholesky/zarr.json").write_text(json.dumps(document))
    with pytest.raises(OSError, match=r"damaged|describes no|something else"):
        cholesky(matrix, path=tmp_path)


@pytest.mark.parametrize("bad", [0, 1, 49, 50, 137, 329])
def test_a_pivot_that_is_not_positive_is_told_with_row_and_floor(bad):
    matrix = np.eye(N)
    matrix[bad, bad] = -0.25
    with pytest.raises(IndefiniteError) as caught:
        cholesky(matrix, panel_width=50)
    error = caught.value
    assert (error.row, error.pivot) == (bad + 1, -0.25)
    assert error.floor == pytest.approx(DenseOperator(matrix).storage_floor())
    assert f"row {bad}, panel {bad // 50 + 1} of 7" in str(error)
    assert "not positive semi-definite" in str(error)


@pytest.mark.parametrize("width", [40, 400])
def test_the_row_that_fails_is_the_first_that_is_not_definite(matrices, width):
    matrix = matrices["indefinite"]
    with pytest.raises(IndefiniteError) as caught:
        cholesky(matrix, panel_width=width)
    row = caught.value.row
    assert np.linalg.eigvalsh(matrix[: row - 1, : row - 1]).min() > 0
    assert np.linalg.eigvalsh(matrix[:row, :row]).min() < 0


def rounded_to_float32():
    return matrix_with_spectrum(power_law(300, condition=1e11)).astype(np.float32)


def test_jitter_is_only_added_if_asked_for_and_is_in_the_result(tmp_path):
    matrix = rounded_to_float32()
    matrix = (matrix + matrix.T) / 2
    with pytest.raises(IndefiniteError, match="indefinite at storage precision") as caught:
        cholesky(matrix, panel_width=64)
    found = cholesky(matrix, panel_width=64, jitter="auto", path=tmp_path)
    power = np.log10(found.jitter / caught.value.floor)
    assert power == pytest.approx(round(power), abs=1e-9)
    assert 0 <= power <= 4
    assert f"jitter of {found.jitter:.3g}" in str(found)
    assert found.shift == found.jitter
    shifted = matrix.astype(np.float64) + found.jitter * np.eye(300)
    assert found.logdet == pytest.approx(np.linalg.slogdet(shifted)[1], rel=1e-9)
    # The true residual is of the matrix with the jitter, which is what the factor is of.
    assert found.solve(np.ones(300)).residuals.max() < 1e-6
    again = cholesky(matrix, jitter="auto", path=tmp_path)
    assert (again.jitter, again.logdet) == (found.jitter, found.logdet)


def test_no_jitter_where_none_is_needed(matrix):
    assert cholesky(matrix, jitter="auto").jitter == 0.0


def test_a_stored_factor_with_a_jitter_is_not_given_to_who_asked_for_none(tmp_path):
    matrix = rounded_to_float32()
    matrix = (matrix + matrix.T) / 2
    cholesky(matrix, panel_width=64, jitter="auto", path=tmp_path)
    with pytest.raises(StoreMismatchError, match="jitter"):
        cholesky(matrix, path=tmp_path)


def test_jitter_does_not_hide_a_matrix_that_is_indefinite(matrices):
    with pytest.raises(IndefiniteError, match="not positive semi-definite"):
        cholesky(matrices["indefinite"], jitter="auto")


def test_what_does_not_fit_memory_asks_for_a_path(matrix):
    with pytest.raises(ResourceError, match=r"takes .* may be used; give path="):
        cholesky(matrix, memory_limit=process_memory() + 100_000)


def test_a_limit_makes_panels_narrower(matrix, tmp_path):
    wide = cholesky(matrix, path=tmp_path / "wide")
    narrow = cholesky(matrix, path=tmp_path / "narrow", memory_limit=process_memory() + 2**22)
    assert narrow.num_panels > wide.num_panels == 1
    assert narrow.logdet == pytest.approx(wide.logdet, rel=1e-12)


def test_a_limit_without_room_for_a_column_is_refused(matrix, tmp_path):
    with pytest.raises(ResourceError, match="larger memory_limit"):
        cholesky(matrix, path=tmp_path, memory_limit=1)


def test_not_a_number_is_refused():
    class Holed(DenseOperator):
        def _block(self, rows, columns):
            found = super()._block(rows, columns)
            if columns.start == 100:
                found[150, 3] = np.nan
            return found

    with pytest.raises(NonFiniteError, match="NaN"):
        cholesky(Holed(np.eye(N)), panel_width=50)


@pytest.mark.parametrize(
    "options",
    [
        {"ridge": -1.0},
        {"ridge": float("nan")},
        {"ridge": float("inf")},
        {"jitter": 1e-3},
        {"panel_width": 0},
        {"threads": 0},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ConfigError):
        cholesky(np.eye(4), **options)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_small_matrices(size, tmp_path):
    matrix = np.eye(size) + 1.0
    for path in (None, tmp_path):
        factor = cholesky(matrix, path=path)
        assert factor.logdet == pytest.approx(np.linalg.slogdet(matrix)[1], rel=1e-14)
        np.testing.assert_allclose(factor.solve(np.ones(size)).coefficients, 1 / (size + 1), rtol=1e-14)
        np.testing.assert_allclose(factor.inverse_diagonal(), np.diagonal(np.linalg.inv(matrix)), rtol=1e-14)


def test_the_monitor_sees_every_panel_and_what_is_left(matrix):
    steps = []
    cholesky(matrix, panel_width=100, monitor=steps.append)
    left = [step.residual for step in steps]
    assert len(left) == 4
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0.0


def test_the_result_is_data_but_for_the_factor(matrix, tmp_path):
    found = cholesky(matrix, panel_width=100, path=tmp_path)
    document = json.loads(json.dumps(found.to_json()))
    assert document["logdet"] == found.logdet
    assert document["options"]["panel_width"] == 100
    assert set(document) == {field.name for field in fields(found) if not field.name.startswith("_")}


@pytest.mark.parametrize("num_rows", [1, 3, 300, 512, 513, 5000, 100_000])
@pytest.mark.parametrize("width", [1, 2, 255, 512, 513, 2048, 6000])
def test_panels_are_whole_chunks_that_cover_the_triangle(num_rows, width):
    shape = Shape.of_width(num_rows, width)
    assert shape.width % shape.height == 0
    assert shape.width >= min(width, num_rows)
    if shape.num_panels > 200:
        return
    entries = 0
    for panel in range(shape.num_panels):
        columns = shape.columns(panel)
        rows = list(shape.chunks(panel))
        assert rows[0].start == columns.start
        assert rows[-1].stop == num_rows
        assert [r.stop for r in rows[:-1]] == [r.start for r in rows[1:]]
        entries += (num_rows - columns.start) * (columns.stop - columns.start)
    assert shape.num_entries == entries


def test_memory_stays_within_what_was_planned(tmp_path):
    """Allocations of this process beside the matrix: one panel, a diagonal block, a few chunks, and little else."""
    size = 1200
    operator = DenseOperator(np.eye(size) + 1.0)
    operator.identity()
    cholesky(np.eye(3), path=tmp_path / "imports")
    tracemalloc.start()
    try:
        factor = cholesky(operator, panel_width=256, path=tmp_path / "l", threads=2)
        _, peak = tracemalloc.get_traced_memory()
        shape = Shape.of_width(size, 256)
        planned = bytes_of_panel(shape, 2)
        assert peak < planned + 2**18
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        factor.solve(np.ones(size))
        _, peak = tracemalloc.get_traced_memory()
        assert peak - before < 2 * 8 * shape.width * shape.height
    finally:
        tracemalloc.stop()
