"""A store of somebody else is data, whatever it holds: clear errors, soon, in little memory, and nothing is done."""

import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import compute

from ntkpipe import compute_kernel, open_kernel
from ntkpipe.app.cli import main
from ntkpipe.base.errors import DataError, StoreError
from ntkpipe.store.layout import MOST_CHUNKS, layouts
from ntkpipe.store.manifest import SourceRecord
from ntkpipe.store.media.medium import DOCUMENT_BYTES
from ntkpipe.store.store import Store
from ntkpipe.store.verification import verify_store

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def genuine(tmp_path_factory) -> Path:
    """A small and complete store."""
    path = tmp_path_factory.mktemp("genuine") / "k.zarr"
    compute(path)
    return path


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The group's attribute with a digest that fits: whoever forges a manifest can compute it, too."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return {"manifest": manifest, "digest": digest}


def forge(folder: Path, manifest: dict[str, Any], change: Change = lambda _: None) -> Path:
    """A store of nothing but a manifest, with a change."""
    manifest = copy.deepcopy(manifest)
    change(manifest)
    path = folder / "forged.zarr"
    path.mkdir(exist_ok=True)
    document = {"zarr_format": 3, "node_type": "group", "attributes": {"ntkpipe": signed(manifest)}}
    (path / "zarr.json").write_text(json.dumps(document))
    return path


def put(*keys: str, value: Any) -> Change:
    """Replace one value of a manifest."""

    def change(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


def rename_input(name: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        manifest["train"]["inputs"] = {name: {"shape": [4], "dtype": "float32"}}

    return change


def test_the_unchanged_manifest_is_read(tmp_path, make_manifest):
    path = forge(tmp_path, make_manifest().model_dump(mode="json"))
    assert open_kernel(path).progress.tiles_done == 0


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "../../x",
        "/etc/passwd",
        "a/../../x",
        "a/b",
        "",
        ".",
        "..",
        "zarr.json",
        "a\0b",
        "a\nb",
        "x" * 5000 + "/",
        "c:\\x",
    ],
)
def test_names_of_arrays_are_no_paths(tmp_path, make_manifest, name):
    path = forge(tmp_path, make_manifest().model_dump(mode="json"), rename_input(name))
    with pytest.raises(StoreError, match="is damaged"):
        open_kernel(path)


HUGE = 10**18
SHAPES: list[tuple[Change, str]] = [
    (put("train", "num_samples", value=HUGE), "a number of 60 bits"),
    (put("train", "num_samples", value=2**50), "chunks; at most"),
    (put("train", "num_samples", value=10**4000), "a number of 13288 bits"),
    (put("train", "num_samples", value=0), "bad values in train.num_samples"),
    (put("train", "num_samples", value=-1), "bad values in train.num_samples"),
    (put("train", "num_samples", value=1.5), "bad values in train.num_samples"),
    (put("train", "num_samples", value="7"), "bad values in train.num_samples"),
    (put("train", "num_samples", value=True), "bad values in train.num_samples"),
    (put("tile", value=2**40), "bytes; at most"),
    (put("num_covectors", value=2**31), "bytes; at most"),
    (put("num_outputs", value=2**45), "bytes; at most"),
    (put("test", "num_samples", value=2**50), "chunks; at most"),
    (put("train", "inputs", "input", "shape", value=[2**40, 2**40]), "bytes; at most"),
    (put("train", "inputs", "input", "shape", value=[2**32, 2**32, 2]), "bytes; at most"),
    (put("train", "inputs", "input", "shape", value=[0]), "bad values in train.inputs.input.shape"),
    (put("train", "inputs", "input", "shape", value=[-1, -1]), "bad values in train.inputs.input.shape"),
    (put("train", "inputs", "input", "shape", value=[1] * 100), "bad values in train.inputs.input.shape"),
    (put("train", "targets", "shape", value=[2**50]), "bytes; at most"),
]


