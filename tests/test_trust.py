"""What reads stores and checkpoints can run nothing: no pickle, no eval, no import by name is within its reach."""

import ast
from collections.abc import Iterator

import pytest
from house import imports, modules, resolve

SOURCES = modules()
# Where bytes of a store or a checkpoint come in.
READERS = (
    "store.media.medium",
    "store.media.opening",
    "store.media.folder",
    "store.media.objects",
    "store.documents",
    "store.manifest",
    "store.layout",
    "store.chunks",
    "store.store",
    "store.results",
    "store.kernel",
    "store.kernel_store",
    "store.views.to_dask",
    "store.views.to_xarray",
    "store.verification",
    "store.export",
    "jacobian.model.checkpoints",
    "jacobian.model.samples",
    "build.mend",
    "analysis.summary",
    "solvers.direct.panels",
)
# Names come from the user's workflow file; tasks go between a client and its own cluster.
TRUSTED = {
    "base.imports": {"importlib"},
    "steps.registry": {"importlib"},  # of functions that its own table names
    "executors.pickling": {"cloudpickle"},
    "executors.payload": {"cloudpickle", "pickle"},
    "executors.dask": {"pickle"},
}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
RUNNERS = {"eval", "exec", "compile", "__import__"}
# They look, and import nothing.
HARMLESS = {"importlib.metadata", "importlib.util"}
IMPORTERS = {"importlib", "runpy", "imp", "pkgutil", "code"}


def findings(source: str) -> Iterator[str]:
    """What could run something that was read, by the name of what does it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [module] if module else [alias.name for alias in node.names]
            yield from (
                top for name in names if (top := name.partition(".")[0]) in PICKLES | IMPORTERS and name not in HARMLESS
            )
        if isinstance(node, ast.Call):
            called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in RUNNERS:
                yield called
            if called == "torch.load" and keywords.get("weights_only") != "True":
                yield "torch.load without weights_only=True"
            if called in {"np.load", "numpy.load"} and keywords.get("allow_pickle") != "False":
                yield "np.load without allow_pickle=False"
            if called == "yaml.load" and not any(ast.unparse(argument) == "_Loader" for argument in node.args):
                yield "yaml.load without the safe loader"
            if called in {"yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.hub.load"}:
                yield called


def reached(start: str) -> set[str]:
    """Modules of the package that a module imports, itself among them, wherever the import is."""
    found, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            names = (item.name for item in imports(module, SOURCES[module]) if item.name)
            waiting += [target for name in names if (target := resolve(name, SOURCES)) is not None]
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_only_trusted_modules_run_what_they_are_given(module):
    assert set(findings(SOURCES[module])) <= TRUSTED.get(module, set())


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_reaches_a_module_that_does(reader):
    assert not reached(reader) & set(TRUSTED)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from cloudpickle import loads", "cloudpickle"),
        ("import importlib\nimportlib.import_module(x)", "importlib"),
        ("eval(x)", "eval"),
        ("__import__(x)", "__import__"),
        ("torch.load(x)", "torch.load without weights_only=True"),
        ("torch.load(x, weights_only=False)", "torch.load without weights_only=True"),
        ("np.load(x)", "np.load without allow_pickle=False"),
        ("yaml.load(x, yaml.Loader)", "yaml.load without the safe loader"),
    ],
)
def test_the_rules_see_what_they_forbid(source, words):
    assert list(findings(source)) == [words]


def test_the_rules_let_through_what_they_allow():
    allowed = "from importlib.metadata import version\ntorch.load(x, weights_only=True)\nre.compile(x)\nmodel.eval()"
    assert list(findings(allowed)) == []
