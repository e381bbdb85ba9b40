"""Derived kinds equal those that are computed from the model, and nothing is derived that the source does not hold."""

import functools

import numpy as np
import pytest
import reference
import torch
from click.testing import CliRunner
from reference import redraw
from small import chunks, inputs, times
from torch import nn

import ntkpipe
from ntkpipe.app.cli import cli
from ntkpipe.base.errors import (
    ConfigError,
    NonFiniteError,
    ResourceError,
    StoreError,
    StoreExistsError,
    StoreFullError,
    StoreMismatchError,
    TileError,
)
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.media.folder import Folder

L = nn.Linear
GROUPS = {"head": "2.*", "in": "0.weight"}
EVERY = [
    *(("ntk", kind) for kind in ("pntk", "trace", "diagonal", "output:2")),
    ("diagonal", "trace"),
    ("diagonal", "output:0"),
]


def model():
    return redraw(nn.Sequential(L(4, 6), nn.Tanh(), L(6, 3)))


def compute(path, kind, **changes):
    options = {"test_inputs": inputs(7, seed=1), "targets": np.arange(13), "tile": 4, **changes}
    return ntkpipe.compute_kernel(
        model(), inputs(13), store=path, kind=kind, workers=1, progress=False, self_check=False, **options
    )


def derive(source, kind, to, **options):
    return ntkpipe.derive_kernel(source, kind=kind, to=to, progress=False, **options)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A function of kind and dtype that gives a store with groups, which is computed once and only read."""
    root = tmp_path_factory.mktemp("grouped")

    @functools.cache
    def of(kind, dtype):
        return compute(root / f"{kind.replace(':', '-')}-{dtype}", kind, compute_dtype=dtype, groups=GROUPS)

    return of


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("source", "kind"), EVERY)
def test_a_derived_store_equals_a_direct_one(source, kind, dtype, grouped, tmp_path):
    original, exact = grouped(source, dtype), grouped(kind, dtype)
    found = derive(original.path, kind, tmp_path / "derived")
    names = {name for name in exact.store.arrays if not name.startswith("samples/")}
    assert set(found.store.arrays) == names
    scales = {}
    full = grouped("ntk", dtype)
    for group in (None, *GROUPS):
        rows = (full if group is None else full.group(group)).train.diagonal().reshape(13, 3).max(1) ** 0.5
        scales[group] = float(rows.max()) ** 2 * (3 if kind == "pntk" else 1)
    for name in names:
        one, other = (store.store.arrays[name] for store in (found, exact))
        assert one.layout == other.layout
        group = name.split("/")[1] if name.startswith("groups/") else None
        for index in one.layout.indices():
            if name.startswith(("kernel/", "groups/")):
                assert np.abs(one.read(index) - other.read(index)).max() <= 8 * np.finfo(dtype).eps * scales[group]
            else:
                assert np.array_equal(one.read(index), other.read(index))
    assert ntkpipe.verify(found, progress=False).is_good
    assert found.manifest.derived.digest == original.manifest.digest()
    assert found.manifest.convention == exact.manifest.convention


def test_a_derived_store_can_be_certified_if_it_gets_the_samples(tmp_path):
    source = compute(tmp_path / "source", "ntk", groups=GROUPS)
    bare, whole = (
        derive(source, "trace", tmp_path / "bare"),
        derive(source, "diagonal", tmp_path / "whole", samples=True),
    )
    with pytest.raises(ConfigError, match="was derived without the samples; needed inputs"):
        ntkpipe.verify(bare, model(), progress=False)
    with pytest.raises(ConfigError, match="needed inputs and, if it has a test set, test_inputs"):
        ntkpipe.verify(bare, model(), inputs(13), progress=False)
    report = ntkpipe.verify(bare, model(), inputs(13), test_inputs=inputs(7, seed=1), progress=False)
    assert (report.is_good, len(report.certificates)) == (True, 6)
    report = ntkpipe.verify(whole, model(), progress=False)
    assert (report.is_good, len(report.certificates)) == (True, 18)


def test_outputs_that_are_apart_are_taken_bit_by_bit(tmp_path):
    source = compute(tmp_path / "s", "ntk")
    found = derive(derive(source, "diagonal", tmp_path / "d"), "output:1", tmp_path / "o")
    assert np.array_equal(found.train, source.train.blocks[:, :, 1, 1])
    assert np.array_equal(found.test_train, source.test_train.blocks[:, :, 1, 1])
    assert np.array_equal(found.test_diagonal[:, 0, 0], source.test_diagonal[:, 1, 1])


def test_one_output_and_no_test_set(tmp_path):
    one = redraw(nn.Sequential(L(4, 1)))
    ntkpipe.compute_kernel(one, inputs(5), store=tmp_path / "s", kind="ntk", tile=2, progress=False, self_check=False)
    found = derive(tmp_path / "s", "pntk", tmp_path / "d")
    exact = reference.kernel(one, torch.from_numpy(inputs(5)))
    assert reference.error(found.train[:].astype(float), exact) <= 1e-6


@pytest.mark.parametrize("allowed", [0, 3, 20])
def test_it_goes_on_where_it_stopped(allowed, tmp_path, monkeypatch):
    source = compute(tmp_path / "s", "ntk", groups=GROUPS)
    derive(source, "diagonal", tmp_path / "whole")
    write, left = StoredArray.write, [allowed]

    def limited(array, index, values):
        if not left[0]:
            raise StoreFullError("full")
        left[0] -= 1
        write(array, index, values)

    with monkeypatch.context() as patched:
        patched.setattr(StoredArray, "write", limited)
        with pytest.raises(StoreFullError):
            derive(source, "diagonal", tmp_path / "cut")
    written = times(tmp_path / "cut")
    assert len(written) == allowed
    with pytest.raises(StoreMismatchError, match="is not complete; go on with ntkpipe derive"):
        compute(tmp_path / "cut", "diagonal", groups=GROUPS)
    derive(source, "diagonal", tmp_path / "cut")
    assert chunks(tmp_path / "cut") == chunks(tmp_path / "whole")
    after = times(tmp_path / "cut")
    assert all(after[name] == at for name, at in written.items())


def test_each_tile_of_the_source_is_read_once(tmp_path, monkeypatch):
    source = compute(tmp_path / "s", "ntk", groups=GROUPS)
    read, seen = StoredArray.read, []

    def counted(array, index):
        seen.append((array.layout.name, index))
        return read(array, index)

    monkeypatch.setattr(StoredArray, "read", counted)
    derive(source, "diagonal", tmp_path / "d")
    assert len(seen) == len(set(seen))
    assert {name for name, _ in seen} == {name for name in source.store.arrays if not name.startswith("samples/")}


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        ("pntk", "trace", "its store does not hold what that needs; kinds are derived from 'ntk' or 'diagonal'"),
        ("trace", "diagonal", "cannot be derived from kind 'trace'"),
        ("diagonal", "pntk", "from it come trace, output:k"),
        ("diagonal", "ntk", "does not hold what that needs"),
        ("ntk", "ntk", "it is that already; from it come pntk, trace, diagonal, output:k"),
        ("ntk", "output:3", "the model has outputs 0 to 2"),
        ("ntk", "trase", "did you mean 'trace'"),
    ],
)
def test_what_would_be_lost_is_refused(source, kind, words, tmp_path):
    compute(tmp_path / "s", source)
    with pytest.raises(ConfigError, match=words):
        derive(tmp_path / "s", kind, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_only_a_complete_and_whole_store_is_a_source(tmp_path):
    compute(tmp_path / "s", "ntk")
    tile = tmp_path / "s" / "kernel" / "train" / "c" / "0" / "2"
    data = tile.read_bytes()
    tile.unlink()
    with pytest.raises(TileError, match=r"tile \(0, 2\) of kernel/train .* is missing, and 0 other chunks: finish"):
        derive(tmp_path / "s", "trace", tmp_path / "d")
    assert not (tmp_path / "d").exists()
    tile.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(TileError, match=r"tile \(0, 2\) of kernel/train .* fails its crc32c"):
        derive(tmp_path / "s", "trace", tmp_path / "d")
    tile.write_bytes(data)
    assert derive(tmp_path / "s", "trace", tmp_path / "d").progress.is_complete


def test_nothing_else_at_the_path_is_touched(tmp_path):
    source, other = compute(tmp_path / "s", "ntk"), compute(tmp_path / "other", "ntk", targets=None)
    derive(source, "trace", tmp_path / "d")
    with pytest.raises(ConfigError, match="is the source"):
        derive(source, "trace", tmp_path / "s")
    with pytest.raises(StoreMismatchError, match=r"2 fields differ: kind: .*; convention: "):
        derive(source, "pntk", tmp_path / "d")
    with pytest.raises(StoreMismatchError, match=r"train.targets.*derived"):
        derive(other, "trace", tmp_path / "d")
    with pytest.raises(StoreMismatchError, match="derived"):
        derive(source, "trace", tmp_path / "d", samples=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    with pytest.raises(StoreExistsError):
        derive(source, "trace", tmp_path / "folder")


def test_samples_that_are_not_there_cannot_be_copied(tmp_path):
    compute(tmp_path / "s", "ntk")
    bare = derive(tmp_path / "s", "diagonal", tmp_path / "d")
    with pytest.raises(ConfigError, match="derived without its samples"):
        derive(bare, "trace", tmp_path / "t", samples=True)
    assert derive(bare, "trace", tmp_path / "t").progress.is_complete


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    source, write = compute(tmp_path / "s", "ntk"), StoredArray.write

    def replacing(array, index, values):
        write(array, index, values)
        if array.layout.name == "kernel/train" and index == (0, 0):
            compute(tmp_path / "s", "pntk", mode="w")

    monkeypatch.setattr(StoredArray, "write", replacing)
    with pytest.raises(StoreError):
        derive(source, "trace", tmp_path / "d")


def test_sums_that_overflow_are_an_error_that_names_the_tile(tmp_path):
    source = compute(tmp_path / "s", "ntk")
    array = source.store.arrays["kernel/train"]
    tile = array.read((0, 1)).copy()
    tile[:3, :3] = 3e38
    array.write((0, 1), tile)
    with pytest.raises(NonFiniteError, match=r"tile \(0, 1\) of kernel/train .* overflow float32"):
        derive(source, "pntk", tmp_path / "d")


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    source = compute(tmp_path / "s", "ntk")
    monkeypatch.setattr(Folder, "free_bytes", lambda medium: 1000)
    with pytest.raises(ResourceError, match=r"the store needs .* more, 1000 B of disk are free"):
        derive(source, "trace", tmp_path / "d")
    assert chunks(tmp_path / "d") == {}


def test_the_command_derives_and_says_what_it_wrote(tmp_path):
    compute(tmp_path / "s", "ntk")
    arguments = ["derive", str(tmp_path / "s"), "--kind", "diagonal", "--to", str(tmp_path / "d")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "3 of 13 × 13" in result.output
    assert "54 tiles" in result.output
    info = CliRunner().invoke(cli, ["info", str(tmp_path / "d")])
    assert "from kind ntk, manifest" in info.output


def test_a_derived_store_grows_with_its_source_alone(tmp_path):
    compute(tmp_path / "s", "ntk", test_inputs=None, targets=None)
    derive(tmp_path / "s", "trace", tmp_path / "d")
    options = {"tile": 4, "workers": 1, "progress": False, "self_check": False, "grow": True}
    longer = np.concatenate([inputs(13), inputs(4, seed=5)])
    with pytest.raises(StoreMismatchError, match="does not grow by itself: grow its source"):
        ntkpipe.compute_kernel(model(), longer, store=tmp_path / "d", kind="trace", **options)
    grown = ntkpipe.compute_kernel(model(), longer, store=tmp_path / "s", kind="ntk", **options)
    found = derive(grown, "trace", tmp_path / "e")
    blocks = grown.train.blocks[:, :]
    assert np.allclose(found.train, np.einsum("ijoo->ij", blocks) / 3, rtol=1e-5, atol=1e-6)
    assert found.manifest.growth == ()
    assert ntkpipe.verify(found, model(), longer, progress=False).is_good
