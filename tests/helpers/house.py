"""The structure of the package, read from its imports: folders, floors, arrows.

``python tests/helpers/house.py`` prints what ``tests/test_architecture.py`` checks.
"""

import ast
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "ntkpipe"


@dataclass(frozen=True)
class Import:
    """One import of one name: of a library (its top name), or of something in this package (its dotted name)."""

    line: int
    library: str | None
    name: str | None
    for_types: bool


def modules() -> dict[str, str]:
    """Source of every module by its dotted name without ``ntkpipe.``; re-exports at the top are left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if len(parts) > 1 or parts[0] not in {"__init__", "__main__"}:
            found[".".join(parts)] = path.read_text()
    return found


@functools.cache
def imports(module: str, source: str) -> tuple[Import, ...]:
    """Every import of a module, wherever it stands; under ``if TYPE_CHECKING`` it is for types alone."""
    return tuple(_imports(module, source))


def _imports(module: str, source: str) -> Iterator[Import]:
    tree = ast.parse(source)
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(["ntkpipe", *module.split(".")[: -node.level]]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            own = top == "ntkpipe"
            yield Import(node.lineno, None if own else top, rest if own else None, id(node) in for_types)


def resolve(name: str, known: Iterable[str]) -> str | None:
    """Longest start of a dotted name that is a module: ``store.chunks.Store`` is in ``store.chunks``."""
    parts = name.split(".")
    starts = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((start for start in starts if start in known), None)


def file_arrows(sources: dict[str, str]) -> set[tuple[str, str]]:
    """(importer, imported) for all imports between modules of the package."""
    return {
        (module, target)
        for module, source in sources.items()
        for item in imports(module, source)
        if item.name and (target := resolve(item.name, sources)) not in {None, module}
    }


def folder_arrows(arrows: Iterable[tuple[str, str]], folder: str = "") -> set[tuple[str, str]]:
    """(importer, imported) between the entries of a folder, its files and subfolders; of the package without one."""
    start = f"{folder}." if folder else ""
    inside = [
        tuple(module.removeprefix(start).split(".")[0] for module in arrow)
        for arrow in arrows
        if all(module.startswith(start) for module in arrow)
    ]
    return {(a, b) for a, b in inside if a != b}


def folders(sources: Iterable[str]) -> set[str]:
    """Every folder of the package, the package itself by the empty name."""
    parts = [module.split(".") for module in sources]
    return {".".join(names[:length]) for names in parts for length in range(len(names))}


def floors(arrows: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Floor of each entry: one above the highest that it imports.

    Raises
    ------
    graphlib.CycleError
        If entries import each other in a circle.
    """
    below: dict[str, set[str]] = {}
    for importer, imported in arrows:
        below.setdefault(importer, set()).add(imported)
        below.setdefault(imported, set())
    found: dict[str, int] = {}
    for entry in TopologicalSorter(below).static_order():
        found[entry] = 1 + max((found[other] for other in below[entry]), default=-1)
    return found


def circle(arrows: Iterable[tuple[str, str]]) -> list[str]:
    """Entries that import each other in a circle, or none."""
    try:
        floors(arrows)
    except CycleError as error:
        return error.args[1]
    return []


def main() -> None:
    """Print folders by floor, and the counts."""
    sources = modules()
    arrows = folder_arrows(file_arrows(sources))
    by_floor = floors(arrows)
    for floor in sorted(set(by_floor.values()), reverse=True):
        print(f"floor {floor}: {'  '.join(sorted(name for name, on in by_floor.items() if on == floor))}")
    data = [path for path in PACKAGE.rglob("*") if path.suffix in {".py", ".md", ".html", ".css"}]
    lines = sum(path.read_text().count("\n") for path in data)
    print(f"{len(by_floor)} folders, {max(by_floor.values()) + 1} floors, {len(arrows)} arrows")
    print(f"{len(sources)} modules; {lines} lines with package data")


if __name__ == "__main__":
    main()
