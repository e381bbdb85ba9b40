"""Notebooks run top to bottom on a small store."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from ntkpipe import workflow

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", ["pntk", "ntk"])
@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [f"store={tmp_path / 'k.zarr'}", f"kernel.kind={kind}", "model.arguments.width=8", "steps=[]"]
    for _ in workflow.run(workflow.load(ROOT / "workflows/digits/pntk.yaml", overrides), progress=False):
        pass
    monkeypatch.setenv("NTKPIPE_STORE", str(tmp_path / "k.zarr"))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "torch was loaded to read this: False" in printed
