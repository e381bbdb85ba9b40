"""The workflows of this repository: data and models are what they say, and each is planned and run when small."""

import textwrap
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ntkpipe
from ntkpipe.app import workflow
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.imports import import_object

FOLDER = Path(__file__).parents[2] / "workflows"
WORKFLOWS = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.yaml"))

CIFAR_RECORDS = 12  # in each file that the tests write
CIFAR = ("model.arguments.width=2", f"data.arguments.records_per_file={CIFAR_RECORDS}", "data.arguments.num_train=4")

# Workflow → what makes it small. Those that are small anyway are planned as they are.
SMALL: dict[str, tuple[str, ...]] = {
    "mnist60k/pntk": (
        "model.arguments.width=8",
        "data.arguments.num_samples=40",
        "data.arguments.num_test=10",
        "run.workers=1",
    ),
    "generalisation/init": ("model.arguments={width: 8}", "data.arguments={num_train: 40, num_test: 10}"),
    "generalisation/trained": (
        "model.arguments={width: 8, epochs: 2, num_train: 40}",
        "data.arguments={num_train: 40, num_test: 10}",
    ),
    "cifar10/pntk": (*CIFAR, "data.arguments.num_test=2"),
    "cifar10/ntk": (*CIFAR, "data.arguments.num_test=2"),
    "text/pntk": (
        "model.arguments={width: 8, num_layers: 1, length: 16, num_labels: 2}",
        "data.arguments={num_train: 6, num_test: 4, length: 16, packages: [mlxtend, zarr]}",
    ),
}


