"""Options of steps: what a function takes that the store does not give, with their help from its docstring."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ntkpipe.base.arguments import Option, check_options, options_of, parameters_of, require_known
from ntkpipe.base.docstrings import entries, sections
from ntkpipe.base.errors import ArgumentError
from ntkpipe.steps.inputs import INPUTS, RESULTS
from ntkpipe.steps.registry import REGISTRY, Entry, entry_of


def inputs_of(entry: Entry) -> dict[str, str]:
    """Parameter → input, of those that the store gives."""
    named = {name: entry.inputs.get(name, name) for name in parameters_of(entry.function)}
    return {
        name: source for name, source in named.items() if source is not None and (source in INPUTS or source in RESULTS)
    }


def _functions(entry: Entry) -> list[Callable[..., Any]]:
    """Functions that have the options of an entry: of its inputs, and its own."""
    sources = reversed(inputs_of(entry).values())
    return [*(INPUTS[source] for source in sources if source in INPUTS), entry.function]


def _linked(entry: Entry) -> list[Entry]:
    """Entries that are done together, in order, and once more the one that is asked for: what it says goes last."""
    before = [RESULTS[source] for source in inputs_of(entry).values() if source in RESULTS]
    names = (*before, entry.name, entry.then, entry.name)
    return [REGISTRY[name] for name in names if name is not None]


def options_of_step(entry: Entry) -> dict[str, Option]:
    """The options of a step: plain parameters that the store does not give, and those of its inputs."""
    found: dict[str, Option] = {}
    for one in _linked(entry):
        given = INPUTS.keys() | one.inputs.keys()
        for function in _functions(one):
            found |= {name: option for name, option in options_of(function).items() if name not in given}
        found |= {name: replace(found[name], default=value) for name, value in one.defaults.items()}
    return found


def check_step(name: str, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of a step, checked; raises ConfigError for a wrong one, with the nearest, or one that is missing."""
    known = options_of_step(entry_of(name))
    require_known(options, known, where, "option")
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    given = check_options(known, given, where)
    missing = [key for key, option in known.items() if option.is_required and key not in given]
    if missing:
        raise ArgumentError(f"{where} needs {missing[0]}")
    return {key: given.get(key, option.default) for key, option in known.items()}


def help_of_step(entry: Entry) -> tuple[str, dict[str, str]]:
    """The first paragraph of a function's docstring, and the first sentence on each option of its step."""
    texts: dict[str, str] = {}
    for function in (function for one in _linked(entry) for function in _functions(one)):
        for name, text in entries(sections(function.__doc__ or "").get("Parameters", "")).items():
            words = re.sub(r":\w+:`~?\.?([^`]+)`", r"\1", text).replace("``", "")
            texts[name] = re.split(r"(?<=[a-z0-9)])[.;](?: |$)", words, maxsplit=1)[0].rstrip(".") + "."
    about = sections(entry.function.__doc__ or "")[""].partition("\n\n")[0]
    return " ".join(about.replace("``", "").split()), texts
