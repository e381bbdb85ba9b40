"""Objects by import string, from installed packages or the folder of a workflow file."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ntkpipe.base.errors import ConfigError, nearest
from ntkpipe.base.paths import said


def import_object(name: str, folder: Path | None = None) -> Any:
    """Import ``package.module:attribute``."""
    module_name, _, attribute = name.partition(":")
    search = contextlib.nullcontext() if folder is None else folder_first(folder, module_name.partition(".")[0])
    try:
        with search:
            found: Any = importlib.import_module(module_name)
    except Exception as error:
        where = f" (searched {folder} first)" if folder is not None else ""
        raise ConfigError(f"cannot import {module_name!r} of {name!r}{where}: {error!r}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            hint = nearest(part, dir(found))
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
        raise ConfigError(f"the factory {factory}({shown}) raised {type(error).__name__}: {said(error)}") from error


@contextlib.contextmanager
def folder_first(folder: Path, top: str | None = None) -> Iterator[None]:
    """Search ``folder`` first, and forget modules of the same names from the folders of other workflows."""
    folder = folder.resolve()
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    for local in packages | {path.stem for path in folder.glob("*.py")}:
        known = sys.modules.get(local)
        is_wanted = local == top if top is not None else local not in sys.stdlib_module_names
        if known is not None and not _is_below(known, folder) and (is_wanted or _is_of_another_folder(known)):
            for loaded in [key for key in sys.modules if key == local or key.startswith(f"{local}.")]:
                del sys.modules[loaded]
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        yield
    finally:
        sys.path.remove(str(folder))


def forget_folder(folder: Path) -> None:
    """Forget the modules of a folder, so that later imports of their names search again; objects live on."""
    folder = folder.resolve()
    for name in [name for name, module in sys.modules.items() if _is_below(module, folder)]:
        del sys.modules[name]


def _is_of_another_folder(module: ModuleType) -> bool:
    """Whether a top-level module comes from a folder that is no longer on ``sys.path``: an earlier workflow's."""
    file = getattr(module, "__file__", None)
    if file is None or module.__name__ == "__main__":
        return False
    home = Path(file).resolve().parent
    home = home.parent if hasattr(module, "__path__") else home
    return home not in {Path(entry).resolve() for entry in sys.path}


def _is_below(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and folder in Path(file).resolve().parents
