"""The guide's Python runs as it stands, its links lead somewhere, and its words are those of the code."""

import re
from pathlib import Path

import pytest

import ntkpipe

PACKAGE = Path(ntkpipe.__file__).parent
GUIDE = Path(__file__).parents[2] / "notebooks" / "GUIDE.md"
TEXT = GUIDE.read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
        exec(block, names)
    assert names["predicted"].dims == ("test_sample", "output")  # type: ignore[attr-defined]
    assert names["accuracy"] > 0.8  # type: ignore[operator]
    assert names["probabilities"].shape == (60, 3)  # type: ignore[attr-defined]


def test_links_lead_to_files_and_headings() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", TEXT, flags=re.M)
    }
    assert {target[1:] for target in targets if target.startswith("#")} <= headings
    files = [target.partition("#")[0] for target in targets if not target.startswith(("#", "http"))]
    assert files
    assert [name for name in files if not (GUIDE.parent / name).exists()] == []


def test_words_of_the_glossary_are_names_in_the_code() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    table = TEXT.partition("## Words and symbols")[2]
    names = {
        name for row in table.splitlines() if row.startswith("| ") for name in re.findall(r"`(\w+)`", row.split("|")[2])
    }
    assert len(names) > 30
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", sources)) == []


def test_nothing_is_left_to_fill_in() -> None:
    assert re.findall(r"@[A-Z_]+@|TODO", TEXT) == []
