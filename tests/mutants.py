"""Does the suite find faults? Seeded mutants of syntax trees, equally many in each folder, and what kills them.

    pytest -n 4 --cov=ntkpipe --cov-context=test --cov-report=     # once: which test runs which line, in .coverage
    python tests/mutants.py --number 60 --seed 0                   # prints one line a mutant, survivors last

Each mutant is written into a copy of the working tree, and the tests that run its line are run until one fails. A line
that no test runs in the process of the tests is left to the tests of its folder. ``--tests`` takes the tests of another
checkout, so that two suites can be held against the same mutants; ``--only`` repeats some by their numbers.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coverage.numbits import numbits_to_nums

ROOT = Path(__file__).parents[1]
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.USub: ast.UAdd,
}


@dataclass(frozen=True)
class Mutant:
    """One changed place: a module's path below the package, the place's number among its candidates, its line."""

    path: Path
    place: int
    line: int
    before: str
    after: str


def candidates(tree: ast.Module) -> list[ast.AST]:
    """Nodes that can be changed: operators, numbers, truth values, negations. Annotations and texts are left alone."""
    skipped = {
        id(node)
        for parent in ast.walk(tree)
        for part in (getattr(parent, "annotation", None), getattr(parent, "returns", None))
        if part is not None
        for node in ast.walk(part)
    }
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        number = isinstance(node, ast.Constant) and isinstance(node.value, int | float)
        operator = isinstance(node, ast.Compare | ast.BinOp | ast.BoolOp | ast.UnaryOp)
        if number or (operator and (isinstance(node, ast.UnaryOp) or type(operator_of(node)) in SWAPS)):
            found.append(node)
    return found


def operator_of(node: ast.AST) -> ast.AST:
    """The operator of an expression; the first of a chain of comparisons."""
    return node.ops[0] if isinstance(node, ast.Compare) else node.op  # type: ignore[attr-defined]


def changed(tree: ast.Module, place: int) -> tuple[ast.Module, ast.AST, ast.AST]:
    """A copy of a tree with one candidate changed; the node before and after."""
    mutant = copy.deepcopy(tree)
    node = candidates(mutant)[place]
    before = copy.deepcopy(node)
    if isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        node.operand = ast.UnaryOp(ast.Not(), node.operand)
    elif isinstance(node, ast.Compare):
        node.ops[0] = SWAPS[type(node.ops[0])]()  # type: ignore[call-overload]
    else:
        node.op = SWAPS.get(type(node.op), ast.USub)()  # type: ignore[attr-defined]
    return ast.fix_missing_locations(mutant), before, node


def draw(number: int, seed: int) -> Iterator[Mutant]:
    """Mutants, equally many in each folder of the package but for the remainder."""
    generator = random.Random(seed)
    folders = sorted(path for path in (ROOT / "ntkpipe").iterdir() if (path / "__init__.py").exists())
    for index in range(number):
        folder = folders[index % len(folders)]
        trees = {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}
        counts = [len(candidates(tree)) for tree in trees.values()]
        path = generator.choices(list(trees), counts)[0]
        place = generator.randrange(len(candidates(trees[path])))
        _, before, after = changed(trees[path], place)
        line = before.lineno  # type: ignore[attr-defined]
        yield Mutant(path.relative_to(ROOT), place, line, ast.unparse(before), ast.unparse(after))


def tests_of(mutant: Mutant, coverage: Path) -> list[str]:
    """Tests that run the line of a mutant; those of its folder if there is none."""
    query = (
        "SELECT context.context, numbits FROM line_bits JOIN context ON context.id = context_id "
        "JOIN file ON file.id = file_id WHERE file.path LIKE ?"
    )
    found = set()
    with sqlite3.connect(coverage) as database:
        for context, bits in database.execute(query, (f"%/{mutant.path}",)):
            if context and mutant.line in numbits_to_nums(bits):
                found.add(context.partition("|")[0])
    return sorted(found) or ["tests/" + mutant.path.parts[1]]


def is_killed(mutant: Mutant, copied: Path, tests: list[str]) -> bool:
    """Whether a test fails. Tests that this suite does not have are passed over."""
    target, original = copied / mutant.path, (ROOT / mutant.path).read_text()
    target.write_text(ast.unparse(changed(ast.parse(original), mutant.place)[0]))
    try:
        chosen = [name for name in tests if (copied / name.partition("::")[0]).exists()]
        for start in range(0, len(chosen), 400):
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout=120"]
            workers = ["-n", "2", "--maxfail=1"] if len(chosen) > 20 else []
            environment = {"PYTHONPATH": str(copied), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, *workers, *chosen[start : start + 400]],
                cwd=copied,
                env={**os.environ, **environment},
                capture_output=True,
                check=False,
            )
            if done.returncode not in {0, 5}:
                return True
        return False
    finally:
        target.write_text(original)


def main() -> None:
    """Draw, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", type=Path, default=ROOT / "tests")
    parser.add_argument("--coverage", type=Path, default=ROOT / ".coverage")
    parser.add_argument("--only", type=int, nargs="*")
    options = parser.parse_args()
    if not options.coverage.exists():
        parser.error(f"{options.coverage} is not there; run the suite with --cov-context=test first, as above")
    tried, survivors = 0, []
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / "copy"
        ignore = shutil.ignore_patterns(".venv", ".git", "__pycache__", "runs", "tests", ".*_cache")
        shutil.copytree(ROOT, copied, ignore=ignore)
        shutil.copytree(options.tests, copied / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for number, mutant in enumerate(draw(options.number, options.seed)):
            if options.only is None or number in options.only:
                tests = tests_of(mutant, options.coverage)
                killed = is_killed(mutant, copied, tests)
                words = f"{number:3} {mutant.path}:{mutant.line}  {mutant.before}  →  {mutant.after}"
                print(f"{'killed  ' if killed else 'SURVIVES'} {words}  ({len(tests)} tests)", flush=True)
                tried += 1
                survivors += [] if killed else [words]
    print("\n".join([f"{len(survivors)} of {tried} survive", *survivors]))


if __name__ == "__main__":
    main()
