"""Kernels as xarray sees them: the same numbers under names, read where they are indexed and nowhere else."""

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray

from ntkpipe.base.errors import ConfigError, ResourceError, TileError
from ntkpipe.store import kernel as kernel_module
from ntkpipe.store import views
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.kernel_store import KernelSet, KernelStore, open_kernel
from ntkpipe.store.layout import Index
from ntkpipe.store.manifest import ArrayRecord, Manifest
from ntkpipe.store.store import Store

N, M, OUT, TILE = 7, 5, 2, 3
KINDS = ("ntk", "pntk", "trace", "diagonal")


def fill(store: Store) -> None:
    """Every array gets numbers of its own; symmetric kernels are symmetric."""
    rng = np.random.default_rng(0)
    for array in store.arrays.values():
        values = rng.standard_normal(array.layout.shape)
        if array.layout.grid is not None and array.layout.grid.symmetric:
            values = (values + values.T) / 2
        for index in array.layout.indices():
            array.write(index, (9 * values[array.layout.region(index)]).astype(array.layout.dtype))


@pytest.fixture(scope="module", params=KINDS)
def store(
    request: pytest.FixtureRequest, make_manifest: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory
) -> KernelStore:
    manifest = make_manifest(N, M, num_outputs=OUT, tile=TILE, kind=request.param, groups={"head": ("weight",)})
    where = tmp_path_factory.mktemp("labelled") / "k.zarr"
    fill(Store.create(where, manifest))
    return open_kernel(where)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Index]]]:
    """Chunks that are read, in order."""
    found: list[tuple[str, Index]] = []
    read = StoredArray.read

    def watched(self: StoredArray, index: Index, buffer: NDArray[np.uint8] | None = None) -> NDArray[Any]:
        found.append((self.layout.name, index))
        return read(self, index, buffer)

    monkeypatch.setattr(StoredArray, "read", watched)
    return found