def write_cifar(folder: Path, *, records: int = CIFAR_RECORDS) -> Path:
    """Write files of CIFAR-10's binary format: record i of file f has label i mod 10, pixel p is f + i + p mod 256."""
    folder = folder / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for number, name in enumerate(names):
        rows = [bytes([i % 10, *((number + i + p) % 256 for p in range(3072))]) for i in range(records)]
        (folder / name).write_bytes(b"".join(rows))
    return folder


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a small CIFAR-10 and let the environment variable lead to it."""
    folder = write_cifar(tmp_path / "data")
    monkeypatch.setenv("NTKPIPE_CIFAR10", str(folder))
    return folder


@pytest.mark.parametrize("name", sorted(set(WORKFLOWS) - set(SMALL)))
def test_workflow_that_is_small_is_planned_as_it_is(name: str, tmp_path: Path) -> None:
    planned, _ = workflow.plan(workflow.load(FOLDER / f"{name}.yaml", [f"store={tmp_path / 'k.zarr'}"]))
    assert planned.problems == ()
    assert planned.tiles_done == 0


@pytest.mark.usefixtures("cifar")
# Where the tracing has no rule and vmap cannot follow, as in the mask of transformers' BERT, it says that it is slow.
@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run this model")
@pytest.mark.parametrize("name", SMALL)
def test_workflow_is_planned_and_runs_when_small(name: str, tmp_path: Path) -> None:
    loaded = workflow.load(FOLDER / f"{name}.yaml", [f"store={tmp_path / 'k.zarr'}", *SMALL[name]])
    planned, _ = workflow.plan(loaded)
    assert planned.problems == ()
    results = list(workflow.run(loaded, progress=False))
    assert [result.step for result in results] == ["kernel", *(step.step for step in loaded.workflow.steps)]
    assert all(result.is_good for result in results)
    store = ntkpipe.open_kernel(tmp_path / "k.zarr")
    arguments, width = loaded.workflow.data.arguments, store.manifest.num_covectors
    num_train = arguments.get("num_train", arguments.get("num_samples"))
    assert store.train.shape == (num_train * width, num_train * width)
    assert store.test_train.shape == (arguments["num_test"] * width, num_train * width)
    np.testing.assert_array_equal(store.targets, loaded.data["targets"])


def mnist60k(*arguments: Any, **more: Any) -> dict[str, Any]:
    return import_object("factories:data", FOLDER / "mnist60k")(*arguments, **more)


@pytest.fixture(scope="module")
def positions(parsed: tuple[np.ndarray, np.ndarray]) -> dict[bytes, tuple[int, int, int]]:
    """Return (original, down, right) by image, for every position of every original."""
    found = {}
    for i, image in enumerate(parsed[0].astype(np.uint8).reshape(-1, 28, 28)):
        for down, right in product(range(-2, 3), repeat=2):
            shifted = np.zeros_like(image)
            kept = image[max(0, -down) : 28 - max(0, down), max(0, -right) : 28 - max(0, right)]
            shifted[max(0, down) : 28 + min(0, down), max(0, right) : 28 + min(0, right)] = kept
            found[shifted.tobytes()] = (i, down, right)
    assert len(found) == 25 * 5000
    return found


def as_bytes(images: np.ndarray) -> list[bytes]:
    return [image.tobytes() for image in np.rint(images * 255).astype(np.uint8)]


def test_mnist60k_is_every_original_and_eleven_shifted_copies(
    parsed: tuple[np.ndarray, np.ndarray], positions: dict[bytes, tuple[int, int, int]]
) -> None:
    made = mnist60k()
    assert set(made) == {"inputs", "targets"}
    assert (made["inputs"].shape, made["inputs"].dtype) == ((60_000, 784), np.float32)
    assert (made["inputs"].min(), made["inputs"].max()) == (0, 1)
    assert (made["targets"].shape, made["targets"].dtype) == ((60_000,), np.int64)
    where = [positions[image] for image in as_bytes(made["inputs"])]
    assert len(set(where)) == 60_000
    assert {i for i, down, right in where if down == right == 0} == set(range(5000))
    assert set(np.bincount([i for i, _, _ in where])) == {12}
    np.testing.assert_array_equal(made["targets"], parsed[1][[i for i, _, _ in where]])


def test_nothing_in_the_train_set_of_mnist60k_is_made_from_a_test_image(
    parsed: tuple[np.ndarray, np.ndarray], positions: dict[bytes, tuple[int, int, int]]
) -> None:
    made = mnist60k(num_test=1000)
    train, test = ([positions[image] for image in as_bytes(made[name])] for name in ("inputs", "test_inputs"))
    assert (len(set(train)), len(set(test))) == (60_000, 1000)
    assert all(down == right == 0 for _, down, right in test)
    assert not {i for i, _, _ in train} & {i for i, _, _ in test}
    np.testing.assert_array_equal(made["test_targets"], parsed[1][[i for i, _, _ in test]])


def test_test_images_of_mnist60k_are_those_of_mnist5k() -> None:
    made = mnist60k(num_samples=1, num_test=1000)
    other = import_object("factories:data", FOLDER / "mnist5k")()
    np.testing.assert_array_equal(made["test_inputs"], other["test_inputs"])
    np.testing.assert_array_equal(made["test_targets"], other["test_targets"])


def test_mnist60k_is_the_same_each_time_and_fewer_samples_are_the_first() -> None:
    few, more, other = mnist60k(300), mnist60k(700), mnist60k(300, seed=1)
    np.testing.assert_array_equal(few["inputs"], more["inputs"][:300])
    np.testing.assert_array_equal(few["targets"], more["targets"][:300])
    assert not np.array_equal(few["inputs"], other["inputs"])


@pytest.mark.parametrize("wrong", [{"num_samples": 0}, {"num_samples": 60_001}, {"num_test": -1}, {"num_test": 2601}])
def test_mnist60k_says_how_many_samples_it_has(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"needed 1 to 60,000 train and 0 to 2,600 test samples"):
        mnist60k(**wrong)
    assert len(mnist60k(num_samples=2, num_test=2600)["inputs"]) == 2


def cifar10(**arguments: Any) -> dict[str, Any]:
    factory = import_object("factories:data", FOLDER / "cifar10")
    return factory(**{"num_train": 20, "num_test": 3, "records_per_file": CIFAR_RECORDS, **arguments})


@pytest.mark.usefixtures("cifar")
def test_cifar10_is_normalised_and_in_the_order_of_its_files() -> None:
    made = cifar10()
    assert [len(made[name]) for name in ("inputs", "targets", "test_inputs", "test_targets")] == [20, 20, 3, 3]
    np.testing.assert_array_equal(made["targets"], [*range(10), 0, 1, *range(8)])
    np.testing.assert_array_equal(made["test_targets"], [0, 1, 2])
    assert made["targets"].dtype == np.int64
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    for name, i, file, record in (("inputs", 3, 0, 3), ("inputs", 15, 1, 3), ("test_inputs", 2, 5, 2)):
        pixels = ((file + record + np.arange(3072)) % 256).reshape(3, 32, 32)
        expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
        assert made[name][i].dtype == np.float32
        np.testing.assert_allclose(made[name][i], expected, rtol=1e-5, atol=1e-6)


def test_cifar10_is_found_in_the_folder_above_and_without_test_images(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path)
    for given in (folder, tmp_path):
        assert set(cifar10(folder=str(given), num_test=0)) == {"inputs", "targets"}


def test_files_of_cifar10_that_are_not_needed_are_not_opened(cifar: Path) -> None:
    for name in ("data_batch_2.bin", "test_batch.bin"):
        (cifar / name).unlink()
    assert len(cifar10(num_train=12, num_test=0)["inputs"]) == 12
    with pytest.raises(FileNotFoundError, match=r"data_batch_2\.bin is missing, though others"):
        cifar10(num_train=13, num_test=0)


@pytest.mark.parametrize("change", [-1, -3073, 1, 3073])
@pytest.mark.parametrize("name", ["data_batch_2.bin", "test_batch.bin"])
def test_a_file_of_cifar10_of_another_size_is_refused(cifar: Path, name: str, change: int) -> None:
    whole = (cifar / name).read_bytes()
    (cifar / name).write_bytes(whole[:change] if change < 0 else whole + bytes(change))
    message = rf"{name} holds {len(whole) + change:,} bytes; needed 36,876: 12 records of 3,073 bytes"
    with pytest.raises(ValueError, match=message):
        cifar10()


def test_a_label_that_cifar10_does_not_have_is_named(cifar: Path) -> None:
    path = cifar / "data_batch_2.bin"
    content = bytearray(path.read_bytes())
    content[3073 * 5] = 10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data_batch_2\.bin: record 5 has the label 10; needed 0 to 9"):
        cifar10()


@pytest.mark.usefixtures("cifar")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_train": 61}, r"61 images were asked for; data_batch_1\.bin to data_batch_5\.bin hold 60"),
        ({"num_test": 13}, r"13 images were asked for; test_batch\.bin to test_batch\.bin hold 12"),
        ({"num_train": 0}, r"num_train=0; needed at least one"),
        ({"num_test": -1}, r"-1 images were asked for"),
    ],
)
def test_cifar10_says_how_many_images_it_has(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cifar10(**wrong)


def test_without_cifar10_it_is_said_what_to_download_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NTKPIPE_CIFAR10", raising=False)
    how = r"download https://www\.cs\.toronto\.edu/\S+-binary\.tar\.gz.* NTKPIPE_CIFAR10 or as data\.arguments\.folder"
    path = FOLDER / "cifar10/pntk.yaml"
    with pytest.raises(ConfigError, match=rf"not part of this repository: {how}"):
        workflow.load(path)
    with pytest.raises(ConfigError, match=rf"no data_batch_1\.bin in \S+: {how}".replace(r"\S+", ".*")):
        workflow.load(path, [f"data.arguments.folder={tmp_path}"])
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").touch()
    with pytest.raises(ConfigError, match=rf"holds the Python version of CIFAR-10, which is not read.*{how}"):
        workflow.load(path, [f"data.arguments.folder={tmp_path}"])


def test_resnet18_has_the_shape_and_size_of_its_name() -> None:
    resnet18 = import_object("factories:resnet18", FOLDER / "cifar10")
    assert sum(parameter.numel() for parameter in resnet18().parameters()) == 11_173_962
    model, again, other = resnet18(width=2), resnet18(width=2), resnet18(width=2, seed=1)
    assert not any(module.training for module in model.modules())
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert model[:-3](images).shape == (3, 16, 4, 4)
    outputs = model(images)
    assert outputs.shape == (3, 10)
    torch.testing.assert_close(outputs, again(images), rtol=0, atol=0)
    assert not torch.equal(outputs, other(images))
    assert outputs.std(dim=0).min() > 0


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Write two packages with docstrings and return their names."""
    folder = tmp_path / "site"
    for name in ("ntkpipe_ants", "ntkpipe_bees"):
        (folder / name / "tests").mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise RuntimeError('sources are parsed, not imported')")
        (folder / name / "tests/inner.py").write_text(f'"""{name}: the docstring of a test does not count as text."""')
        shared = '"""A docstring that both of the two packages have at their top."""\n'
        made = [
            f'def f{i}():\n    """{name} has function number {i},\n    in two lines.\n\n    And more."""\n'
            for i in range(9)
        ]
        again = f'class C:\n    """Short."""\n{textwrap.indent(made[0], "    ")}'
        (folder / name / "inner.py").write_text(shared + "".join(made) + again)
    monkeypatch.syspath_prepend(folder)
    return ("ntkpipe_ants", "ntkpipe_bees")


