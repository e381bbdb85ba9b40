"""Whatever users have as samples is read alike, fingerprinted, and refused by name where it cannot be."""

import collections
from decimal import Decimal
from fractions import Fraction

import dask.array
import numpy as np
import pandas as pd
import pytest
import reference
import scipy.sparse
import torch
import xarray as xr
import zarr
from reference import redraw
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, TensorDataset

from ntkpipe import compute_kernel
from ntkpipe.base.errors import ConfigError, DataError, NonFiniteError
from ntkpipe.jacobian.model import samples as datasets
from ntkpipe.jacobian.model.samples import StoredSource, as_samples, require_same_arrays, show_samples
from ntkpipe.store.store import Store

NUM_SAMPLES = 6
INPUTS = np.arange(NUM_SAMPLES * 4, dtype=np.float32).reshape(NUM_SAMPLES, 4)
TARGETS = np.arange(NUM_SAMPLES)
TOKENS = {"ids": np.arange(18).reshape(6, 3), "mask": np.ones((6, 3), bool)}


class Stream(IterableDataset):
    """A data set without a length."""

    def __iter__(self):
        return iter(INPUTS)


class Columns:
    """A table without the protocols of one: [name] is a column."""

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, name):
        return TOKENS[name]


class Rows:
    """A map-style data set of dicts."""

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, i):
        return {name: values[i] for name, values in TOKENS.items()}


def _group(arrays):
    group = zarr.group()
    for name, values in arrays.items():
        group.create_array(name, data=values)
    return group


SINGLE = {
    "array": INPUTS,
    "tensor": torch.from_numpy(INPUTS),
    "tensor that requires a gradient": torch.from_numpy(INPUTS.copy()).requires_grad_(),
    "view": np.asfortranarray(INPUTS),
    "list": list(INPUTS),
    "data set": TensorDataset(torch.from_numpy(INPUTS)),
    "pairs": TensorDataset(torch.from_numpy(INPUTS), torch.from_numpy(TARGETS)),
    "parts": ConcatDataset([TensorDataset(torch.from_numpy(INPUTS[:2])), TensorDataset(torch.from_numpy(INPUTS[2:]))]),
    "deque": collections.deque(INPUTS),
    # Neither its columns nor its index are samples.
    "frame": pd.DataFrame(INPUTS),
    "frame with names": pd.DataFrame(INPUTS, columns=list("abcd")),
    "frame in another order": pd.DataFrame(INPUTS, index=[3, 1, 0, 2, 5, 4]),
    "series of rows": pd.Series(list(INPUTS), index=list("badcfe")),
    "rows as objects": np.array([*INPUTS, None], dtype=object)[:-1],
    "data array": xr.DataArray(INPUTS, dims=("time", "place"), coords={"place": [3, 1, 2, 0]}),
    "dask": dask.array.from_array(INPUTS, chunks=(4, 3)),
    "data array of dask": xr.DataArray(INPUTS).chunk(4),
    "zarr": zarr.array(INPUTS, chunks=(4, 3)),
    "zarr of another byte order": zarr.array(INPUTS.astype(INPUTS.dtype.newbyteorder(">")), chunks=(4, 3)),
    "buffer": memoryview(INPUTS),
    "matrix": np.asmatrix(INPUTS),
    "masked without a mask": np.ma.array(INPUTS),
}
MAPPING = {
    "arrays": TOKENS,
    "tensors": {name: torch.from_numpy(values) for name, values in TOKENS.items()},
    "rows": Rows(),
    "frames": {name: pd.DataFrame(values, index=[5, 4, 3, 2, 1, 0]) for name, values in TOKENS.items()},
    "xarray": xr.Dataset({name: (("sample", "position"), values) for name, values in TOKENS.items()}),
    "lists": {name: values.tolist() for name, values in TOKENS.items()},
    "user dict": collections.UserDict(TOKENS),
    "group of zarr": _group(TOKENS),
    "parameters": nn.ParameterDict({k: nn.Parameter(torch.from_numpy(v), False) for k, v in TOKENS.items()}),
    "zarrs": {name: zarr.array(values, chunks=(4, 3)) for name, values in TOKENS.items()},
    "list of dicts": [{name: values[i] for name, values in TOKENS.items()} for i in range(NUM_SAMPLES)],
}


