"""Imports only look down, the wings meet nowhere below the public functions, heavy libraries use their doors."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import ntkpipe

PACKAGE = Path(ntkpipe.__file__).parent

# Module → (floor, wing). A module imports strictly lower floors, of its own wing or shared; "joins" may import both.
HOUSE = {
    "errors": (0, "shared"),
    "resources": (1, "shared"),
    "kinds": (1, "shared"),
    "grid": (1, "shared"),
    "config": (1, "shared"),
    "imports": (1, "shared"),
    "extras": (1, "shared"),
    "manifest": (2, "shared"),
    "planes": (2, "shared"),
    "medium": (2, "shared"),
    "documents": (2, "shared"),
    "objects": (3, "shared"),
    "execute": (2, "shared"),
    "cluster": (2, "shared"),
    "pickling": (2, "shared"),
    "parcel": (3, "shared"),
    "remote": (4, "shared"),
    "layout": (3, "shared"),
    "progress": (3, "shared"),
    "store": (4, "shared"),
    "views": (4, "shared"),
    "labelled": (4, "shared"),
    "kernel": (5, "shared"),
    "growth": (5, "shared"),
    "verification": (6, "shared"),
    "mending": (7, "shared"),
    "derive": (6, "use"),
    "export": (6, "shared"),
    "device": (2, "make"),
    "transfer": (1, "make"),
    "arithmetic": (1, "make"),
    "checkpoints": (4, "make"),
    "models": (4, "make"),
    "datasets": (5, "make"),
    "jacobian.rules.form": (4, "make"),
    "jacobian.rules.elementwise": (5, "make"),
    "jacobian.rules.lookup": (5, "make"),
    "jacobian.rules.normalization": (6, "make"),
    "jacobian.rules.linear": (6, "make"),
    "jacobian.rules.convolution": (6, "make"),
    "jacobian.rules.table": (7, "make"),
    "jacobian.recorder": (8, "make"),
    "jacobian.uses": (9, "make"),
    "jacobian.layouts": (10, "make"),
    "jacobian.trace": (11, "make"),
    "jacobian.workspace": (4, "make"),
    "jacobian.factors": (4, "make"),
    "jacobian.contract": (5, "make"),
    "jacobian.terms": (12, "make"),
    "jacobian.fill": (13, "make"),
    "jacobian.cost": (4, "make"),
    "jacobian.fallback": (5, "make"),
    "jacobian.block": (14, "make"),
    "jacobian.products": (6, "make"),
    "jacobian.report": (15, "make"),
    "jacobian.probe": (15, "make"),
    "jacobian.check": (16, "make"),
    "gram": (15, "make"),
    "plan": (5, "make"),
    "records": (6, "make"),
    "estimate": (6, "make"),
    "build": (16, "make"),
    "certify": (17, "make"),
    "prepare": (16, "make"),
    "preflight": (17, "make"),
    "runs": (17, "make"),
    "matrix": (18, "make"),
    "implicit": (18, "make"),
    "enlarge": (18, "make"),
    "recompute": (18, "make"),
    "precomputed": (6, "use"),
    "targets": (5, "use"),
    "analysis.summary": (15, "use"),
    "analysis.eigenlearning": (6, "use"),
    "analysis.powerlaw": (6, "use"),
    "analysis.opening": (12, "use"),
    "analysis.spectralsums": (13, "use"),
    "analysis.eigensystem": (13, "use"),
    "analysis.alignment": (14, "use"),
    "analysis.spectrum": (14, "use"),
    "analysis.resolvent": (16, "use"),
    "analysis.generalisation": (18, "use"),
    "analysis.trust": (17, "use"),
    "analysis.learning_curve": (14, "use"),
    "analysis.generalisation_result": (8, "use"),
    "analysis.spectrum_result": (8, "use"),
    "solvers.determinant": (16, "use"),
    "ridges": (2, "shared"),
    "kept": (16, "use"),
    "solving": (17, "use"),
    "keptpairs": (17, "use"),
    "analysing": (19, "use"),
    "printing": (1, "shared"),
    "saving": (5, "shared"),
    "operators.operator": (5, "shared"),
    "operators.blas": (5, "use"),
    "operators.dense": (7, "use"),
    "operators.tiles": (6, "use"),
    "operators.tiled": (7, "use"),
    "operators.reading": (7, "use"),
    "operators.shards": (7, "use"),
    "operators.holding": (8, "use"),
    "operators.crew": (9, "use"),
    "operators.workers": (10, "use"),
    "operators.streaming": (9, "use"),
    "operators.opening": (11, "use"),
    "solvers.result": (7, "use"),
    "solvers.blocks": (8, "use"),
    "solvers.krylov": (8, "use"),
    "solvers.quadrature": (8, "use"),
    "solvers.resuming": (9, "use"),
    "solvers.thickrestart": (11, "use"),
    "solvers.lanczos": (12, "use"),
    "solvers.dense": (12, "use"),
    "solvers.davidson": (11, "use"),
    "solvers.smallest": (13, "use"),
    "solvers.flow": (9, "use"),
    "solvers.density": (12, "use"),
    "solvers.dynamics": (12, "use"),
    "solvers.logdet": (14, "use"),
    "solvers.functions": (15, "use"),
    "solvers.preconditioner": (12, "use"),
    "solvers.replacement": (11, "use"),
    "solvers.cg": (13, "use"),
    "solvers.choosing": (11, "use"),
    "solvers.solution": (11, "use"),
    "solvers.pool": (8, "use"),
    "solvers.triangular": (9, "use"),
    "solvers.panels": (8, "use"),
    "solvers.factor_folder": (9, "use"),
    "solvers.factor": (10, "use"),
    "solvers.fitting": (10, "use"),
    "solvers.cholesky": (12, "use"),
    "solvers.keeping": (13, "use"),
    "solvers.systems": (14, "use"),
    "solvers.solve": (15, "use"),
    "analysis.labels": (6, "use"),
    "analysis.cross": (6, "use"),
    "analysis.sources": (7, "use"),
    "analysis.minimum_norm": (13, "use"),
    "analysis.influence": (8, "use"),
    "analysis.columns": (8, "use"),
    "analysis.posterior": (8, "use"),
    "analysis.calibration": (9, "use"),
    "analysis.gaussian": (17, "use"),
    "analysis.streamed": (16, "use"),
    "analysis.leave_one_out": (11, "use"),
    "analysis.path_result": (8, "use"),
    "analysis.path_points": (14, "use"),
    "analysis.ridge_path": (17, "use"),
    "analysis.estimator": (17, "use"),
    "report.parts": (6, "use"),
    "report.look": (5, "use"),
    "report.blocks": (6, "use"),
    "report.images": (6, "use"),
    "report.findings": (8, "use"),
    "report.records": (7, "use"),
    "report.posterior": (18, "use"),
    "report.choosing": (9, "use"),
    "report.gather": (19, "use"),
    "report.analyses": (20, "use"),
    "report.figures.axes": (6, "use"),
    "report.figures.kernel": (7, "use"),
    "report.figures.regression": (7, "use"),
    "report.figures.spectrum": (7, "use"),
    "report.figures.timings": (7, "use"),
    "report.sections.words": (9, "use"),
    "report.sections.influence": (10, "use"),
    "report.sections.kernel": (10, "use"),
    "report.sections.alignment": (10, "use"),
    "report.sections.gaussian": (10, "use"),
    "report.sections.generalisation": (10, "use"),
    "report.sections.regression": (10, "use"),
    "report.sections.spectrum": (10, "use"),
    "report.sections.timings": (10, "use"),
    "report.compose": (20, "use"),
    "report.page": (7, "use"),
    "report.report": (21, "use"),
    "analysis.instep": (12, "use"),
    "analysis.differences": (13, "use"),
    "analysis.sides": (13, "use"),
    "analysis.ends": (14, "use"),
    "analysis.eigenspaces": (15, "use"),
    "analysis.ratios": (15, "use"),
    "analysis.predictions": (16, "use"),
    "analysis.comparison": (8, "use"),
    "analysis.compare": (17, "use"),
    "comparing": (18, "use"),
    "regressing": (18, "use"),
    "testing": (12, "use"),
    "team": (18, "make"),
    "api": (19, "joins"),
    "upkeep": (19, "joins"),
    "workflow": (22, "joins"),
    "watch": (6, "shared"),
    "submission": (23, "joins"),
    "cli_solvers": (22, "use"),
    "cli_analyses": (22, "use"),
    "cli": (24, "joins"),
}
# Library → the modules that may import it; "jacobian" stands for all modules of that folder.
DOORS = {
    "zarr": {"documents"},
    "google_crc32c": {"store"},
    "dask": {"views", "cluster"},
    "xarray": {"labelled"},
    "sklearn": {"precomputed", "analysis.estimator"},
    "distributed": {"cluster", "parcel", "remote", "preflight", "submission", "operators.crew", "operators.holding"},
    "dask_cuda": {"cluster"},
    "cloudpickle": {"parcel", "pickling"},
    "obstore": {"objects"},
    "torch": {
        "arithmetic",
        "pickling",
        "device",
        "transfer",
        "checkpoints",
        "models",
        "datasets",
        "jacobian",
        "gram",
        "build",
        "certify",
        "prepare",
        "preflight",
        "runs",
        "matrix",
        "implicit",
        "api",
        "upkeep",
        "workflow",
    },
    "safetensors": {"checkpoints"},
    "pydantic": {"config", "manifest"},
    "yaml": {"config"},
    "psutil": {"resources"},
    "threadpoolctl": {"operators"},
    "scipy": {"analysis.calibration", "operators", "solvers", "testing", "analysis.eigenspaces"},
    "jinja2": {"report"},
    "markupsafe": {"report"},
    "matplotlib": {"report"},
    "click": {"cli", "cli_analyses", "cli_solvers"},
    "rich": {"cli", "printing", "progress"},
}
# Re-exports of the package, and `python -m ntkpipe`.
EXEMPT = {"__init__", "__main__"}


@dataclass(frozen=True)
class Import:
    """One import of one module: of a library (its top name) or of a module of this package."""

    line: int
    library: str | None
    module: str | None
    for_types: bool


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def modules() -> dict[str, str]:
    """Source of every module by name, without packages' ``__init__`` that hold no code."""
    found = {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    return {
        name: source
        for name, source in found.items()
        if name not in EXEMPT and not (name.endswith(".__init__") and has_no_code(source))
    }


def has_no_code(source: str) -> bool:
    body = ast.parse(source).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def imports(module: str, source: str) -> Iterator[Import]:
    """Every import of a module, those inside functions included."""
    tree = ast.parse(source)
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
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


def resolve(name: str) -> str | None:
    """Longest start of a dotted name that is a module of the house: ``store.Store`` is in ``store``."""
    parts = name.split(".")
    starts = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((start for start in starts if start in HOUSE), None)


def violations(module: str, source: str) -> list[str]:
    """What a module may not do, as sentences."""
    if module not in HOUSE:
        return [f"{module} is not listed in HOUSE"]
    floor, wing = HOUSE[module]
    found = []
    for item in imports(module, source):
        if item.library is not None:
            doors = DOORS.get(item.library)
            is_door = doors is None or module in doors or module.partition(".")[0] in doors
            if not is_door and not item.for_types:
                found.append(f"{module}:{item.line}: {item.library} enters only through {sorted(doors)}")
            continue
        if item.module == "__version__":
            continue
        target = resolve(item.module)
        if target is None:
            found.append(f"{module}:{item.line}: ntkpipe.{item.module} is in no module of HOUSE")
            continue
        below, other = HOUSE[target]
        if below >= floor:
            found.append(f"{module}:{item.line}: floor {floor} may not import {target} on floor {below}")
        elif other not in {"shared", wing} and wing != "joins":
            found.append(f"{module}:{item.line}: wing {wing!r} may not import {target} of wing {other!r}")
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_look_down_and_heavy_libraries_use_their_doors(module):
    assert violations(module, modules()[module]) == []


@pytest.mark.parametrize("module", HOUSE)
def test_every_module_of_the_house_exists(module):
    assert PACKAGE.joinpath(*module.split(".")).with_suffix(".py").is_file()


@pytest.mark.parametrize("library", DOORS)
def test_every_door_is_used(library):
    """A door that nothing passes should be closed."""
    sources = modules()
    for door in DOORS[library]:
        inside = [name for name in sources if name == door or name.partition(".")[0] == door]
        assert any(item.library == library for name in inside for item in imports(name, sources[name])), door


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("grid", "import zarr", "zarr enters only"),
        ("kernel", "def f():\n    import torch.nn", "torch enters only"),
        ("kernel", "from dask.array import Array", "dask enters only"),
        ("kernel", "if TYPE_CHECKING:\n    pass\nelse:\n    import dask", "dask enters only"),
        ("grid", "from ntkpipe.store import Store", "floor 1 may not import store on floor 4"),
        ("grid", "from ntkpipe import store", "floor 1 may not import store"),
        ("grid", "import ntkpipe.store", "floor 1 may not import store"),
        ("grid", "from .store import Store", "floor 1 may not import store"),
        ("grid", "from ntkpipe.kinds import Kind", "floor 1 may not import kinds on floor 1"),
        ("jacobian.rules.form", "from .. import trace", "may not import jacobian.trace"),
        ("jacobian.block", "from ..api import compute", "may not import api"),
        ("build", "from ntkpipe.analysis.summary import summarise", "wing 'make' may not import analysis.summary"),
        ("analysis.summary", "def f():\n    from ntkpipe import models", "wing 'use' may not import models"),
        ("cli", "from ntkpipe import open_kernel", "open_kernel is in no module"),
        ("surprise", "", "not listed in HOUSE"),
    ],
)
def test_the_rules_see_what_they_forbid(module, source, words):
    assert [words in violation for violation in violations(module, source)] == [True]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernel", "if TYPE_CHECKING:\n    import dask.array"),
        ("kernel", "def f():\n    from ntkpipe import views"),
        ("jacobian.trace", "import torch\nfrom ntkpipe.jacobian.rules.table import RULES"),
        ("api", "from ntkpipe import build, kernel\nfrom ntkpipe.analysis import summary"),
    ],
)
def test_the_rules_let_through_what_they_allow(module, source):
    assert violations(module, source) == []
