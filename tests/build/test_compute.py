"""The public functions: what they refuse and how they say it, what they resume, and what they adopt from a store."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small import Allowance, chunks, compute, inputs, mlp, times
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from ntkpipe import compute_kernel, kernel_matrix, open_kernel, plan_kernel, verify
from ntkpipe.base.errors import (
    ArgumentError,
    ConfigError,
    DataError,
    Interrupted,
    ModelError,
    NonFiniteError,
    NtkpipeError,
    ResourceError,
    StoreError,
    StoreExistsError,
    StoreMismatchError,
)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "k.zarr"


def retargeted() -> np.ndarray:
    return np.arange(18)[::-1]


class Renamed(nn.Sequential):
    """Has the parameters of the model that is stored, but is another class."""


OTHER = {
    "model": ({"model": mlp(seed=1)}, "model.state_digest"),
    "class": ({"model": Renamed(*mlp())}, "model.structure_digest"),
    "parameters": ({"parameters": "0.*"}, "model.parameters"),
    "inputs": ({"inputs": inputs(seed=5)}, "train.inputs_digest"),
    "dtype of inputs": ({"inputs": inputs().astype("f8"), "test_inputs": inputs(7, 1).astype("f8")}, "train.inputs"),
    "number": ({"inputs": inputs(17), "targets": np.arange(17)}, "train.num_samples"),
    "targets": ({"targets": retargeted()}, "train.targets_digest"),
    "no targets": ({"targets": None}, "train.targets"),
    "test inputs": ({"test_inputs": inputs(7, seed=5)}, "test.inputs_digest"),
    "no test inputs": ({"test_inputs": None}, "test"),
    "kind": ({"kind": "ntk"}, "kind"),
    "compute dtype": ({"compute_dtype": "float64"}, "compute_dtype"),
    "accumulate dtype": ({"accumulate_dtype": "float64"}, "accumulate_dtype"),
    "store dtype": ({"store_dtype": "float64"}, "store_dtype"),
    "tile": ({"tile": 5}, "tile"),
    "forward": ({"forward": lambda output: 2 * output}, "outputs"),
    "outputs": ({"forward": lambda output: output[:, :2]}, "num_outputs"),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_store_of_something_else_is_refused_field_by_field(path, name):
    compute(path)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    changes, field = OTHER[name]
    with pytest.raises(StoreMismatchError) as info:
        compute(path, **changes)
    differing = {found: (stored, asked) for found, stored, asked in info.value.differences}
    assert any(found == field or found.startswith(f"{field}.") for found in differing)
    assert all(stored != asked for stored, asked in differing.values())
    if name != "forward":
        assert f"{len(differing)} fields differ" in str(info.value)
        assert "→ asked" in str(info.value)
        assert "mode='w'" in str(info.value)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before


def test_several_differences_are_listed_together(path):
    compute(path)
    with pytest.raises(StoreMismatchError, match=r"kind: stored 'pntk' → asked 'ntk'.*tile: stored 4 → asked 6"):
        compute(path, kind="ntk", tile=6)


def test_what_does_not_decide_numbers_may_differ(path):
    compute(path)
    before = times(path)
    compute(path, workers=1, memory_limit="3GiB", self_check=True, progress=True)
    assert times(path) == before


def test_without_a_tile_the_stored_one_is_adopted(path):
    compute(path, tile=5)
    assert compute(path, tile=None).manifest.tile == 5


def test_modes(path):
    compute(path, mode="w-")
    before = times(path)
    with pytest.raises(StoreExistsError, match="mode='w-' only creates"):
        compute(path, mode="w-")
    compute(path, mode="a")
    assert times(path) == before
    compute(path, mode="w", kind="ntk")
    assert open_kernel(path).manifest.kind == "ntk"
    assert [entry.name for entry in path.parent.iterdir()] == ["k.zarr"]


def test_starting_over_keeps_the_old_store_until_the_new_one_is_certain(path):
    compute(path)
    with pytest.raises(ResourceError):
        compute(path, mode="w", memory_limit=1)
    assert compute(path).progress.is_complete


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"mode": "r"}, ConfigError, "mode='r'; needed 'a'"),
        ({"kind": "nkt"}, ConfigError, "did you mean 'ntk'"),
        ({"tile": 0}, ConfigError, "tile=0"),
        ({"tile": 2.5}, ConfigError, "tile=2.5"),
        ({"workers": 0}, ConfigError, "workers=0"),
        ({"memory_limit": 0}, ConfigError, "memory_limit=0"),
        ({"memory_limit": "much"}, ConfigError, "memory_limit='much'"),
        ({"memory_limit": 1}, ResourceError, r"needs \d.* of which .* are in use already; the limit is 1 B"),
        ({"compute_dtype": "float16"}, ConfigError, "compute_dtype='float16'"),
        ({"client": object()}, ConfigError, "needed a distributed.Client"),
        ({"device": "gpu"}, ConfigError, "device='gpu'"),
        ({"parameters": "none*"}, ModelError, "those that require a gradient are 0.weight"),
        ({"model": lambda x: x}, ModelError, "the model is function"),
        ({"model": mlp().train()}, ModelError, "train"),
        ({"inputs": inputs(0)}, DataError, "holds no samples"),
        ({"targets": np.arange(17)}, DataError, r"18 samples, its targets have shape \(17,\)"),
        ({"test_inputs": None, "test_targets": np.arange(7)}, DataError, "without test_inputs"),
        ({"test_inputs": {"input": inputs(7)}}, DataError, "test_inputs has samples a dict"),
        ({"inputs": inputs()[:, :3], "test_inputs": None}, ModelError, "cannot be multiplied"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(path, changes, error, words):
    if "model" in changes and changes["model"] is not None and isinstance(changes["model"], nn.Module):
        changes["model"].append(nn.Dropout(0.5))
    with pytest.raises(error, match=words):
        compute(path, **changes)
    assert not path.exists()


@pytest.mark.parametrize("argument", ["inputs", "test_inputs"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_named(path, argument, value):
    bad = inputs(18 if argument == "inputs" else 7).copy()
    bad[3, 1] = bad[6, 2] = value
    split = "train" if argument == "inputs" else "test"
    message = f"{argument}: NaN entries in" if np.isnan(value) else f"Jacobians or outputs of {split}"
    with pytest.raises(NonFiniteError, match=f"{message} samples 3, 6"):
        compute(path, **{argument: bad})
    assert not path.exists()


class Root(nn.Module):
    """Its outputs are finite, its Jacobian is infinite where the sum of the inputs is zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4))

    def forward(self, x):
        return (x @ self.weight.T).abs().sqrt()


