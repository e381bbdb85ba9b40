"""A third source, the tangent kernel of an infinitely wide network, lives in a store as a model does."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pytest
from damage import flip
from manifests import small_manifest
from sklearn.datasets import load_digits
from small import Allowance, chunks, times

from ntkpipe.base.errors import Interrupted
from ntkpipe.build.life import Place, PlaneSource, fill
from ntkpipe.build.mend import mend, verify_with
from ntkpipe.store.manifest import ArrayRecord, DataRecord, Manifest

DIGITS = {"train": load_digits().data[:900] / 16, "test": load_digits().data[900:] / 16}


def arc_cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """NTK of one hidden layer of ReLUs, infinitely wide. Cho and Saul (2009); Jacot et al. (2018)."""
    scale = np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))
    cosine = np.clip(x @ y.T / scale, -1, 1)
    return scale / x.shape[1] * (2 * cosine * (np.pi - np.arccos(cosine)) + np.sqrt(1 - cosine**2)) / np.pi


def record(split: str, count: int) -> DataRecord:
    x, options = DIGITS[split][:count], {"is_mapping": False, "targets": None, "targets_digest": None}
    inputs = {"input": ArrayRecord(shape=x.shape[1:], dtype=str(x.dtype))}
    return DataRecord(num_samples=len(x), inputs=inputs, inputs_digest=hashlib.sha256(x).hexdigest(), **options)


@dataclass(frozen=True)
class ArcCosine(PlaneSource):
    manifest: Manifest

    def data(self, array, index):
        folder, split, *_ = array.layout.name.split("/")
        values = DIGITS[split][array.layout.region(index)[0]]
        return np.zeros((len(values), 1)) if folder == "outputs" else values

    def planes(self, kernel, rows, columns):
        x = DIGITS["train" if kernel == "kernel/train" else "test"][rows.start : rows.stop]
        found = arc_cosine(x, x if kernel == "kernel/test_diagonal" else DIGITS["train"][columns.start : columns.stop])
        yield found.diagonal()[:, None, None] if kernel == "kernel/test_diagonal" else found

    def first(self, stored):
        return record("train", stored.train.num_samples), record("test", stored.test.num_samples)

    def products(self, signs, step):
        x = {split: DIGITS[split][: getattr(self.manifest, split).num_samples] for split in DIGITS}
        return {(None, None, split): arc_cosine(x[split], x["train"]) @ signs for split in x}


def source(n: int, m: int) -> ArcCosine:
    sets = {"train": record("train", n), "test": record("test", m)}
    return ArcCosine(small_manifest(kind="pntk", num_outputs=1, tile=16, **sets))


def test_a_formula_is_created_interrupted_resumed_grown_verified_and_repaired(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Allowance(patch, 6, KeyboardInterrupt())
        with pytest.raises(Interrupted, match=r"6 of 18 tiles are in .*; every finished"):
            fill(Place.at(tmp_path / "k"), source(50, 20), progress=False)
    before, large, x = times(tmp_path / "k"), source(70, 33), DIGITS["train"]
    fill(Place.at(tmp_path / "k"), source(50, 20), progress=False)
    assert before.items() <= times(tmp_path / "k").items()
    store = fill(Place.at(tmp_path / "k", grow=True), large, progress=False)
    assert store.manifest.growth[0].train.num_samples == 50
    assert [each["is_good"] for each in verify_with(store, large, progress=False).certificates] == [True, True]
    np.testing.assert_allclose(store.arrays["kernel/train"].read((1, 4)), arc_cosine(x[16:32], x[64:70]), rtol=1e-12)
    good, bad = chunks(store.root), {("kernel/train", (3, 3)), ("kernel/test_train", (1, 2)), ("outputs/test", (2, 0))}
    for name, index in bad:
        flip(store.arrays[name].path(index))
    report = mend(store, lambda: large, progress=False)
    assert (report.is_good, {(action.array, action.index) for action in report.actions}) == (True, bad)
    assert chunks(store.root) == good
