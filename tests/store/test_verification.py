"""Every kind of damage to a store is found and named, and reading what is damaged fails by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import DAMAGE, flip, forge
from small import compute

from ntkpipe import verify
from ntkpipe.base.errors import TileError
from ntkpipe.store.kernel_store import open_kernel
from ntkpipe.store.store import Store
from ntkpipe.store.verification import Finding, VerificationReport, verify_store

CHUNKS = {
    "kernel/train": (1, 2),
    "kernel/test_train": (1, 0),
    "kernel/test_diagonal": (1, 0, 0),
    "outputs/train": (4, 0),
    "outputs/test": (0, 0),
    "samples/train/input": (2, 0),
    "samples/test/input": (1, 0),
    "targets/train": (3,),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return compute(tmp_path_factory.mktemp("whole") / "k.zarr").path


@pytest.fixture
def store(whole, tmp_path) -> Store:
    return open_kernel(shutil.copytree(whole, tmp_path / "k.zarr")).store


def test_a_good_store_has_no_findings_and_every_chunk_is_read(store):
    read = []
    report = verify_store(store, lambda: read.append(1))
    assert report.is_good
    assert report.findings == ()
    assert report.chunks_checked == len(read) == sum(array.layout.num_chunks for array in store.arrays.values())
    assert report.bytes_checked == sum(path.stat().st_size for path in store.root.rglob("c/**/*") if path.is_file())


def test_every_array_is_tried(store):
    assert set(CHUNKS) == set(store.arrays)


@pytest.mark.parametrize(("name", "index"), CHUNKS.items())
@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_chunk_of_any_array_is_found_and_named_and_reading_it_fails_by_name(store, name, index, words):
    DAMAGE[words](store.arrays[name].path(index))
    report = verify_store(store)
    assert not report.is_good
    assert [(finding.array, finding.index) for finding in report.findings] == [(name, index)]
    assert words in report.findings[0].problem
    with pytest.raises(TileError, match=rf"\({', '.join(map(str, index))}\) of {name} .*{words}"):
        store.arrays[name].read(index)


def test_a_damaged_diagonal_tile_is_reported_by_itself_alone(store):
    """The bound of its rows is unknown then, which is no finding about other tiles."""
    flip(store.arrays["kernel/train"].path((1, 1)))
    assert [(finding.array, finding.index) for finding in verify_store(store).findings] == [("kernel/train", (1, 1))]


def test_all_damage_is_listed_not_the_first_only(store):
    for name, index in CHUNKS.items():
        flip(store.arrays[name].path(index))
    found = {(finding.array, finding.index) for finding in verify_store(store).findings}
    assert found == set(CHUNKS.items())


@pytest.mark.parametrize("name", ["kernel/train", "kernel/test_train", "outputs/train", "samples/test/input"])
def test_entries_that_are_not_finite_are_found(store, name):
    def change(values):
        values[0, 0], values[1, 1] = np.nan, np.inf

    forge(store, name, CHUNKS[name], change)
    count = 1 if name.startswith("samples/") else 2  # masks among the samples hold infinities on purpose
    assert Finding(name, CHUNKS[name], f"{count} entries are NaN or infinite") in verify_store(store).findings


def test_a_diagonal_tile_that_is_not_symmetric_is_found(store):
    def change(values):
        values[0, 1] = np.nextafter(values[0, 1], -np.inf)

    forge(store, "kernel/train", (2, 2), change)
    assert verify_store(store).findings == (Finding("kernel/train", (2, 2), "the diagonal tile is not symmetric"),)


@pytest.mark.parametrize(
    ("name", "index", "entry"),
    [("kernel/train", (1, 3), (2, 1)), ("kernel/test_train", (1, 2), (0, 3)), ("kernel/train", (1, 1), ...)],
)
def test_entries_beyond_the_cauchy_schwarz_bound_are_found(store, name, index, entry):
    def change(values):
        if entry is ...:
            values[0, 1] = values[1, 0] = -1.001 * np.sqrt(values[0, 0] * values[1, 1])
        else:
            values[entry] = 1000.0

    forge(store, name, index, change)
    (finding,) = verify_store(store).findings
    assert (finding.array, finding.index) == (name, index)
    assert f"{2 if entry is ... else 1} entries exceed sqrt(K_ii K_jj), the first K[" in finding.problem
    if entry is not ...:
        assert f"K[{4 * index[0] + entry[0]}, {4 * index[1] + entry[1]}] = 1000 >" in finding.problem


@pytest.mark.parametrize(("name", "index"), [("kernel/train", (0, 0)), ("kernel/test_diagonal", (0, 0, 0))])
def test_a_negative_diagonal_is_found(store, name, index):
    def change(values):
        values[(0,) * values.ndim] *= -1

    forge(store, name, index, change)
    assert Finding(name, index, "1 diagonal entries are negative") in verify_store(store).findings


@pytest.mark.parametrize("dtypes", [("float32", "float32", "float64"), ("float64", "float32", "float64")])
def test_a_wide_store_of_narrow_sums_is_held_to_the_sums(tmp_path, dtypes):
    """A float32 sum may exceed the bound by its rounding, whatever dtype it is stored in."""
    options = dict(zip(("compute_dtype", "accumulate_dtype", "store_dtype"), dtypes, strict=True))
    rows = np.random.default_rng(0).standard_normal((18, 4))
    store = compute(tmp_path / "k.zarr", inputs=rows, test_inputs=3 * rows[:7], **options).store
    assert verify_store(store).findings == ()


def test_files_of_killed_writers_are_listed(store):
    partial = store.arrays["kernel/train"].path((0, 0)).with_name("0.0123.partial")
    partial.write_bytes(b"half")
    (finding,) = verify_store(store).findings
    assert finding.array == "kernel/train/c/0/0.0123.partial"
    assert finding.is_harmless
    assert verify_store(store).is_good


@pytest.mark.parametrize(("name", "chunk"), [("kernel/train", "3/1"), ("kernel/train", "9/9"), ("outputs/test", "2/0")])
def test_chunks_that_do_not_belong_are_listed(store, name, chunk):
    path = store.root / name / "c" / chunk
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"stray")
    index = tuple(map(int, chunk.split("/")))
    assert verify_store(store).findings == (Finding(name, index, "a chunk that does not belong to the array"),)


def alter(document, *keys, value):
    for key in keys[:-1]:
        document = document[key]
    document[keys[-1]] = value


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("shape", 0), 17),
        (("data_type",), "float64"),
        (("chunk_grid", "configuration", "chunk_shape", 0), 5),
        (("codecs", 0, "configuration", "endian"), "big"),
        (("chunk_key_encoding", "configuration", "separator"), "."),
        (("fill_value",), 0.0),
        (("node_type",), "group"),
    ],
)
def test_an_altered_description_of_an_array_is_found(store, keys, value):
    """Chunks are whole, but another Zarr reader would see something else."""
    path = store.root / "kernel/train/zarr.json"
    document = json.loads(path.read_text())
    alter(document, *keys, value=value)
    path.write_text(json.dumps(document))
    (finding,) = verify_store(Store.open(store.root)).findings
    assert (finding.array, finding.index) == ("kernel/train", ())
    assert "kernel/train/zarr.json" in finding.problem
    assert "delete that file and run again" in finding.problem


def test_a_missing_description_of_an_array_is_found_and_written_by_the_next_run(store):
    (store.root / "targets/train/zarr.json").unlink()
    (finding,) = verify_store(Store.open(store.root)).findings
    assert finding.array == "targets/train"
    assert "zarr.json" in finding.problem
    assert "is missing" in finding.problem
    compute(store.root)
    assert verify_store(Store.open(store.root)).is_good


def test_the_report_is_kept_in_the_store(store):
    flip(store.arrays["kernel/train"].path((0, 1)))
    report = verify(store.root, progress=False)
    kept = open_kernel(store.root).store.read_result("verification")
    assert kept["is_good"] is False
    assert kept["chunks_checked"] == report.chunks_checked
    assert [(f["array"], tuple(f["index"]), f["problem"]) for f in kept["findings"]] == [
        ("kernel/train", (0, 1), report.findings[0].problem)
    ]


def test_a_store_that_cannot_be_written_is_verified_all_the_same(store, monkeypatch):
    monkeypatch.setattr(Store, "is_writable", lambda _: False)
    assert verify(store.root, progress=False).is_good
    assert store.read_result("verification") is None


def test_a_report_in_words_shows_the_first_findings_and_counts_the_rest():
    findings = tuple(Finding("kernel/train", (0, i), "bad") for i in range(25))
    words = str(VerificationReport(25, 100, findings))
    assert "kernel/train (0, 19): bad" in words
    assert "and 5 more" in words
    assert "(0, 20)" not in words
