"""Notebooks run top to bottom: on small stores that others made, without torch, or on what they make themselves."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import ntkpipe
from ntkpipe.app import workflow

ROOT = Path(__file__).parents[2]
# What each notebook reads: one store of any kind, or a folder of several.
OF_A_STORE = ("first_look", "spectra_and_generalisation")
OF_A_FOLDER = ("choosing_kind_and_dtype",)
ALONE = ("finite_and_infinite_width",)


def compute(file: str, *settings: str) -> None:
    for _ in workflow.run(workflow.load(ROOT / "workflows/digits" / file, [*settings, "steps=[]"]), progress=False):
        pass


def printed_by(name: str, folder: Path) -> str:
    """What the cells of a notebook print."""
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in ROOT.glob("notebooks/*.ipynb")} == {*OF_A_STORE, *OF_A_FOLDER, *ALONE}


@pytest.fixture(scope="module", params=[("pntk", 150), ("ntk", 40)], ids=lambda param: param[0])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (kind, num_train), path = request.param, tmp_path_factory.mktemp("store") / "k.zarr"
    settings = [f"store={path}", f"kernel.kind={kind}", f"data.arguments.num_train={num_train}"]
    compute("pntk.yaml", *settings, "model.arguments.width=16")
    return path


@pytest.mark.parametrize("name", OF_A_STORE)
def test_a_notebook_of_a_store_runs(name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NTKPIPE_STORE", str(store))
    assert "torch was loaded to read this: False" in printed_by(name, tmp_path)


def test_the_notebook_of_kinds_and_dtypes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = OF_A_FOLDER
    settings = ["data.arguments.num_train=40", "model.arguments.channels=4"]
    for compute_dtype, store_dtype in [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")]:
        where = [f"store={tmp_path / f'ntk-{compute_dtype}.zarr'}"]
        dtypes = [f"kernel.compute_dtype={compute_dtype}", f"kernel.store_dtype={store_dtype}"]
        compute("ntk_cnn.yaml", *settings, *where, *dtypes)
    for kind in ("pntk", "trace"):
        ntkpipe.derive_kernel(
            tmp_path / "ntk-float64.zarr", kind=kind, to=tmp_path / f"{kind}-float64.zarr", progress=False
        )
    monkeypatch.setenv("NTKPIPE_STORES", str(tmp_path))
    printed = printed_by(name, tmp_path)
    assert "torch was loaded to read this: False" in printed
    assert "computed in bfloat16, stored in float32, against float64" in printed


def test_the_notebook_of_widths_runs_and_finds_what_it_says(tmp_path: Path) -> None:
    printed = printed_by(*ALONE, tmp_path)
    slopes = [float(slope) for slope in re.findall(r"slope (-?[\d.]+)", printed)]
    assert len(slopes) == 5
    assert all(-0.7 < slope < -0.3 for slope in slopes)  # of three draws a width
    assert all(float(accuracy) > 95 for accuracy in re.findall(r"NN?[TG][KP]: ([\d.]+)% of", printed))


@pytest.mark.parametrize("name", [*OF_A_STORE, *OF_A_FOLDER, *ALONE])
def test_a_notebook_shows_what_it_was_run_with(name: str) -> None:
    """Numbers and pictures are kept, from a whole run in order."""
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