@pytest.mark.parametrize("inputs", SINGLE.values(), ids=SINGLE)
def test_single_inputs_are_the_same_samples(inputs):
    samples = as_samples(inputs, TARGETS)
    assert (samples.num_samples, samples.is_mapping) == (NUM_SAMPLES, False)
    found = samples.source.read(2, 5)
    assert list(found) == ["input"]
    np.testing.assert_array_equal(found["input"], INPUTS[2:5])
    assert samples.inspect("inputs") == as_samples(INPUTS, TARGETS).inspect("inputs")


@pytest.mark.parametrize("inputs", MAPPING.values(), ids=MAPPING)
def test_mappings_are_the_same_samples(inputs):
    samples = as_samples(inputs)
    assert samples.is_mapping
    found = samples.source.read(1, 4)
    for name, values in TOKENS.items():
        np.testing.assert_array_equal(found[name], values[1:4])
        assert found[name].dtype == values.dtype
    assert samples.inspect("inputs") == as_samples(TOKENS).inspect("inputs")


def test_targets_of_pairs_are_taken_unless_others_are_given():
    pairs = TensorDataset(torch.from_numpy(INPUTS), torch.from_numpy(TARGETS))
    np.testing.assert_array_equal(as_samples(pairs).targets, TARGETS)
    np.testing.assert_array_equal(as_samples(pairs, TARGETS + 1).targets, TARGETS + 1)
    assert as_samples(INPUTS).targets is None


TARGET_KINDS = {
    "series": pd.Series(TARGETS, index=[3, 1, 0, 2, 5, 4]),
    "nullable": pd.Series(TARGETS, dtype="Int64"),
    "objects": pd.Series(TARGETS, dtype=object),
    "category of numbers": pd.Series(TARGETS, dtype="category"),
    "data array": xr.DataArray(TARGETS),
    "list": TARGETS.tolist(),
    "tuple": tuple(TARGETS),
    "tensors": list(torch.from_numpy(TARGETS)),
}


@pytest.mark.parametrize("targets", TARGET_KINDS.values(), ids=TARGET_KINDS)
def test_targets_are_read_in_the_order_of_their_rows(targets):
    found = as_samples(pd.DataFrame(INPUTS), targets).targets
    np.testing.assert_array_equal(found, TARGETS)
    assert found.dtype.kind == "i"


def test_columns_of_a_frame_that_differ_in_type_become_numbers():
    frame = pd.DataFrame({"a": [1, 2], "b": [0.5, -1.0], "c": [True, False], "d": pd.Series([7, 8], dtype="Int8")})
    expected = [[1, 0.5, 1, 7], [2, -1, 0, 8]]
    np.testing.assert_array_equal(as_samples(frame).source.read(0, 2)["input"], expected)
    nullable = pd.DataFrame(INPUTS).astype("Float32")
    np.testing.assert_array_equal(as_samples(nullable).source.read(0, 6)["input"], INPUTS)


def test_what_is_cut_into_chunks_is_read_in_runs(monkeypatch):
    class Far:
        """An array that is never there as a whole."""

        shape, chunks, read = (6, 4), (2, 4), []

        def __getitem__(self, rows):
            self.read.append((rows.start, rows.stop))
            return INPUTS[rows]

        def __array__(self, dtype=None, copy=None):
            raise AssertionError

    monkeypatch.setattr(datasets, "_SCAN_BYTES", 40)
    assert as_samples(Far()).inspect("x") == as_samples(INPUTS).inspect("x")
    assert as_samples({"input": Far()}).num_samples == NUM_SAMPLES
    assert max(stop - start for start, stop in Far.read) == 2


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 2, 0]])
def test_frames_must_have_their_columns_in_one_order(order):
    train, names = pd.DataFrame(INPUTS, columns=list("abcd")), np.array(list("abcd"))
    test = train[names[order]]
    for wrap in (lambda frame: frame, lambda frame: {"x": frame}):
        if order == [0, 1, 2, 3]:
            require_same_arrays(as_samples(wrap(train)), as_samples(wrap(test)), "test_inputs")
        else:
            with pytest.raises(DataError, match=r"columns \['d', 'b', 'c', 'a'\], inputs \['a'"):
                require_same_arrays(as_samples(wrap(train)), as_samples(wrap(test)), "test_inputs")
    require_same_arrays(as_samples(train), as_samples(pd.DataFrame(test.to_numpy())), "test_inputs")
    require_same_arrays(as_samples(train), as_samples(test.to_numpy()), "test_inputs")