def text(packages: Sequence[str], **arguments: Any) -> dict[str, Any]:
    factory = import_object("factories:data", FOLDER / "text")
    return factory(**{"num_train": 11, "num_test": 6, "length": 64, "packages": packages, **arguments})


def decode(inputs: dict[str, np.ndarray]) -> list[str]:
    return [bytes(int(token) for token in row if token < 256).decode() for row in inputs["input_ids"]]


def test_text_is_the_first_paragraph_of_each_docstring_once(packages: tuple[str, str]) -> None:
    made = text(packages, num_train=14, num_test=4)
    train, test = decode(made["inputs"]), decode(made["test_inputs"])
    every = {f"{name} has function number {i}, in two lines." for name in packages for i in range(9)}
    assert set(train) | set(test) == every
    assert len(train) + len(test) == len(every)
    for texts, targets in ((train, made["targets"]), (test, made["test_targets"])):
        assert [packages[target] for target in targets] == [one.partition(" ")[0] for one in texts]
        assert set(np.bincount(targets)) == {len(texts) // 2}


def test_tokens_of_text_are_bytes_and_the_mask_says_which_are_padding(packages: tuple[str, str]) -> None:
    made = text(packages, length=55)
    ids, mask = made["inputs"]["input_ids"], made["inputs"]["attention_mask"]
    assert (ids.shape, ids.dtype, mask.shape, mask.dtype) == ((11, 55), np.int64, (11, 55), np.int64)
    num_bytes = len("ntkpipe_ants has function number 0, in two lines.")
    np.testing.assert_array_equal(mask, np.broadcast_to(np.arange(55) < num_bytes + 2, (11, 55)))
    assert set(ids[:, 0]) == {257}
    assert set(ids[:, num_bytes + 1]) == {258}
    assert set(ids[mask == 0]) == {256}
    cut = text(packages, length=10)["inputs"]
    assert cut["attention_mask"].all()
    assert decode(cut) == [one[:8] for one in decode(made["inputs"])]


def test_text_is_the_same_each_time_and_fewer_samples_are_the_first(packages: tuple[str, str]) -> None:
    few, more, other = text(packages, num_train=5), text(packages), text(packages, seed=1)
    assert decode(few["inputs"]) == decode(more["inputs"])[:5]
    assert decode(few["test_inputs"]) == decode(more["test_inputs"])
    assert decode(more["inputs"]) != decode(other["inputs"])
    assert not set(decode(more["inputs"])) & set(decode(more["test_inputs"]))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"num_train": 14}, ValueError, r"ntkpipe_ants has 9 paragraphs; needed 10"),
        ({"length": 2}, ValueError, r"length=2; needed at least 3"),
        ({"packages": ["no_such_package"]}, ModuleNotFoundError, r"'no_such_package' is not installed"),
        ({"packages": ["textwrap"]}, ModuleNotFoundError, r"'textwrap' is no package"),
    ],
)
def test_text_says_what_it_lacks(
    packages: tuple[str, str], wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        text(**{"packages": packages, **wrong})


def test_padding_does_not_change_what_bert_says() -> None:
    tokenize = import_object("factories:tokenize", FOLDER / "text")
    model = import_object("factories:bert", FOLDER / "text")(width=8, num_layers=1, length=32)
    assert not model.training
    short, long = (
        {name: torch.from_numpy(values) for name, values in tokenize(["some words"], length).items()}
        for length in (12, 32)
    )
    assert short["attention_mask"].all()
    assert not long["attention_mask"].all()
    torch.testing.assert_close(model(**short).logits, model(**long).logits)


def test_generalisation_trains_the_model_of_mnist5k_and_to_the_same_weights_again() -> None:
    made = import_object("factories:data", FOLDER / "generalisation")()
    other = import_object("factories:data", FOLDER / "mnist5k")()
    for name in ("inputs", "targets", "test_inputs", "test_targets"):
        np.testing.assert_array_equal(made[name], other[name])
    mlp = import_object("factories:mlp", FOLDER / "generalisation")
    start = import_object("factories:mlp", FOLDER / "mnist5k")(width=16).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in mlp(width=16).state_dict().items())
    trained, again = mlp(width=16, epochs=5), mlp(width=16, epochs=5).state_dict()
    assert not trained.training
    assert all(torch.equal(value, again[name]) for name, value in trained.state_dict().items())
    right = trained(torch.from_numpy(made["test_inputs"])).argmax(dim=1).numpy() == made["test_targets"]
    assert right.mean() > 0.8