def whole(kernels: KernelSet, name: str) -> NDArray[np.float64]:
    """A kernel in the shape that the view should have, by numpy alone."""
    kind = kernels.store.manifest.kind
    if kind == "diagonal" and kernels._output is None:
        return np.stack([np.asarray(getattr(kernels.output(output), name)) for output in range(OUT)])
    matrix = np.asarray(getattr(kernels, name))
    return matrix.reshape(len(matrix) // OUT, OUT, N, OUT) if kind == "ntk" else matrix


def dimensions(kind: str, rows: str) -> tuple[str, ...]:
    return {"ntk": (rows, "output", "sample_", "output_"), "diagonal": ("output", rows, "sample_")}.get(
        kind, (rows, "sample_")
    )


def test_a_view_has_the_numbers_and_names_of_the_store(store: KernelStore) -> None:
    view, kind = store.to_xarray(), store.manifest.kind
    assert view.train.dims == dimensions(kind, "sample")
    assert view.test_train.dims == dimensions(kind, "test_sample")
    for name in ("train", "test_train"):
        assert view[name].dtype == np.float64
        np.testing.assert_array_equal(view[name].values, whole(store, name))
    assert view.test_diagonal.dims == {
        "ntk": ("test_sample", "output", "output_"),
        "diagonal": ("output", "test_sample"),
    }.get(kind, ("test_sample",))
    expected = (
        np.stack([store.output(output).test_diagonal for output in range(OUT)])
        if kind == "diagonal"
        else store.test_diagonal
    )
    np.testing.assert_array_equal(view.test_diagonal.values, expected.reshape(view.test_diagonal.shape))
    assert view.outputs.dims == ("sample", "output")
    np.testing.assert_array_equal(view.outputs.values, store.outputs)
    np.testing.assert_array_equal(view.test_outputs.values, store.test_outputs)


def test_targets_are_coordinates_of_rows_and_of_columns(store: KernelStore) -> None:
    view = store.to_xarray()
    for name in ("target", "target_"):
        np.testing.assert_array_equal(view.train[name].values, store.targets)
    np.testing.assert_array_equal(view.test_train.test_target.values, store.test_targets)
    assert store.targets is not None
    chosen = store.targets > 0
    part = view.train.isel(sample=view.target > 0)
    np.testing.assert_array_equal(part.target.values, store.targets[chosen])
    at = view.train.dims.index("sample")
    np.testing.assert_array_equal(part.values, np.compress(chosen, whole(store, "train"), axis=at))


@pytest.mark.parametrize(
    ("shape", "names"),
    [((OUT,), ("output",)), ((3,), ("target_axis_1",)), ((3, 4), ("target_axis_1", "target_axis_2"))],
)
def test_targets_of_several_numbers_have_dimensions(
    shape: tuple[int, ...], names: tuple[str, ...], make_manifest: Callable[..., Manifest], tmp_path: Path
) -> None:
    manifest = make_manifest(N, None, num_outputs=OUT, tile=TILE, kind="pntk")
    record = manifest.train.model_copy(update={"targets": ArrayRecord(shape=shape, dtype="float64")})
    fill(Store.create(tmp_path / "k.zarr", manifest.model_copy(update={"train": record})))
    store = open_kernel(tmp_path / "k.zarr")
    view = store.to_xarray()
    assert (view.target.dims, view.target_.dims) == (
        ("sample", *names),
        ("sample_", *(f"{name}_" for name in names)),
    )
    np.testing.assert_array_equal(view.target.values, store.targets)
    assert set(view.data_vars) == {"train", "outputs"}  # no test samples


def test_attributes_say_what_was_computed_and_are_numbers_and_texts(store: KernelStore) -> None:
    found, manifest = store.to_xarray().attrs, store.manifest
    assert found["kind"] == manifest.kind
    assert found["convention"] == manifest.convention
    assert found["manifest_digest"] == manifest.digest()
    assert found["compute_dtype"] == "float64"
    assert all(isinstance(value, str | int) for value in found.values())


def test_groups_and_single_outputs_have_views(store: KernelStore) -> None:
    group = store.group("head")
    view = group.to_xarray()
    assert view.attrs["group"] == "head"
    np.testing.assert_array_equal(view.train.values, whole(group, "train"))
    assert not np.array_equal(view.train.values, store.to_xarray().train.values)
    if store.manifest.kind == "diagonal":
        picked = group.output(1).to_xarray()
        assert picked.attrs["picked_output"] == 1
        assert picked.train.dims == ("sample", "sample_")
        np.testing.assert_array_equal(picked.train.values, np.asarray(group.output(1).train))


KEYS: list[dict[str, Any]] = [
    {"sample": 3},
    {"sample": -1, "sample_": 6},
    {"sample": slice(1, 6, 2), "sample_": slice(None, None, -1)},
    {"sample": [5, 0, 0, 3], "sample_": 2},
    {"sample": [5, 0, 3], "sample_": [6, 6]},
    {"sample": slice(4, 4)},
    {"sample": xr.DataArray([0, 4, 6], dims="pair"), "sample_": xr.DataArray([5, 4, 0], dims="pair")},
    {"sample": xr.DataArray([[0, 4], [6, 1]], dims=("a", "b")), "sample_": [1, 2]},
    {"output": 1},
    {"output": [1, 0], "output_": [1]},
    {"output": xr.DataArray([0, 1, 1], dims="pair"), "sample": xr.DataArray([5, 4, 0], dims="pair")},
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing_means_what_it_means_of_an_array(store: KernelStore, key: dict[str, Any]) -> None:
    lazy = store.to_xarray().train
    loaded = xr.DataArray(whole(store, "train"), dims=lazy.dims)
    key = {name: part for name, part in key.items() if name in lazy.dims}
    found, expected = lazy.isel(key), loaded.isel(key)
    assert (found.dims, found.shape, found.dtype) == (expected.dims, expected.shape, expected.dtype)
    np.testing.assert_array_equal(found.values, expected.values)
    part = {found.dims[-1]: slice(2)} if found.dims else {}
    np.testing.assert_array_equal(found.T.isel(part).values, expected.T.isel(part).values)


def test_samples_and_blocks_are_indexed_as_arrays(store: KernelStore) -> None:
    view = store.to_xarray()
    pair = {"test_sample": xr.DataArray([4, 0], dims="p"), "output": xr.DataArray([1, 0], dims="p")}
    for name in ("test_outputs", "test_diagonal"):
        loaded = view[name].copy(data=view[name].values)
        keys = [{"test_sample": [4, 1]}, {"test_sample": slice(3, 3)}, {"test_sample": slice(4, 0, -2)}, pair]
        for key in keys:
            inside = {axis: part for axis, part in key.items() if axis in loaded.dims}
            np.testing.assert_array_equal(view[name].isel(inside).values, loaded.isel(inside).values)


def test_nothing_is_read_before_values_are_asked_for(store: KernelStore, reads: list[tuple[str, Index]]) -> None:
    view = store.to_xarray()
    part = view.train.isel(sample=[0, 1], sample_=slice(3)).T
    shown = repr(view) + view._repr_html_() + repr(part)
    assert (view.nbytes > 0, "float64" in shown, len(pickle.dumps(view)) > 0) == (True, True, True)
    assert reads == []


def test_a_read_takes_the_tiles_of_what_is_indexed(store: KernelStore, reads: list[tuple[str, Index]]) -> None:
    view, kind = store.to_xarray(), store.manifest.kind
    if kind == "diagonal":
        view = view.isel(output=0)
    np.asarray(view.train.isel(sample=6, sample_=slice(0, 3)))  # from the mirror of tile (2, 0)
    assert [index for _, index in reads] == [(0, 2)]
    reads.clear()
    np.asarray(view.test_train.isel(test_sample=slice(2)))
    assert [index for _, index in reads] == [(0, 0), (0, 1), (0, 2)]
    reads.clear()
    everyone = xr.DataArray(np.arange(N), dims="sample")
    blocks = np.asarray(view.train.isel(sample=everyone, sample_=everyone))
    assert {index for _, index in reads} == {(0, 0), (1, 1), (2, 2)}
    kernel = store.output(0).train if kind == "diagonal" else store.train
    np.testing.assert_array_equal(blocks[3], np.squeeze(kernel.blocks[3, 3]))


def test_products_by_name_predict(store: KernelStore, rng: np.random.Generator) -> None:
    view = store.to_xarray()
    kind, test_train = store.manifest.kind, whole(store, "test_train")
    if kind == "ntk":
        coefficients = xr.DataArray(rng.standard_normal((N, OUT)), dims=("sample_", "output_"))
        expected = np.einsum("iojp,jp->io", test_train, coefficients.values)
    else:
        coefficients = xr.DataArray(rng.standard_normal((N, OUT)), dims=("sample_", "output"))
        expected = np.einsum("oij,jo->io" if kind == "diagonal" else "ij,jo->io", test_train, coefficients.values)
    contracted = [name for name in coefficients.dims if name.endswith("_")]
    found = xr.dot(view.test_train, coefficients, dim=contracted)
    np.testing.assert_allclose(found.transpose("test_sample", "output").values, expected, rtol=1e-12)


def test_one_kernel_has_a_view_without_the_store(store: KernelStore) -> None:
    kernels = store.output(1) if store.manifest.kind == "diagonal" else store
    found = kernels.test_train.to_xarray()
    assert found.name == "test_train"
    assert found.attrs["array"] == kernels.test_train.name
    np.testing.assert_array_equal(found.values, whole(kernels, "test_train"))


def test_views_survive_pickling_without_their_numbers(store: KernelStore) -> None:
    view = store.to_xarray()
    dumped = pickle.dumps(view.isel(sample=slice(2)))
    assert len(dumped) < 8_000
    np.testing.assert_array_equal(pickle.loads(dumped).train.values, view.train.isel(sample=slice(2)).values)


def test_chunks_are_read_by_dask(store: KernelStore) -> None:
    chunked = store.to_xarray().train.chunk(sample=TILE)
    np.testing.assert_array_equal(chunked.compute(scheduler="synchronous").values, whole(store, "train"))


def test_a_damaged_tile_and_a_matrix_beyond_memory_are_refused(
    make_manifest: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Store.create(tmp_path / "k.zarr", make_manifest(N, M, num_outputs=OUT, tile=TILE, kind="pntk"))
    fill(written)
    Path(written.arrays["kernel/train"].path((0, 1))).unlink()
    view = open_kernel(tmp_path / "k.zarr").to_xarray()
    with pytest.raises(TileError, match=r"tile \(0, 1\) of kernel/train .* is missing"):
        np.asarray(view.train.isel(sample=5, sample_=0))
    np.asarray(view.train.isel(sample=slice(3), sample_=slice(3)))
    monkeypatch.setattr(kernel_module, "available_memory", lambda: 100)
    with pytest.raises(ResourceError, match="needs 200 B"):
        np.asarray(view.test_train.isel(sample_=slice(5)))


def test_a_missing_library_is_named_with_its_extra(store: KernelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ntkpipe.store.views.to_xarray", raising=False)
    monkeypatch.delattr(views, "to_xarray", raising=False)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ConfigError, match=r"xarray.*pip install 'ntkpipe\[xarray\]'"):
        store.to_xarray()
