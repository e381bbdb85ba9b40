"""Docstrings of functions that share parameters: what is the same for all of them is written once, here."""

import re
from collections.abc import Callable, Mapping
from inspect import cleandoc, signature
from textwrap import fill
from typing import Any

# Entries of `Parameters` for those that a docstring does not describe itself.
PARAMETERS = {
    "matrix": "The symmetric matrix K: what :func:`ntkpipe.as_operator` takes.",
    "kernel": "The train kernel K: what :func:`ntkpipe.as_operator` takes. One of N·O rows is a full NTK.",
    "targets": "Labels of classes (N,), which become one-hot, or real targets (N,) or (N, O).",
    "test_kernel": "Test × train kernel (M·S, N·S), array or stored, where predictions are judged.",
    "test_targets": "Targets of the test samples. A class that training does not have counts as wrong.",
    "initial_outputs": "Outputs f₀ of the train samples (N, O), subtracted from targets; default zero.",
    "test_initial_outputs": "Outputs f₀ of the test samples (M, O), added to predictions; default zero.",
    "ridge": "λ ≥ 0, added to the diagonal.",
    "ridge_scale": 'Unit of ridges. None is absolute, ``"mean_diagonal"`` the mean of the diagonal of K.',
    "task": "What targets are. ``auto``: integers, booleans and strings (N,) are labels, whose classes become one-hot "
    "columns; others are real targets. ``classification``: labels, also as floats. ``binary``: labels of two classes "
    "that share a column of -1 and +1. ``regression``: numbers, also integers.",
    "rank": "Rank of the preconditioner; default ``min(1000, n/10)``. Iterations fall as it grows.",
    "num_probes": "Number of random vectors, p ≥ 2. The Monte-Carlo error falls like ``1 / sqrt(p)``.",
    "memory_limit": 'Bytes that this process may have, or text such as ``"8GiB"``; default a share of what is free.',
    "seed": "Seed of everything that is random. Equal seeds give equal bits.",
    "monitor": "Called after each pass with a :class:`ntkpipe.solvers.result.Step`; what it raises ends the call.",
    "checkpoint": "Where finished parts are saved; another call for the same calculation goes on behind them.",
    "client": "A ``distributed.Client`` whose workers compute; default threads of this process.",
    "progress": "Show progress on standard error.",
    "model": "A module in eval mode; it is copied. Parameters with ``requires_grad=False`` are left out.",
    "inputs": "N samples: a tensor or array (samples along the first axis), a dict of them (keyword arguments of the "
    "model), or a map-style data set of samples or (sample, target) pairs.",
    "kind": 'Kind of kernel: ``"pntk"``, ``"trace"``, ``"output:k"`` (N x N), ``"diagonal"`` (N x N for each output) '
    'or ``"ntk"`` (N*O x N*O). Conventions are in :mod:`ntkpipe.base.kinds`.',
    "forward": 'Picks the (batch, O) tensor: ``".logits"``, a function of what the model returns, or one of (model, '
    "inputs).",
    "parameters": 'Shell-style patterns of parameter names, such as ``"head.*"``; default all that require a gradient.',
    "compute_dtype": 'dtype of forward pass and Jacobians. ``"tf32"`` is float32 whose products on a GPU may be TF32.',
    "accumulate_dtype": "dtype of products and sums over parameters; default ``compute_dtype``, but at least float32. "
    "Never TF32.",
    "store_dtype": "dtype of the matrix; default ``accumulate_dtype``.",
    "device": 'Where to compute: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; default the first GPU if there is one.',
    "self_check": "Compare the engine with plain ``torch.func`` on three samples before the first tile.",
    "code": "Folder whose Python files are sent to the workers; needed only for a model defined in one of them.",
    "workers": "Threads, each with single-threaded arithmetic; default one per core. Results do not depend on it.",
    "jacobian": 'How Jacobians are found: ``"structured"``, or ``"fallback"`` for plain ``torch.func`` throughout.',
}
# Entries of `Raises` of all that work on a matrix.
ERRORS = {
    "ConfigError": "If shapes do not fit, an option is out of range, or something is of another calculation.",
    "NonFiniteError": "If the matrix or another array holds NaN or infinity.",
    "ResourceError": "If what is needed does not fit the memory; the message has both numbers.",
    "StoreError": "If the checkpoint is damaged or cannot be written.",
    "TileError": "If a tile of a stored kernel is missing or damaged; the message names it.",
}

_HEADING = re.compile(r"^(\w[\w ]*)\n-{3,}\n", flags=re.M)
_ENTRY = re.compile(r"^(\S.*)\n((?:[ ]{4}.*\n?|\n(?=[ ]{4}))+)", flags=re.M)


def entries(body: str) -> dict[str, str]:
    """Entries of a section such as ``Parameters``: text by name."""
    return {name: " ".join(text.split()) for names, text in _ENTRY.findall(body) for name in names.split(", ")}


def sections(text: str) -> dict[str, str]:
    """Sections of a docstring by name; what precedes them by an empty one."""
    first, *parts = _HEADING.split(cleandoc(text))
    return {"": first, **dict(zip(parts[::2], parts[1::2], strict=True))}


def _filled(text: str) -> str:
    return fill(text, 116, initial_indent="    ", subsequent_indent="    ")


def completed(function: Callable[..., Any], errors: Mapping[str, str]) -> str | None:
    """The docstring of a function with the entries that are the same everywhere, in the order of its signature."""
    found = sections(function.__doc__ or "")
    names = dict.fromkeys(signature(function).parameters)
    if "Parameters" not in found and not names.keys() <= PARAMETERS.keys():
        return function.__doc__
    described = {name: body for name, body in _ENTRY.findall(found.pop("Parameters", ""))}
    blocks = [f"{name}\n{described.get(name) or _filled(PARAMETERS[name])}".rstrip() for name in names]
    raised = {name: body for name, body in _ENTRY.findall(found.pop("Raises", ""))}
    listed = {name for key in raised for name in key.split(", ")}
    missing = (name for name in errors if name not in listed and (name != "StoreError" or "checkpoint" in names))
    raised |= {name: _filled(errors[name]) for name in missing}
    first, returned = found.pop(""), found.pop("Returns", None)
    parts = {"Parameters": "\n".join(blocks)} | ({} if returned is None else {"Returns": returned})
    parts["Raises"] = "\n".join(f"{name}\n{body.rstrip()}" for name, body in raised.items())
    text = "\n\n".join(f"{name}\n{'-' * len(name)}\n{body.strip(chr(10))}" for name, body in (parts | found).items())
    return f"{first.rstrip()}\n\n{text}\n"
