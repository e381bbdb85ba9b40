"""Options of steps: what a function takes that the store does not give, with their help from its docstring."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ntkpipe.base.arguments import Option, check_options, options_of, parameters_of, require_known
from ntkpipe.base.docstrings import entries, sections
from ntkpipe.base.errors import ArgumentError
from ntkpipe.steps.inputs import EXPLAINED, INPUTS, RESULTS
from ntkpipe.steps.registry import REGISTRY, Entry, entry_of


def inputs_of(entry: Entry) -> dict[str, str]:
    """Parameter → input, of those that the store gives."""
    named = {name: entry.inputs.get(name, name) for name in parameters_of(entry.function)}
    return {
        name: source for name, source in named.items() if source is not None and (source in INPUTS or source in RESULTS)
    }


def options_of_step(entry: Entry) -> dict[str, Option]:
    """The options of a step: plain parameters that the store does not give, and those of its inputs."""
    found: dict[str, Option] = {}
    for name, option in options_of(entry.function).items():
        if entry.inputs.get(name, name) is not None and name not in INPUTS and name not in entry.inputs:
            found[name] = option
    for name in inputs_of(entry).values():
        options = options_of_step(REGISTRY[RESULTS[name]]) if name in RESULTS else options_of(INPUTS[name])
        found = {**options, **found}
    if entry.then is not None:
        found |= {k: v for k, v in options_of(REGISTRY[entry.then].function).items() if k not in found}
    defaults = {**(REGISTRY[entry.then].defaults if entry.then else {}), **entry.defaults}
    for name, value in defaults.items():
        found[name] = replace(found[name], default=value)
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
    functions = [
        entry.function,
        *(EXPLAINED.get(name, INPUTS[name]) for name in inputs_of(entry).values() if name in INPUTS),
    ]
    functions += [REGISTRY[entry.then].function] if entry.then is not None else []
    texts: dict[str, str] = {}
    for function in functions:
        texts = {**_parameters_of(function), **texts}
    for name in set(inputs_of(entry).values()) & RESULTS.keys():
        texts = {**help_of_step(REGISTRY[RESULTS[name]])[1], **texts}
    about = sections(entry.function.__doc__ or "")[""].partition("\n\n")[0]
    return " ".join(about.replace("``", "").split()), texts


def _parameters_of(function: Callable[..., Any]) -> dict[str, str]:
    """First sentence of each entry below ``Parameters``."""
    found: dict[str, str] = {}
    for name, text in entries(sections(function.__doc__ or "").get("Parameters", "")).items():
        words = re.sub(r":\w+:`~?\.?([^`]+)`", r"\1", text).replace("``", "")
        found[name] = re.split(r"(?<=[a-z0-9)])[.;](?: |$)", words, maxsplit=1)[0].rstrip(".") + "."
    return found


def reference_table() -> str:
    """The steps in Markdown, for the guide: name, what it finds, function, options with their defaults."""
    rows = ["| step, command, result | finds | function | options |", "|---|---|---|---|"]
    for entry in REGISTRY.values():
        options = ", ".join(
            f"`{name}`" if option.is_required else f"`{name}={option.default!r}`"
            for name, option in options_of_step(entry).items()
        )
        rows.append(f"| `{entry.name}` | {entry.summary} | `ntkpipe.{entry.function.__name__}` | {options} |")
    return "\n".join(rows)
