"""Means of blocks of a kernel against slow sums over pairs of samples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from manifests import small_manifest

from ntkpipe import open_kernel
from ntkpipe.base.errors import TileError
from ntkpipe.base.targets import encode
from ntkpipe.report.gather import arrange, block_means
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.store import Store


def store_kernel(path: Path, rng: np.random.Generator, *, num_samples: int, width: int) -> Kernel:
    kind = "ntk" if width > 1 else "pntk"
    manifest = small_manifest(num_samples, None, kind=kind, num_outputs=width, tile=4)
    rows = num_samples * width
    factor = rng.standard_normal((rows, rows))
    array = Store.create(path, manifest).arrays["kernel/train"]
    for index in array.layout.indices():
        array.write(index, (factor @ factor.T)[array.layout.region(index)])
    return open_kernel(path).train


def slow_means(entries: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Sample by sample; those with themselves only where a group has no other."""
    found = np.zeros((count, count))
    for a, b in np.ndindex(count, count):
        first, second = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
        pairs = [(i, j) for i in first for j in second if i != j or len(first) == 1]
        found[a, b] = np.mean([entries[i, j] for i, j in pairs])
    return found


@pytest.mark.parametrize("width", [1, 3])
def test_means_are_those_of_single_pairs(tmp_path: Path, rng: np.random.Generator, width: int) -> None:
    kernel = store_kernel(tmp_path / "k.zarr", rng, num_samples=11, width=width)
    whole = kernel.to_numpy().reshape(11, width, 11, width)
    entries = np.einsum("iojo->ij", whole) / width
    classes, singles = rng.permutation([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3]), np.arange(11)
    found = block_means(kernel, [classes, singles])
    np.testing.assert_allclose(found[0], slow_means(entries, classes, 4), rtol=1e-12)
    np.testing.assert_allclose(found[1], entries, rtol=1e-12)


def test_a_missing_tile_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    kernel = store_kernel(tmp_path / "k.zarr", rng, num_samples=11, width=1)
    (tmp_path / "k.zarr/kernel/train/c/0/1").unlink()
    with pytest.raises(TileError, match=r"tile \(0, 1\)"):
        block_means(kernel, [np.zeros(11, np.int64)])


def test_samples_are_sorted_by_class_and_neighbours_share_a_row() -> None:
    found = arrange(encode([7, 3, 3, 7, 0, 3]), 6)
    assert found.names == ("0", "3", "7")
    assert found.bounds == (1, 4)
    assert found.bins.tolist() == [4, 1, 2, 5, 0, 3]
    assert found.classes is not None
    assert found.classes.tolist() == [2, 1, 1, 2, 0, 1]
    many = arrange(encode(np.arange(1000) % 2), 1000)
    assert (np.bincount(many.bins) >= 3).all()
    assert many.bins[1] > many.bins[998]


def test_other_targets_sort_by_size_or_not_at_all() -> None:
    assert arrange(encode([0.3, 0.1, 0.2]), 3).bins.tolist() == [2, 0, 1]
    assert arrange(encode(np.ones((3, 2))), 3).order == "as stored"
    assert arrange(None, 3).bins.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ([2, 1, 2, 3], ("1", "2", "3")),
        ([1, -1, 1, 1], ("-1", "1")),
        ([True, False, True, True], ("False", "True")),
        (["cat", "dog", "cat", "ant"], ("ant", "cat", "dog")),
    ],
)
def test_any_labels_are_classes(targets: list[Any], names: tuple[str, ...]) -> None:
    found = arrange(encode(targets), 4)
    assert found.names == names
    assert found.classes is not None
    assert [names[code] for code in found.classes] == list(map(str, targets))