def test_jacobians_that_are_not_finite_are_named_and_nothing_of_them_is_written(path):
    rows = np.abs(inputs()) + 1
    rows[9] = [1.0, -1.0, 2.0, -2.0]
    with pytest.raises(NonFiniteError, match=r"train sample 9 are NaN or infinite"):
        compute(path, model=Root(), inputs=rows)
    store = open_kernel(path).store
    for array in store.arrays.values():
        assert all(np.isfinite(array.read(index)).all() for index in array.present())
    assert not any(2 in index for index in store.arrays["kernel/train"].present())


class Broken(Dataset):
    def __len__(self):
        return 18

    def __getitem__(self, i):
        if i == 11:
            raise OSError("cannot read image 11")
        return inputs()[i]


def test_a_data_set_that_fails_leaves_no_store(path):
    with pytest.raises(DataError, match="raised OSError at item 11: cannot read image 11"):
        compute(path, inputs=Broken(), targets=None)
    assert not path.exists()


class Ragged(Broken):
    def __getitem__(self, i):
        return inputs()[i, : 4 if i < 9 else 3]


class Augmented(Broken):
    def __getitem__(self, i):
        return torch.randn(4)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [(Ragged(), "do not have the same arrays"), (Augmented(), "differs each time it is read")],
)
def test_data_sets_whose_samples_cannot_be_used_are_refused(path, dataset, words):
    with pytest.raises(DataError, match=words):
        compute(path, inputs=dataset, targets=None, test_inputs=None)
    assert not path.exists()


@pytest.mark.parametrize(
    "given",
    [
        torch.from_numpy(inputs()).requires_grad_(),
        TensorDataset(torch.from_numpy(inputs()), torch.arange(18)),
        {"input": inputs()},
        inputs().astype(">f4"),
        np.asfortranarray(inputs()),
        inputs()[::-1].copy()[::-1],
        list(inputs()),
    ],
    ids=["requires grad", "pairs", "dict", "big-endian", "Fortran", "negative strides", "list"],
)
def test_the_same_samples_in_any_form_give_the_same_bits(path, tmp_path, given):
    compute(tmp_path / "plain", test_inputs=None)
    compute(path, inputs=given, test_inputs=None)
    kernels = [{k: v for k, v in chunks(p).items() if "kernel" in k} for p in (path, tmp_path / "plain")]
    assert kernels[0] == kernels[1]


