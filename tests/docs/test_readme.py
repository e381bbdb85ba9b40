"""The README's Python runs as it stands, block after block."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_python_blocks_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert "2500 x 2500 float32, 23.8 MiB" in repr(names["store"].train)  # type: ignore[attr-defined]


def test_files_that_the_readme_names_exist() -> None:
    text = README.read_text()
    named = re.findall(r"\]\(([^)h][^)]*)\)", text) + re.findall(r"workflows/\S+\.yaml", text)
    assert named
    assert [name for name in named if not (README.parent / name.partition("#")[0]).exists()] == []


def test_headings_that_the_readme_names_exist() -> None:
    anchors = re.findall(r"\]\(([^)h#][^)#]*)#([^)]+)\)", README.read_text())
    assert anchors
    for name, anchor in anchors:
        headings = re.findall(r"^#+ (.+)$", (README.parent / name).read_text(), flags=re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
