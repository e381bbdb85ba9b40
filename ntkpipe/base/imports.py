"""Objects by import string, from installed packages or from the folder of a workflow file."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from ntkpipe.base.errors import ConfigError


def import_object(name: str, folder: Path | None = None) -> Any:
    """Import ``package.module:attribute``."""
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = _import_module(module_name, folder)
    except Exception as error:
        where = f" (searched {folder} first)" if folder is not None else ""
        raise ConfigError(f"cannot import {module_name!r} of {name!r}{where}: {error!r}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"module {module_name!r} has no {part!r} (asked for as {name!r}){hint}")
        found = getattr(found, part)
    return found


def call_factory(factory: str, arguments: dict[str, Any], folder: Path | None = None) -> Any:
    """Import a factory and call it."""
    function = import_object(factory, folder)
    if not callable(function):
        raise ConfigError(f"{factory!r} is {type(function).__name__}; needed something that can be called")
    try:
        return function(**arguments)
    except Exception as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ConfigError(f"the factory {factory}({shown}) raised {type(error).__name__}: {error}") from error


def _import_module(name: str, folder: Path | None) -> ModuleType:
    if folder is None:
        return importlib.import_module(name)
    with folder_first(folder, name.partition(".")[0]):
        return importlib.import_module(name)


@contextlib.contextmanager
def folder_first(folder: Path, top: str | None = None) -> Iterator[None]:
    """Find modules in ``folder`` first, never those of the same names from other workflows' folders."""
    folder = folder.resolve()
    for local in {path.stem for path in folder.glob("*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }:
        known = sys.modules.get(local)
        is_wanted = local == top if top is not None else local not in sys.stdlib_module_names
        if known is not None and not _is_below(known, folder) and (is_wanted or _is_of_another_folder(known)):
            # Another workflow's module of the same name: forget it, so that this folder's is found.
            for loaded in [key for key in sys.modules if key == local or key.startswith(f"{local}.")]:
                del sys.modules[loaded]
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        yield
    finally:
        sys.path.remove(str(folder))


def forget_folder(folder: Path) -> None:
    """Forget the modules of a folder, so that a later import of one of these names finds another; objects live on."""
    folder = folder.resolve()
    for name in [name for name, module in sys.modules.items() if _is_below(module, folder)]:
        del sys.modules[name]


def _is_of_another_folder(module: ModuleType) -> bool:
    """Whether a top-level module was found in a folder that is on ``sys.path`` no longer: an earlier workflow's."""
    file = getattr(module, "__file__", None)
    if file is None or module.__name__ == "__main__":
        return False
    home = Path(file).resolve().parent
    home = home.parent if hasattr(module, "__path__") else home
    return home not in {Path(entry).resolve() for entry in sys.path}


def _is_below(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and folder in Path(file).resolve().parents
