"""What is public says what it takes: every parameter has its words, in numpy's sections."""

import ast
import doctest
import inspect
import re
import textwrap
from typing import Any

import numpy as np
import pytest

import ntkpipe

SECTIONS = [
    "Parameters",
    "Attributes",
    "Returns",
    "Yields",
    "Raises",
    "Warns",
    "See Also",
    "Notes",
    "References",
    "Examples",
]


def sections(text: str) -> dict[str, str]:
    """Bodies of the sections of a docstring by their names, in order."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}\n", inspect.cleandoc(text), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def named(body: str) -> set[str]:
    """Parameters that a section describes; one line may name several, with or without their types."""
    lines = (line.partition(" : ")[0] for line in body.splitlines() if line and not line.startswith(" "))
    return {name.strip("* ") for line in lines for name in line.split(",")}


def parameters(thing: Any) -> list[str]:
    return [name for name in inspect.signature(thing).parameters if name not in {"self", "cls"}]


def callables() -> dict[str, Any]:
    """Public functions, and public methods of classes that people make or get, by dotted names."""
    found: dict[str, Any] = {}
    for name in ntkpipe.__all__:
        thing = getattr(ntkpipe, name)
        if inspect.ismodule(thing):
            continue
        found[name] = thing
        if inspect.isclass(thing):
            methods = inspect.getmembers(thing, inspect.isfunction)
            own = {n: m for n, m in methods if not n.startswith("_") and m.__module__.startswith("ntkpipe")}
            found |= {f"{name}.{method}": function for method, function in own.items()}
    return found


CALLABLES = callables()
FUNCTIONS = [name for name, thing in CALLABLES.items() if not inspect.isclass(thing) and "." not in name]


@pytest.mark.parametrize("name", CALLABLES)
def test_it_begins_with_one_line_and_has_sections_in_order(name: str) -> None:
    text = inspect.getdoc(CALLABLES[name])
    assert text is not None
    first, _, rest = text.partition("\n")
    assert first.endswith(".")
    assert not rest or rest.startswith("\n")
    found = list(sections(text))
    assert found == sorted(found, key=SECTIONS.index)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_of_a_function_has_words(name: str) -> None:
    function = CALLABLES[name]
    text = inspect.getdoc(function) or ""
    described, wanted = named(sections(text).get("Parameters", "")), parameters(function)
    if not described and (other := re.search(r":func:`(\w+)` would do with the same arguments", text)):
        assert set(wanted) <= set(parameters(getattr(ntkpipe, other[1])))
        return
    if len(wanted) == 1 and not described:
        return  # its summary says it
    assert set(wanted) == described


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_error_that_a_function_raises_itself_is_listed(name: str) -> None:
    function = inspect.unwrap(CALLABLES[name])
    raised = {
        ast.unparse(node.exc.func)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    }
    assert raised <= named(sections(inspect.getdoc(CALLABLES[name]) or "").get("Raises", ""))


def test_examples_run() -> None:
    names = {"np": np, "ntkpipe": ntkpipe, **{name: getattr(ntkpipe, name) for name in ntkpipe.__all__}}
    tests = [test for name in ntkpipe.__all__ for test in doctest.DocTestFinder().find(names[name], name, globs=names)]
    assert sum(len(test.examples) for test in tests) > 0
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert [test.name for test in tests if runner.run(test).failed] == []
