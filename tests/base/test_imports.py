"""Import strings: packages, the workflow's folder, and what is said when they are wrong."""

import json
import math
import sys

import pytest

from ntkpipe.base.errors import ConfigError
from ntkpipe.base.imports import call_factory, import_object


@pytest.fixture(autouse=True)
def _forget_modules(monkeypatch):
    """Leave sys.modules and sys.path as they were."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_an_installed_object_is_found():
    assert import_object("math:pi") == math.pi
    assert import_object("os:path.join").__name__ == "join"


def test_a_module_of_the_folder_is_found_and_the_path_is_left_alone(tmp_path):
    (tmp_path / "study.py").write_text("width = 3")
    before = list(sys.path)
    assert import_object("study:width", tmp_path) == 3
    assert sys.path == before


def test_a_package_of_the_folder_is_found(tmp_path):
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "__init__.py").touch()
    (tmp_path / "studies" / "one.py").write_text("width = 4")
    assert import_object("studies.one:width", tmp_path) == 4


def test_two_folders_with_a_module_of_the_same_name_are_not_mixed_up(tmp_path):
    for width in (1, 2):
        (tmp_path / str(width)).mkdir()
        (tmp_path / str(width) / "study.py").write_text(f"width = {width}")
    found = [import_object("study:width", tmp_path / str(width)) for width in (1, 2, 1)]
    assert found == [1, 2, 1]


def test_helpers_of_two_folders_are_not_mixed_up_and_installed_modules_stay(tmp_path):
    for width in (1, 2):
        folder = tmp_path / str(width)
        folder.mkdir()
        (folder / f"study_{width}.py").write_text("from helpers import width")
        (folder / "helpers.py").write_text(f"width = {width}")
        (folder / "json.py").touch()
    found = [import_object(f"study_{width}:width", tmp_path / str(width)) for width in (1, 2)]
    assert found == [1, 2]
    assert sys.modules["json"] is json  # which the folders have too


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:x", r"cannot import 'no_such_module_here'.*searched .* first"),
        ("broken:x", r"cannot import 'broken'.*ZeroDivisionError"),
        ("math:sqr", r"'math' has no 'sqr'.*did you mean 'sqrt'"),
        ("math:", r"'math' has no ''"),
    ],
)
def test_a_wrong_import_string_is_named(tmp_path, name, message):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=message):
        import_object(name, tmp_path)


def test_a_factory_gets_its_arguments():
    assert call_factory("builtins:dict", {"a": 1}) == {"a": 1}


def test_a_factory_that_raises_is_named_with_its_arguments_and_cause(tmp_path):
    (tmp_path / "study.py").write_text("def make(width):\n    raise KeyError(width)")
    with pytest.raises(ConfigError, match=r"study:make\(width=3\) raised KeyError") as caught:
        call_factory("study:make", {"width": 3}, tmp_path)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_factory_must_be_callable():
    with pytest.raises(ConfigError, match="'math:pi' is float"):
        call_factory("math:pi", {})