def test_arrays_in_memory_are_not_copied():
    assert np.shares_memory(as_samples(INPUTS).source.read(1, 3)["input"], INPUTS)
    tensor = torch.from_numpy(INPUTS)
    assert np.shares_memory(as_samples(tensor).source.read(1, 3)["input"], INPUTS)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (torch.ones(2, 3, dtype=torch.bfloat16), "float32"),
        (torch.ones(2, 3, dtype=torch.float16), "float16"),
        (np.ones((2, 3), ">f8"), "float64"),
        (np.ones((2, 3), ">i4"), "int32"),
        (np.ones((2, 3), np.longdouble), "float64"),
        (np.ones((2, 3), np.uint8), "uint8"),
    ],
)
def test_dtypes_become_ones_that_torch_and_the_store_have(values, dtype):
    found = as_samples(values).source.read(0, 2)["input"]
    assert str(found.dtype) == dtype
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, np.ones((2, 3)))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.empty((0, 4)), "x holds no samples"),
        ([], "x holds no samples"),
        ({}, "x is an empty dict"),
        (np.array(3.0), "x is a scalar"),
        (3, "x is int; needed a tensor"),
        (Stream(), "x is Stream; needed a tensor"),
        (DataLoader(INPUTS), "x is DataLoader; needed a tensor"),
        (np.full(3, 2**70), r"x has dtype object; needed real numbers, integers or booleans$"),
        (np.ones((6, 0)), r"x has shape \(6, 0\): its samples are empty"),
        (torch.eye(3).to_sparse(), r"x \(Tensor\) cannot be made an array: .*to_dense"),
        (torch.ones(3, 2, device="meta"), r"x \(Tensor\) cannot be made an array"),
        ([torch.eye(3).to_sparse()], r"inputs\['input'\] \(Tensor\) cannot be made an array"),
        (scipy.sparse.csr_array(INPUTS), r"x is csr_array, without a length.*\.toarray\(\)"),
        ({"a": scipy.sparse.csr_array(INPUTS)}, r"x\['a'\] is csr_array, which is no array; pass .*\.toarray\(\)"),
        (np.ma.masked_greater(INPUTS, 3), "x has masked entries, which are no data"),
        ({"a": np.ma.masked_greater(INPUTS, 3)}, r"x\['a'\] has masked entries"),
        (
            np.zeros(3, [("a", "f8"), ("b", "f8")]),
            r"x has dtype .*; pass a dict of its fields, as in \{'a': array\['a'\]\}",
        ),
        ((INPUTS, TARGETS), "x is a tuple of 2; pass inputs and targets by name"),
        ((INPUTS, INPUTS), "x is a tuple of 2; .* several inputs of a model as a dict of arrays"),
        ((INPUTS,), "x is a tuple of 1"),
        (collections.namedtuple("Pair", "x y")(INPUTS, TARGETS), "x is a tuple of 2"),
        (pd.DataFrame({"a": [1.0, 2.0], "b": ["u", "v"]}), r"x has dtype object for u \(str\) in row 0; .*np\.unique"),
        (
            pd.DataFrame({"a": [1, None], "b": [2, 3]}, dtype="Int64"),
            r"x has dtype object for <NA> \(NAType\) in row 1; needed real",
        ),
        (pd.DataFrame({"a": [1.0], "b": pd.to_datetime(["2020"])}), r"x has dtype object for 2020.*Timestamp"),
        (pd.Series(pd.to_datetime(["2020"])), r"x has dtype datetime64"),
        ({"a": pd.Series(["u", "v"], dtype="category")}, r"x\['a'\] has dtype .*np\.unique"),
        ({"a": INPUTS, "b": None}, r"x\['b'\] is NoneType, which is no array"),
        ({"a": INPUTS, "b": _group(TOKENS)}, r"x\['b'\] is Group, which is no array"),
        ({"a": INPUTS, "b": {"c": INPUTS}}, r"x\['b'\] is dict, which is no array"),
        (
            xr.Dataset({"a": (("n", "m"), np.ones((3, 3))), "b": (("m", "n"), np.ones((3, 3)))}),
            r"dimension 'n' first in 'a' and",
        ),
        ([object()], r"inputs\['input'\] is object, which is no array"),
        ([None, None], r"inputs\['input'\] is NoneType"),
        ({"a": INPUTS}.items(), "x is dict_items; needed a tensor"),
        (iter(INPUTS), "x is generator|x is iterator"),
        ("inputs.npy", "x is str; needed a tensor"),
        (b"abcd", "x is bytes; needed a tensor"),
        (Columns(), r"the data set \(Columns\) raised KeyError at item 0: 0; its \[i\] must be a sample"),
        (np.array(["a", "b"]), "x has dtype <U1; needed real numbers"),
        (np.ones((2, 3), complex), "x has dtype complex128"),
        (torch.ones(2, 3, dtype=torch.complex64), "x has dtype complex64"),
        ({"a": INPUTS, "b": INPUTS[:2]}, r"x has arrays of unequal lengths \(a: \(6, 4\), b: \(2, 4\)\)"),
        ({"a": np.array(1.0)}, "x has arrays of unequal lengths"),
        ({"a b": INPUTS}, "x has the key 'a b'"),
        ({1: INPUTS}, "x has the key 1"),
        (TensorDataset(*[torch.ones(2)] * 3), "items of x have 3 parts"),
    ],
)
def test_what_is_no_samples_is_refused_by_name(inputs, message):
    with pytest.raises(DataError, match=message):
        as_samples(inputs, label="x").source.read(0, 1)


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        (["a", "b"] * 3, DataError, r"np.unique\(labels, return_inverse=True\)"),
        ([1, 2, None] * 2, NonFiniteError, "2 samples are missing .*first of sample 2"),
        (np.ma.array(np.arange(6), mask=np.arange(6) == 2), ConfigError, "1 entries are masked"),
        (["a", 1] * 3, ConfigError, r"several types.*\(int, str\)"),
        ([[1.0], [1.0, 2.0]] * 3, ConfigError, "list that NumPy does not take"),
    ],
)
def test_targets_that_are_no_numbers_are_refused(targets, error, words):
    with pytest.raises(error, match=words):
        as_samples(INPUTS, targets)


