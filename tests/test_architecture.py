"""Imports go down, wings meet in no room below the application, and heavy libraries use their doors."""

import pytest
from house import circle, file_arrows, floors, folder_arrows, folders, imports, modules, resolve

import ntkpipe

# Folders from the ground up. A folder imports itself and the layers below it.
LAYERS = (
    "base",
    "store executors",
    "jacobian operators infinite",
    "build solvers parametrised",
    "learning",
    "analysis",
    "steps",
    "report",
    "app",
)
# These work on stored kernels alone, those make kernels, and only `app` knows both.
NUMPY_WING = {"operators", "solvers", "learning", "analysis", "steps", "report"}
TORCH_WING = {"jacobian", "build", "parametrised"}
# Library → the only folders or modules that may import it.
DOORS = {
    "zarr": {"store.documents"},
    "google_crc32c": {"store.chunks", "build.scratch"},
    "dask": {"store.views.to_dask", "executors.connect", "executors.preflight"},
    "xarray": {"store.views.to_xarray"},
    "sklearn": {"learning.regression.sklearn_gp", "learning.regression.estimator"},
    "distributed": {"executors", "operators.on_dask", "app.submission"},
    "dask_cuda": {"executors.connect"},
    "cloudpickle": {"executors.payload", "executors.pickling"},
    "obstore": {"store.media.objects"},
    "torch": {"jacobian", "build", "parametrised", "executors.pickling", "app.workflow"},
    "safetensors": {"jacobian.model.checkpoints"},
    "pydantic": {"base.arguments", "base.config", "store.manifest", "solvers.result"},
    "yaml": {"base.config"},
    "psutil": {"base.resources"},
    "threadpoolctl": {"base.blas"},
    "scipy": {"base.operator", "solvers", "learning", "analysis"},
    "jinja2": {"report"},
    "markupsafe": {"report"},
    "matplotlib": {"report"},
    "click": {"app"},
    "rich": {"app.cli", "base.tables", "base.progress"},
}
FLOOR = {folder: floor for floor, layer in enumerate(LAYERS) for folder in layer.split()}
SOURCES = modules()
ARROWS = file_arrows(SOURCES)


def inside(module: str, place: str) -> bool:
    """Whether a module is a place or in it."""
    return module == place or module.startswith(f"{place}.")


def violations(module: str, source: str) -> list[str]:
    """What a module may not import, as sentences."""
    room = module.partition(".")[0]
    found = []
    for item in imports(module, source):
        where = f"{module}:{item.line}"
        if item.library in DOORS and not item.for_types:
            if not any(inside(module, door) for door in DOORS[item.library]):
                found.append(f"{where}: {item.library} enters only through {sorted(DOORS[item.library])}")
        elif item.name is not None:
            other = item.name.partition(".")[0]
            if resolve(item.name, SOURCES) is None:
                found.append(f"{where}: ntkpipe.{item.name} is in no module")
            elif other != room and FLOOR[other] >= FLOOR[room]:
                found.append(f"{where}: {room} may not import {other}, which is not below it")
            elif {room, other} & NUMPY_WING and {room, other} & TORCH_WING:
                found.append(f"{where}: {room} and {other} are of two wings")
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down_and_heavy_libraries_use_their_doors(module):
    assert violations(module, SOURCES[module]) == []


def test_the_layers_are_the_folders():
    assert {module.partition(".")[0] for module in SOURCES} == set(FLOOR)
    assert set(FLOOR) > NUMPY_WING | TORCH_WING


def test_files_import_each_other_in_no_circle():
    assert circle(ARROWS) == []


@pytest.mark.parametrize("folder", sorted(folders(SOURCES)))
def test_the_entries_of_a_folder_import_each_other_in_no_circle(folder):
    assert circle(folder_arrows(ARROWS, folder)) == []


def test_the_house_is_small():
    arrows = folder_arrows(ARROWS)
    assert len(FLOOR) <= 14
    assert max(floors(arrows).values()) < 10
    assert len(arrows) <= 59


@pytest.mark.parametrize("library", DOORS)
def test_every_door_is_used(library):
    """A door that nothing passes should be closed."""
    for door in DOORS[library]:
        found = (item for module in SOURCES if inside(module, door) for item in imports(module, SOURCES[module]))
        assert any(item.library == library for item in found), door


@pytest.mark.parametrize("name", ntkpipe.__all__)
def test_every_public_name_is_documented(name):
    assert getattr(ntkpipe, name).__doc__


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("base.grid", "import zarr", "zarr enters only"),
        ("store.kernel", "def f():\n    import torch.nn", "torch enters only"),
        ("store.kernel", "from dask.array import Array", "dask enters only"),
        ("store.kernel", "if TYPE_CHECKING:\n    pass\nelse:\n    import dask", "dask enters only"),
        ("base.grid", "from ntkpipe.store.chunks import Store", "base may not import store"),
        ("base.grid", "from ntkpipe.store import chunks", "base may not import store"),
        ("base.grid", "import ntkpipe.store.chunks", "base may not import store"),
        ("base.grid", "from ..store.chunks import Store", "base may not import store"),
        ("store.kernel", "from ntkpipe.executors import threads", "store may not import executors"),
        ("jacobian.engine", "from ..build.compute import compute_kernel", "jacobian may not import build"),
        ("learning.steps", "from ntkpipe.build.plan import Plan", "learning and build are of two wings"),
        ("analysis.summary", "def f():\n    from ntkpipe.jacobian import engine", "are of two wings"),
        ("app.cli", "from ntkpipe import open_kernel", "open_kernel is in no module"),
    ],
)
def test_the_rules_see_what_they_forbid(module, source, words):
    assert [words in violation for violation in violations(module, source)] == [True]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("store.kernel", "if TYPE_CHECKING:\n    import dask.array"),
        ("store.kernel", "def f():\n    from ntkpipe.store.views import to_dask"),
        ("jacobian.engine", "import torch\nfrom ntkpipe.jacobian.tracing.rules.table import RULES"),
        ("app.workflow", "from ntkpipe.build import compute\nfrom ntkpipe.analysis import summary"),
    ],
)
def test_the_rules_let_through_what_they_allow(module, source):
    assert violations(module, source) == []


def test_the_rules_see_circles():
    arrows = {("a.x", "b.x"), ("b.y", "a.y"), ("a.x", "a.y")}
    assert circle(arrows) == []
    assert set(circle(folder_arrows(arrows))) == {"a", "b"}