def test_arrays_that_cannot_be_written_are_not(path):
    rows = inputs()
    rows.flags.writeable = False
    assert compute(path, inputs=rows).progress.is_complete


@pytest.mark.parametrize("place", ["a file", "a folder", "below a file"])
@pytest.mark.parametrize("mode", ["a", "w", "w-"])
def test_what_is_not_a_store_is_left_alone(tmp_path, place, mode):
    target = tmp_path / "thing"
    if place == "a folder":
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
    else:
        target.write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match="thing"):
        compute(target / "k.zarr" if place == "below a file" else target, mode=mode)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("given", ["a b/ü.zarr", "sub/../k.zarr", "./k.zarr"])
def test_relative_and_odd_paths(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    compute(given)
    assert open_kernel(tmp_path / given).progress.is_complete


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    compute("~/k.zarr")
    assert open_kernel(tmp_path / "k.zarr").progress.is_complete
    assert open_kernel("~/k.zarr").path == tmp_path / "k.zarr"


@pytest.mark.parametrize("given", [None, 3, "https://bucket/k.zarr"])
def test_what_is_no_path_is_refused(given):
    with pytest.raises(NtkpipeError, match="path"):
        compute(given)


@pytest.mark.parametrize("num_samples", [1, 2, 3])
@pytest.mark.parametrize("kind", ["ntk", "pntk"])
def test_the_smallest_kernels(path, num_samples, kind):
    rows = inputs(num_samples)
    store = compute(path, inputs=rows, targets=None, test_inputs=rows[:1], kind=kind, tile=None, self_check=True)
    np.testing.assert_allclose(store.train[:], kernel_matrix(mlp(), rows, kind=kind), rtol=1e-5)
    assert verify(store, progress=False).is_good


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.layer(x.unflatten(1, (2, 2)))[0][:, -1])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run:UserWarning")
def test_a_layer_that_vmap_runs_in_float32_alone_passes_the_self_check():
    torch.manual_seed(0)
    model = Recurrent().eval()
    exact = kernel_matrix(model, inputs(), compute_dtype="float64")
    np.testing.assert_allclose(kernel_matrix(model, inputs()), exact, rtol=1e-4, atol=1e-5 * exact.max())


def test_plans_write_nothing_and_say_what_a_run_does(path):
    plan, found = plan_kernel(mlp(), inputs(), store=path, tile=4, test_inputs=inputs(7))
    assert not path.exists()
    assert (plan.workload.num_tiles, plan.tiles_done) == (25, 0)
    assert [name for each in found for name in each.parameters] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert sum(each.num_parameters for each in found) == 4 * 5 + 5 + 5 * 3 + 3
    assert sum(each.share for each in found) == pytest.approx(1)


@pytest.mark.parametrize("jacobian", ["structured", "fallback"])
def test_a_plan_reports_what_the_manifest_records(path, jacobian):
    _, before = plan_kernel(mlp(), inputs(), store=path, tile=4, jacobian=jacobian)
    recorded = compute(path, jacobian=jacobian).manifest.choices.representations
    assert {each.name: f"{each.rule}:{each.representation}" for each in before} == recorded
    ask = {"test_inputs": inputs(7, seed=1), "targets": np.arange(18), "jacobian": jacobian}
    _, after = plan_kernel(mlp(), inputs(), store=path, tile=4, **ask)
    assert after == before


def test_a_plan_times_the_jacobians(path, monkeypatch):
    plan, _ = plan_kernel(mlp(), inputs(), store=path, tile=4, workers=1)
    assert plan.sample_seconds > 0
    assert plan.seconds >= 18 * plan.sample_seconds
    unfit, _ = plan_kernel(mlp(), inputs(), store=path, memory_limit=1)
    assert unfit.sample_seconds is None
    monkeypatch.setattr("ntkpipe.store.media.folder.free_disk", lambda _: 1)
    too_large, _ = plan_kernel(mlp(), inputs(), store=path, tile=4, workers=1)
    assert too_large.problems
    assert too_large.sample_seconds > 0