@pytest.mark.parametrize(("change", "words"), SHAPES)
def test_absurd_shapes_are_refused_before_anything_is_allocated(tmp_path, make_manifest, change, words):
    path = forge(tmp_path, make_manifest().model_dump(mode="json"), change)
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(StoreError, match=words):
            open_kernel(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 2


def test_the_largest_store_that_is_possible_can_be_listed(tmp_path, make_manifest):
    """Just below the limit progress is still told, without much memory."""
    edge = int((2 * MOST_CHUNKS) ** 0.5) - 10
    manifest = make_manifest(num_train=edge // 8, num_test=None, tile=1).model_dump(mode="json")
    assert open_kernel(forge(tmp_path, manifest)).progress.tiles_total == (edge // 8) * (edge // 8 + 1) // 2
    assert all(layout.num_chunks <= MOST_CHUNKS for layout in layouts(make_manifest(edge, None, tile=1)).values())


@pytest.mark.parametrize(
    "dtype",
    [
        "O",
        "object",
        "V8",
        "datetime64[ns]",
        "M8[s]",
        "i4,i4",
        "(2,)f4",
        "f8,O",
        "U10",
        "S10",
        "complex64",
        "longdouble",
        "<f4",
        ">f8",
        "e",
        "",
        "float32\0",
    ],
)
def test_dtypes_are_plain_numbers(tmp_path, make_manifest, dtype):
    for change in (put("train", "inputs", "input", "dtype", value=dtype), put("store_dtype", value=dtype)):
        path = forge(tmp_path, make_manifest().model_dump(mode="json"), change)
        with pytest.raises(StoreError, match="is damaged"):
            open_kernel(path)


def nested(depth: int) -> list[object]:
    found: list[object] = []
    for _ in range(depth):
        found = [found]
    return found


SOURCES: list[tuple[Change, str]] = [
    (put("source", value=None), "bad values"),
    (put("source", "name", value="eval"), "bad values in source.name"),
    (put("source", "formulas", value=2), "bad values in source.formulas"),
    (put("source", "network", value=["FullyConnected"]), "bad values in source.network"),
    (put("source", "network", "layers", value=HUGE), "a number of 60 bits"),
    (put("source", "network", "layers", value=nested(700)), "nested too deeply"),
    (put("source", "network", "x\x1b[2J", value=1), "control characters"),
    (put("source", "module", value="os"), "bad values in source.module"),
    (put("model", value={"name": "Linear"}), "bad values"),
]


@pytest.mark.parametrize(("change", "words"), SOURCES)
def test_a_formula_is_data_too(tmp_path, make_manifest, change, words):
    source = SourceRecord(name="infinite", network={"layers": [{"layer": "Dense", "W_std": 1.5}]}, formulas=1)
    fields = {"kind": "infinite_ntk", "model": None, "source": source, "groups": {"nngp": ()}}
    manifest = make_manifest(**fields).model_dump(mode="json")
    assert "model" not in manifest
    assert open_kernel(forge(tmp_path, manifest)).manifest.source == source
    with pytest.raises(StoreError, match=words):
        open_kernel(forge(tmp_path, manifest, change))


TEXTS = ["\x1b[2J\x1b]0;owned\x07", "\x9b31m", "\u202etxt.exe", "\x00", "\x7f", "\r", "\ud800"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "keys", [("kind",), ("convention",), ("model", "name"), ("choices", "arithmetic"), ("environment", "host")]
)
def test_texts_hold_nothing_that_a_terminal_obeys(tmp_path, make_manifest, text, keys):
    path = forge(tmp_path, make_manifest().model_dump(mode="json"), put(*keys, value=text))
    with pytest.raises(StoreError, match="control characters") as info:
        open_kernel(path)
    assert str(info.value).isprintable()


DOCUMENTS = {
    "nested": b'{"attributes":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "nested objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "twice": b'{"zarr_format":3,"node_type":"group","attributes":{"ntkpipe":1,"ntkpipe":2}}',
    "nan": b'{"zarr_format":3,"node_type":"group","attributes":{"ntkpipe":NaN}}',
    "infinity": b'{"zarr_format":3,"node_type":"group","attributes":{"ntkpipe":-Infinity}}',
    "number": b'{"attributes":' + b"9" * 100_000 + b"}",
    "not UTF-8": b'{"attributes":{"\xff":1}}',
    "UTF-16": '{"attributes":{}}'.encode("utf-16"),
    "cut": b'{"attributes":{',
    "list": b"[]",
    "null": b"null",
    "empty": b"",
    "attributes of another type": b'{"attributes":[1]}',
    "pickle": pickle.dumps(os.getcwd),
    "manifest of another type": b'{"attributes":{"ntkpipe":{"manifest":[],"digest":1}}}',
    "manifest of nothing": b'{"attributes":{"ntkpipe":{"manifest":{},"digest":"0"}}}',
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_that_are_no_store_are_refused(tmp_path, name):
    (tmp_path / "zarr.json").write_bytes(DOCUMENTS[name])
    started = time.perf_counter()
    with pytest.raises(StoreError, match=str(tmp_path)):
        open_kernel(tmp_path)
    assert time.perf_counter() - started < 2


def read_all(root: Path) -> None:
    """Read every document of a store."""
    store = Store.open(root)
    store.complete_layout()
    store.read_result("verification")


@pytest.mark.parametrize("name", ["zarr.json", "kernel/train/zarr.json", "results/verification/zarr.json"])
def test_documents_of_any_size_are_not_read(tmp_path, make_manifest, name):
    store = Store.create(tmp_path / "a.zarr", make_manifest())
    store.write_result("verification", {})
    os.truncate(tmp_path / "a.zarr" / name, 2**40)  # a hole, as large as one likes
    tracemalloc.start()
    try:
        with pytest.raises(StoreError, match=f"at most {DOCUMENT_BYTES} are read"):
            read_all(store.root)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_chunks_of_any_size_are_not_read(tmp_path, make_manifest):
    store = Store.create(tmp_path / "a.zarr", make_manifest())
    array = store.arrays["kernel/train"]
    array.write((0, 0), np.ones((6, 6)))
    os.truncate(array.path((0, 0)), 2**40)
    tracemalloc.start()
    try:
        with pytest.raises(StoreError, match=f"has {2**40} bytes; needed {array.layout.chunk_bytes}"):
            array.read((0, 0))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_names_by_the_thousand_that_are_no_chunks_take_no_memory(tmp_path, make_manifest):
    store = Store.create(tmp_path / "a.zarr", make_manifest())
    array = store.arrays["kernel/train"]
    folder = array.path((0, 0)).parent
    folder.mkdir(parents=True)
    whole = tmp_path / "whole"
    whole.write_bytes(b"\0" * array.layout.chunk_bytes)
    for number in range(2000):
        os.link(whole, folder / f"{number + 10}")
        os.link(whole, folder / f"{number}x")
    for odd in ("٣", "1" * 200, "01", "+1", "1_0", " 1", "²"):
        os.link(whole, folder / odd)
    tracemalloc.start()
    try:
        assert array.present() == set()
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()
    findings = [finding for finding in verify_store(store).findings if "belong" in finding.problem]
    assert len(findings) == 1001
    assert findings[-1].problem == "1,000 more chunks that do not belong to the array"


def test_links_in_a_store_are_not_written_through(tmp_path, genuine, make_manifest):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "0").write_text("years of work")
    store = Store.create(tmp_path / "a.zarr", make_manifest())
    (store.root / "kernel/train/c").mkdir()
    (store.root / "kernel/train/c/0").symlink_to(outside)
    (store.root / "results").symlink_to(outside)
    with pytest.raises(StoreError, match="is a symbolic link"):
        store.arrays["kernel/train"].write((0, 0), np.ones((6, 6)))
    with pytest.raises(StoreError, match="is a symbolic link"):
        store.write_result("verification", {})
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("0", "years of work")]


def run_main(*arguments: str) -> int:
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


WRONG = [
    None,
    3,
    "text",
    [],
    {},
    {"is_good": 1},
    {"is_good": False, "num_findings": {}, "checked": [[]]},
    {"kernels": 3},
]


@pytest.mark.parametrize("value", [*WRONG, {"kernels": [{"array": 1, "error": "x"}], "checked": 0}])
@pytest.mark.parametrize("name", ["verification", "certificate"])
def test_results_of_wrong_types_are_damage_and_no_bug(tmp_path, make_manifest, capsys, name, value):
    store = Store.create(tmp_path / "a.zarr", make_manifest())
    store.write_result(name, {})
    document = {"attributes": {"result": value, "manifest_digest": store.manifest.digest()}}
    (store.root / "results" / name / "zarr.json").write_text(json.dumps(document))
    code, printed = run_main("info", str(store.root)), capsys.readouterr()
    assert code in {0, 2}
    assert (code == 2) == printed.err.startswith("error: ")
    assert "Traceback" not in printed.err


def test_results_cannot_command_a_terminal(tmp_path, make_manifest, capsys):
    store = Store.create(tmp_path / "a.zarr", make_manifest())
    evil = "\x1b]0;owned\x07[red]\u202e"
    store.write_result("verification", {"is_good": True, "chunks_checked": evil, "checked": evil})
    store.write_result("certificate", {"kernels": [{"array": evil, "error": 0.0}], "checked": evil})
    odd = store.root / f"kernel/train/c/{evil}.partial"
    odd.parent.mkdir(parents=True, exist_ok=True)
    odd.touch()
    for arguments in (["info", str(store.root)], ["info", "--json", str(store.root)], ["verify", str(store.root)]):
        run_main(*arguments)
        printed = capsys.readouterr()
        assert "owned" in printed.out
        assert not {"\x1b", "\x07", "\u202e"} & set(printed.out + printed.err)
    run_main("info", f"{tmp_path}/\x1b[2J")
    assert "\x1b" not in capsys.readouterr().err


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value in nested JSON."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(
        [HUGE, -1, 0, 2**31, 2**63, 1e308, "../..", "O", "float32", "ntk", "output:99999999999", "diagonal"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def opened_or_refused(path: Path) -> Store | str:
    """The store, or what is said against it."""
    try:
        return Store.open(path)
    except StoreError as error:
        return str(error)


@given(st.data())
@settings(max_examples=30)
def test_of_any_change_to_a_manifest_comes_a_store_or_an_error(tmp_path_factory, make_manifest, data):
    manifest = make_manifest().model_dump(mode="json")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places(manifest)))
        parent = manifest
        for key in place[:-1]:
            parent = parent[key]
        what = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if what == "remove":
            del parent[place[-1]]
        elif what == "add" and isinstance(parent, dict):
            parent[data.draw(st.text(max_size=8))] = data.draw(JSON)
        else:
            parent[place[-1]] = data.draw(JSON)
        if not places(manifest):
            break
    found = opened_or_refused(forge(tmp_path_factory.mktemp("h"), manifest))
    if isinstance(found, str):
        assert found.replace("\n", "").replace("\t", "").isprintable()
        return
    assert all(layout.num_chunks <= MOST_CHUNKS for layout in layouts(found.manifest).values())
    if sum(array.layout.num_chunks for array in found.arrays.values()) < 2000:
        assert not verify_store(found).is_good
        assert repr(open_kernel(found.root)).isprintable()


AUDITED = """
import builtins, json, os, sys
import numpy, google_crc32c
from ntkpipe.store import kernel_store as kernel
from ntkpipe.store import verification
from ntkpipe.app import cli
root = sys.argv[1]
kernel.open_kernel(sys.argv[2]).train[:, :]
verification.verify_store(kernel.open_kernel(sys.argv[2]).store)
before = set(sys.modules)
forbidden = ("pickle.", "marshal.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.")
seen = []
def hook(event, arguments):
    if event.startswith(forbidden) or event == "exec":
        seen.append((event, repr(arguments)[:200]))
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        seen.append((event, repr(arguments)[:200]))
sys.addaudithook(hook)
for name in sorted(os.listdir(root)):
    path = os.path.join(root, name)
    try:
        opened = kernel.open_kernel(path)
        repr(opened), opened.progress, opened.outputs
    except kernel.StoreError:
        pass
    except Exception as error:
        if not isinstance(error, (MemoryError, ValueError, OSError)):
            raise
print(json.dumps([seen, sorted(set(sys.modules) - before)]))
"""


def test_reading_runs_imports_and_writes_nothing(tmp_path, make_manifest, genuine):
    """What happens while hostile stores are opened is watched by the interpreter itself."""
    manifest = make_manifest().model_dump(mode="json")
    folder = tmp_path / "stores"
    changes = [change for change, _ in SHAPES]
    changes += [put("train", "inputs", "input", "dtype", value=dtype) for dtype in ("O", "os:system", "numpy.load")]
    changes += [put("kind", value="os:system"), put("model", "name", value="os:system"), rename_input("../x")]
    for number, change in enumerate(changes):
        (folder / str(number)).mkdir(parents=True)
        forge(folder / str(number), manifest, change).rename(folder / f"s{number}")
    for name, document in DOCUMENTS.items():
        (folder / name.replace(" ", "-")).mkdir()
        (folder / name.replace(" ", "-") / "zarr.json").write_bytes(document)
    answer = subprocess.run(
        [sys.executable, "-c", AUDITED, str(folder), str(genuine)], capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout) == [[], []]


@pytest.mark.parametrize("name", ["a/b", "../x", "a.b", 3])
def test_a_data_set_cannot_name_arrays_by_paths(tmp_path, name):
    data = [{name: np.zeros(4, np.float32)} for _ in range(5)]
    with pytest.raises(DataError, match="keys become keyword arguments"):
        compute_kernel(lambda **_: None, data, store=tmp_path / "a.zarr")
