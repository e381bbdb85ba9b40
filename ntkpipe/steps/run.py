"""A step on a stored kernel: inputs by the names of parameters, progress, a checkpoint, and a result that is saved."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkpipe.base.arguments import check_options, options_of, parameters_of
from ntkpipe.base.config import Budget, MemoryLimit
from ntkpipe.base.errors import ConfigError, Interrupted
from ntkpipe.base.progress import Passes
from ntkpipe.solvers.result import Monitor, Result
from ntkpipe.steps.inputs import INPUTS, RESULTS, Context, check_step, inputs_of, options_of_step, require
from ntkpipe.steps.registry import REGISTRY, Entry, entry_of, result_name, saved_result
from ntkpipe.store.export import find_kernel
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.results import Checkpoint, save_result

if TYPE_CHECKING:
    from distributed import Client


def run_step(
    store: KernelStore | str | Path,
    name: str,
    *,
    array: str = "train",
    memory_limit: MemoryLimit = None,
    client: "Client | None" = None,
    progress: bool = True,
    **options: Any,
) -> Result:
    """Apply a solver or an analysis to a stored kernel, and save its result in the store.

    The kernel, targets, test kernels and what else the function takes come from the store. Where the store cannot be
    written the result is only returned.

    Parameters
    ----------
    store
        Path or URL, or an open store.
    name
        Which one: a row of the table in the guide, such as ``eigsh`` or ``regression``.
    array
        Which kernel, such as ``train`` or ``groups/head/train``.
    memory_limit
        Bytes that this process may have, half of them for tiles; with a client: of each worker.
    client
        A ``distributed.Client`` whose workers multiply.
    progress
        Show passes on standard error.
    **options
        Options of the function.

    Raises
    ------
    ConfigError
        If there is no such step, option or kernel, or the store has no targets or test samples and they are needed.
    Interrupted
        On Ctrl-C. It says whether the same call goes on from a checkpoint.
    """
    entry = entry_of(name)
    given = check_step(name, options, f"step {name!r}")
    check_options(options_of(run_step), {"array": array}, "run_step()")
    budget = Budget.of(memory_limit)
    opened = open_kernel(store)
    kernel = find_kernel(opened, array)
    saved_as, checkpoint = result_name(name, kernel.name), None
    if opened.store.is_writable():
        checkpoint = Checkpoint(opened.store, f"{saved_as}-{_digest(entry, opened, kernel, given)}")
    with (
        _shown(name, checkpoint, progress) as monitor,
        closing(Context(opened, kernel, budget, client, monitor, checkpoint)) as context,
    ):
        if checkpoint is None:
            return _call(entry, context, given)
        with opened.store.in_use():
            result = _call(entry, context, given)
            save_result(opened.store, saved_as, result.to_json(), result.arrays())
            checkpoint.clear()
            if entry.then is not None and opened.test_targets is not None:
                _judge(entry.then, context, given, result)
    return result


def _judge(name: str, context: Context, options: Mapping[str, Any], posterior: Result) -> None:
    """Save what another step says of a posterior, which is safe already: what is wrong here is a warning."""
    try:
        judged = _call(REGISTRY[name], context, options, posterior)
    except ConfigError as error:
        warnings.warn(f"there is no {name} beside the result: {error}", stacklevel=3)
    else:
        save_result(context.store.store, result_name(name, context.kernel.name), judged.to_json(), judged.arrays())


def _call(entry: Entry, context: Context, options: Mapping[str, Any], posterior: Result | None = None) -> Result:
    """Call the function of an entry with what the store gives and its options; a posterior is computed if needed."""
    parameters = parameters_of(entry.function)
    own = {name: options[name] for name in options_of(entry.function) if name in options}
    arguments: dict[str, Any] = {}
    used: dict[str, Any] = {}
    spent: list[Result] = []  # on inputs
    for name, source in inputs_of(entry).items():
        if source in RESULTS:
            value = _call(REGISTRY[RESULTS[source]], context, options) if posterior is None else posterior
            used |= value.options
            spent += [value] if posterior is None else []
        else:
            taken = {key: options[key] for key in options_of(INPUTS[source]) if key in options}
            used |= taken
            value = INPUTS[source](context, **taken)
            spent += [value.result_] if source == "model" else []
        if parameters[name].default is Parameter.empty:
            value = require(context, name, value)
        arguments[name] = value
    # A test kernel without targets, or these without it, is nothing to be judged by.
    pair = [arguments[name] for name in ("test_kernel", "test_targets") if name in arguments]
    if len(pair) == 2 and any(value is None for value in pair):
        arguments |= dict.fromkeys(arguments.keys() & {"test_kernel", "test_targets", "test_initial_outputs"})
    result = entry.function(**{**own, **arguments})
    return replace(
        result,
        options={**used, **result.options, "memory_limit": context.budget.limit},
        work=sum((one.work for one in spent), result.work),
        seconds=sum((one.seconds for one in spent), result.seconds),
    )


def _digest(entry: Entry, store: KernelStore, kernel: Kernel, given: Mapping[str, Any]) -> str:
    """What decides a result, for the name of its checkpoint."""
    known = options_of_step(entry)
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in given.items()
        if name not in entry.later or value != known[name].default
    }
    beside: dict[str, Any] = {}
    if "leading_eigenpairs" in entry.inputs.values():
        top = saved_result(store, "eigsh", kernel.name)
        beside["top"] = len(top.arrays()["eigenvalues"]) if top is not None and top.is_converged else 0
    return hashlib.sha256(json.dumps([kernel.identity, options, beside], sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _shown(name: str, checkpoint: Checkpoint | None, progress: bool) -> Iterator[Monitor]:
    with Passes(name, enabled=progress) as shown:
        try:
            yield lambda step: shown.show(step.work.passes, step.residual, step.target)
        except KeyboardInterrupt:
            kept = checkpoint is not None and checkpoint.load() is not None
            left = "goes on from the checkpoint that it left" if kept else "begins again: it keeps nothing on the way"
            raise Interrupted(f"{name} was interrupted; the same command {left}") from None