def test_a_plan_of_a_store_counts_what_is_there_and_keeps_its_choices(path, monkeypatch):
    with monkeypatch.context() as patch:
        Allowance(patch, 9, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            compute(path)
    ask = partial(plan_kernel, mlp(), store=path, test_inputs=inputs(7, seed=1), targets=np.arange(18))
    plan, _ = ask(inputs())
    assert (plan.workload.tile, plan.tiles_done) == (4, 9)
    assert plan.strip == open_kernel(path).manifest.choices.strip
    assert plan.bytes_to_write >= 16 * (4 * 4 * 4 + 4)
    with pytest.raises(StoreMismatchError, match=r"train\.num_samples"):
        ask(inputs(17), targets=np.arange(17))


def test_a_plan_that_does_not_fit_says_so(path):
    plan, _ = plan_kernel(mlp(), inputs(), store=path, memory_limit=1)
    assert len(plan.problems) == 1
    assert "the limit is 1 B" in dict(plan.rows())["does not fit"]


@pytest.mark.parametrize("kind", ["ntk", "pntk"])
def test_the_kernel_in_memory_is_the_stored_one(path, kind):
    store = compute(path, kind=kind)
    options = {"kind": kind, "tile": 4, "workers": 2, "self_check": False}
    np.testing.assert_array_equal(kernel_matrix(mlp(), inputs(), **options), store.train[:])
    cross = kernel_matrix(mlp(), inputs(7, seed=1), inputs(), **options)
    np.testing.assert_array_equal(cross, store.test_train[:])


def test_the_kernel_in_memory_counts_its_own_memory(monkeypatch):
    with pytest.raises(ResourceError, match=r"of memory with one worker, .* the limit is 1.0 MiB"):
        kernel_matrix(mlp(), inputs(600), memory_limit="1MiB")
    monkeypatch.setattr("ntkpipe.build.prepare.process_memory", lambda: 0)
    with pytest.raises(ResourceError, match=r"of which 1.4 MiB are in use already; the limit is 1.0 MiB"):
        kernel_matrix(mlp(), inputs(600), memory_limit="1MiB", self_check=False)
    monkeypatch.setattr("ntkpipe.store.kernel.available_memory", lambda: 10**6)
    with pytest.raises(ResourceError, match="Use compute_kernel, which writes a store"):
        kernel_matrix(mlp(), inputs(600))


def test_neither_model_nor_torch_settings_are_changed(path):
    model, threads = mlp(), torch.get_num_threads()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compute(path, model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.get_num_threads() == threads


def test_a_killed_creation_is_completed_at_every_step(path, tmp_path):
    """Creation writes the group, then array after array: any start of that sequence is a store to resume."""
    compute(tmp_path / "whole")
    made = sorted((tmp_path / "whole").rglob("zarr.json"), key=lambda file: file.stat().st_mtime_ns)
    made = [file for file in made if "results" not in file.parts]
    for count in range(len(made) + 1):
        target = tmp_path / f"cut{count}"
        target.mkdir()
        (target / "zarr.json.0123.partial").write_text("{")
        for file in made[:count]:
            copy = target / file.relative_to(tmp_path / "whole")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
        if count == 0 or (target / "zarr.json").exists():
            compute(target)
            assert chunks(target) == chunks(tmp_path / "whole")
    assert os.path.samefile(made[0].parent, tmp_path / "whole")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda path: compute_kernel(mlp(), inputs(), store=path, tilee=4), ArgumentError, "the nearest is 'tile'"),
        (lambda path: compute_kernel(mlp(), inputs(), store=3), ConfigError, "store=3; needed text or a path"),
        (lambda path: compute_kernel(mlp(), inputs(), store=path, tile=2.5), ConfigError, "needed an integer or None"),
        (lambda path: plan_kernel(mlp(), inputs(), store=path, tilee=4), ArgumentError, r"plan_kernel\(\) .* 'tilee'"),
        (lambda path: plan_kernel(mlp(), inputs(), store=path, workers="two"), ConfigError, "workers='two'"),
        (lambda _: kernel_matrix(mlp(), inputs(), groups={"a": "0.*"}), ArgumentError, "has no argument 'groups'"),
        (lambda _: kernel_matrix(mlp(), inputs(), jacobian="loop"), ConfigError, "needed 'structured' or 'fallback'"),
    ],
)
def test_arguments_of_another_name_or_type_are_refused(path, call, error, words):
    with pytest.raises(error, match=words):
        call(path)
    assert not path.exists()


def test_a_plan_prints_as_a_table_of_its_rows_and_of_its_jacobians(path):
    plan, found = asked = plan_kernel(mlp(), inputs(), store=path, tile=4)
    lines = str(asked).splitlines()
    assert [line.split()[0] for line in lines[: len(plan.rows())]] == [name.split()[0] for name, _ in plan.rows()]
    assert len(lines) == len(plan.rows()) + len({(each.rule, each.representation) for each in found})
    assert all(line.endswith("% of the contraction") for line in lines[len(plan.rows()) :])
    assert str(plan).splitlines()[1].split(maxsplit=1)[0] == "tile"