def test_decimals_and_fractions_are_numbers():
    given = [[Decimal(int(one)) / 2 for one in row] for row in INPUTS]
    for inputs in (given, pd.DataFrame(given), [[Fraction(one) for one in row] for row in given]):
        np.testing.assert_array_equal(as_samples(inputs).source.read(0, 6)["input"], INPUTS / 2)


def test_targets_of_objects_are_numbers():
    for given in (np.arange(6).astype(object), [Decimal(i) / 2 for i in range(6)], torch.arange(6.0).bfloat16()):
        found = as_samples(INPUTS, given).targets
        np.testing.assert_array_equal(found, np.asarray([float(one) for one in given]))


@pytest.mark.parametrize("targets", [TARGETS[:3], np.array(1), np.ones((7, 2))])
def test_targets_must_be_one_a_sample(targets):
    with pytest.raises(DataError, match=r"x holds 6 samples, its targets have shape"):
        as_samples(INPUTS, targets, label="x")


def test_samples_of_unequal_shape_are_named():
    samples = as_samples([np.ones(3), np.ones(3), np.ones(4)])
    with pytest.raises(DataError, match=r"'input' of sample 2 has shape \(4,\), of sample 0 \(3,\).*pad or crop"):
        samples.source.read(0, 3)
    with pytest.raises(DataError, match=r"the target of sample 1 has shape \(3,\), of sample 0 \(2,\)"):
        _ = as_samples([(np.ones(3), np.ones(2)), (np.ones(3), np.ones(3))]).targets
    with pytest.raises(DataError, match=r"'b' of sample 1 has shape \(\), of sample 0 None"):
        as_samples([{"a": 1.0}, {"a": 1.0, "b": 2.0}]).source.read(0, 2)


def test_samples_with_nan_are_named(monkeypatch):
    monkeypatch.setattr(datasets, "_SCAN_BYTES", 40)  # two samples a scan
    inputs = INPUTS.copy()
    inputs[[1, 4], [0, 3]] = np.nan
    inputs[2] = np.inf
    with pytest.raises(NonFiniteError, match=r"x: NaN entries in samples 1, 4; fill or drop them"):
        as_samples(inputs, label="x").inspect("x")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_targets_that_are_not_finite_are_named(bad):
    targets = TARGETS.astype(float)
    targets[3] = bad
    with pytest.raises(NonFiniteError, match=r"targets of x: NaN or infinite entries in sample 3$"):
        as_samples(INPUTS, targets, label="x")


@pytest.mark.parametrize("scan_bytes", [1, 40, 10**6])
def test_one_sample_of_each_arrangement_of_infinite_entries_is_found(monkeypatch, scan_bytes):
    monkeypatch.setattr(datasets, "_SCAN_BYTES", scan_bytes)
    inputs = INPUTS.copy()
    inputs[[1, 4], 2] = -np.inf  # alike
    inputs[2, 2], inputs[5, :2] = np.inf, -np.inf
    samples = as_samples({"x": inputs, "y": TARGETS})
    samples.inspect("x")
    samples.inspect("x")
    assert samples.infinite == [1, 2, 5]
    assert samples.first(3).infinite == []
    monkeypatch.setattr(datasets, "_MOST_PATTERNS", 2)
    samples.inspect("x")
    assert samples.infinite == [1, 2]


