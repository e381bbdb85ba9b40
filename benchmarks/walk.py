"""How a model and a mode walk through the package: into how many files, and how often back into one that was left.

python benchmarks/walk.py [--sequence]

Runs on any version: ``PYTHONPATH=<checkout> python benchmarks/walk.py``. A call counts if one of its arguments is the
model (a module, or the package's functional copy of one) or the very text that was given as ``mode``, or holds it one
level down: as an attribute, an element, the self of a bound method, or an argument of a partial.
"""

import argparse
import contextlib
import functools
import importlib
import inspect
import io
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from torch import nn

import ntkpipe

_ROOT = Path(ntkpipe.__file__).parent
_ELEMENTS = 64  # elements of a sequence or mapping that are looked at
_FACTORIES = """
import torch

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))

def data():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (24,), generator=generator)
    return {"inputs": torch.randn(24, 8, generator=generator), "targets": targets}
"""


def _first_of(*names: str) -> Any:
    """The first of several ``module:attribute`` that is there; versions differ in where things are."""
    for name in names:
        module, _, attribute = name.partition(":")
        with contextlib.suppress(ModuleNotFoundError):
            return getattr(importlib.import_module(module), attribute)
    raise ModuleNotFoundError(names[0])


_MODELS = nn.Module, _first_of("ntkpipe.jacobian.model.functional:FunctionalModel", "ntkpipe.models:FunctionalModel")


class Walk:
    """A profiler that notes the file of every call of the package that is given the model or the mode."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.calls: list[tuple[str, str]] = []  # file and function
        self._lock = threading.Lock()

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(f"{_ROOT}/"):
            return
        count = code.co_argcount + code.co_kwonlyargcount
        count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
        values = frame.f_locals
        if any(self._holds(values[name]) for name in code.co_varnames[:count] if name in values):
            with self._lock:
                self.calls.append((str(Path(code.co_filename).relative_to(_ROOT)), code.co_name))

    def _holds(self, value: Any) -> bool:
        return self._is(value) or any(map(self._is, _held(value)))

    def _is(self, value: Any) -> bool:
        return value is self.mode or isinstance(value, _MODELS)

    def files(self) -> list[str]:
        """Files in the order in which they were entered, without repeats in a row."""
        files = [file for file, _ in self.calls]
        return [file for number, file in enumerate(files) if number == 0 or files[number - 1] != file]

    def counts(self) -> tuple[int, int, int]:
        """Files, entries into files, and entries into a file that was left before."""
        entered = self.files()
        return len(set(entered)), len(entered), len(entered) - len(set(entered))

    def sequence(self) -> Iterator[str]:
        """One line for each entry: the file, and the functions that were called there."""
        last, names = "", list[str]()
        for file, name in [*self.calls, ("", "")]:
            if file != last and last:
                yield f"{last}: {', '.join(names)}"
                names = []
            last = file
            names.append(name)


def _held(value: Any) -> Iterator[Any]:
    """What a value holds one level down."""
    if isinstance(value, list | tuple | set | frozenset):
        yield from list(value)[:_ELEMENTS]
    elif isinstance(value, dict):
        yield from list(value.values())[:_ELEMENTS]
    elif inspect.ismethod(value):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    if type(value).__module__.partition(".")[0] == "ntkpipe":
        yield from list(getattr(value, "__dict__", {}).values())
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ())
            names = [slots] if isinstance(slots, str) else slots
            yield from (getattr(value, name) for name in names if name[:2] != "__" and hasattr(value, name))


def watched(run: Callable[[str], object]) -> Walk:
    """The walk of one run, which is given the mode."""
    mode = "".join(["w", "-"])  # a text of its own, which no constant of the package is
    walk = Walk(mode)
    with contextlib.suppress(ModuleNotFoundError):  # what one run learns of the model would spare the next a part
        importlib.import_module("ntkpipe.jacobian.learnt").forget()
    with contextlib.redirect_stderr(io.StringIO()):
        threading.setprofile(walk)
        sys.setprofile(walk)
        try:
            run(mode)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
    return walk


def compute(folder: Path, mode: str) -> None:
    """A kernel of a small network into a new store."""
    namespace: dict[str, Any] = {}
    exec(_FACTORIES, namespace)
    inputs = namespace["data"]()["inputs"]
    ntkpipe.compute_kernel(namespace["net"](), inputs, store=folder / "compute.zarr", mode=mode, workers=1)  # type: ignore[arg-type]


def run_workflow(folder: Path, mode: str) -> None:
    """A workflow of the same network: kernel, verification with a certificate, summary."""
    load = _first_of("ntkpipe.app.workflow:load", "ntkpipe.workflow:load")
    run = _first_of("ntkpipe.app.workflow:run", "ntkpipe.workflow:run")
    (folder / "walk_factories.py").write_text(_FACTORIES)
    raw = {
        "store": str(folder / "workflow.zarr"),
        "model": {"factory": "walk_factories:net"},
        "data": {"factory": "walk_factories:data"},
        "run": {"workers": 1},
        "steps": [{"step": "verify", "options": {"certify": True}}, {"step": "summary"}],
    }
    path = folder / "walk.yaml"
    path.write_text(yaml.safe_dump(raw))
    for result in run(load(path), mode=mode, progress=False):
        assert result.is_good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence", action="store_true", help="also print every entry")
    options = parser.parse_args()
    total = [0, 0]
    runs = {"compute_kernel": compute, "workflow.run": run_workflow}
    with tempfile.TemporaryDirectory() as folder:
        for name, run in runs.items():
            walk = watched(functools.partial(run, Path(folder)))
            if options.sequence:
                print("\n".join(walk.sequence()))
            files, entries, again = walk.counts()
            print(f"{name}: {files} files, {entries} entries, {again} into a file that was left before")
            total = [total[0] + entries, total[1] + again]
    print(f"both: {total[0]} entries, {total[1]} into a file that was left before")


if __name__ == "__main__":
    main()