@pytest.mark.parametrize("scan_bytes", [1, 40, 10**6])
def test_the_fingerprint_does_not_depend_on_how_the_samples_are_scanned(monkeypatch, scan_bytes):
    expected = as_samples(TOKENS, TARGETS).inspect("inputs")
    monkeypatch.setattr(datasets, "_SCAN_BYTES", scan_bytes)
    samples = as_samples(TOKENS, TARGETS)
    assert samples.inspect("inputs") == expected
    assert [i for start, stop in samples.spans() for i in range(start, stop)] == list(range(NUM_SAMPLES))


def _changed(values, index, value):
    copy = values.copy()
    copy[index] = value
    return copy


CHANGES = {
    "entry": ({**TOKENS, "ids": _changed(TOKENS["ids"], (5, 2), 99)}, TARGETS),
    "dtype": ({**TOKENS, "ids": TOKENS["ids"].astype(np.int32)}, TARGETS),
    "order": ({**TOKENS, "ids": TOKENS["ids"][::-1]}, TARGETS),
    "name": ({"ids": TOKENS["ids"], "masks": TOKENS["mask"]}, TARGETS),
    "target": (TOKENS, _changed(TARGETS, 0, 99)),
    "target dtype": (TOKENS, TARGETS.astype(np.int32)),
    "no targets": (TOKENS, None),
    "fewer samples": ({name: values[:5] for name, values in TOKENS.items()}, TARGETS[:5]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_fingerprint_sees_a_change(change):
    assert as_samples(*change).inspect("inputs") != as_samples(TOKENS, TARGETS).inspect("inputs")


def test_a_data_set_that_changes_its_dtype_midway_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "_SCAN_BYTES", 1)
    with pytest.raises(DataError, match=r"'input' of samples 1:2 is .*float64.*float32"):
        as_samples([np.ones(3, np.float32), np.ones(3)]).inspect("x")


@pytest.mark.parametrize("dtypes", [(np.float64, np.float32), (np.float16, np.float64)])
def test_real_inputs_of_two_dtypes_give_the_kernel_of_their_values(tmp_path, dtypes):
    train, test = (np.random.default_rng(n).standard_normal((5 + n, 4)).astype(d) for n, d in enumerate(dtypes))
    model = redraw(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))).double()
    exact = reference.kernel(model, torch.from_numpy(np.concatenate([train, test]).astype(float)))
    found = compute_kernel(
        model, train, test_inputs=test, store=tmp_path / "a", kind="ntk", compute_dtype="float64", progress=False
    )
    np.testing.assert_allclose(found.train[:], exact[:10, :10], atol=1e-12 * np.abs(exact).max())
    np.testing.assert_allclose(found.test_train[:], exact[10:, :10], atol=1e-12 * np.abs(exact).max())


def test_train_and_test_must_be_alike():
    train = as_samples(INPUTS)
    for other in (INPUTS[:2], INPUTS.astype(float), INPUTS.astype(np.float16)):  # all become the compute dtype
        require_same_arrays(train, as_samples(other), "test_inputs")
    for other in (INPUTS[:, :3], INPUTS.astype(int), INPUTS > 0, {"input": INPUTS}, TOKENS):
        with pytest.raises(DataError, match=r"test_inputs has samples .*; inputs has input: \(4,\) float32"):
            require_same_arrays(train, as_samples(other), "test_inputs")


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (1, 3), (2, 5)])
def test_stored_samples_are_those_that_were_written(tmp_path, make_manifest, start, stop):
    samples = as_samples(TOKENS)
    manifest = make_manifest().model_copy(update={"train": samples.inspect("inputs")})
    store = Store.create(tmp_path / "a.zarr", manifest)
    for name, values in TOKENS.items():
        array = store.arrays[f"samples/train/{name}"]
        for index in array.layout.indices():
            array.write(index, values[array.layout.region(index)])
    found = StoredSource(store, "train", NUM_SAMPLES).read(start, stop)
    assert set(found) == set(TOKENS)
    for name, values in TOKENS.items():
        np.testing.assert_array_equal(found[name], values[start:stop])


def test_long_lists_of_samples_are_cut():
    assert show_samples([3]) == "sample 3"
    assert show_samples(range(10)) == "samples 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
