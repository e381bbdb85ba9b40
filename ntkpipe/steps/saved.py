"""Results in a store, restored through their own dataclasses."""

from pathlib import Path
from typing import Any

from ntkpipe.solvers.result import Result
from ntkpipe.steps.registry import REGISTRY
from ntkpipe.store.export import find_array
from ntkpipe.store.kernel_store import KernelStore, open_kernel
from ntkpipe.store.results import load_result, reading_results

_TRAIN = "kernel/train"


def result_name(step: str, array: str) -> str:
    """Name below ``results/``: the step, and the kernel where it is not the main one."""
    return step if array == _TRAIN else f"{step}-{array.replace('/', '-')}"


def saved_result(store: KernelStore, step: str, array: str = "train") -> Result | None:
    """The result that a step saved for a kernel; None if there is none, or one of a version that saved other fields.

    Raises StoreError if it is damaged.
    """
    found = read_result(store, result_name(step, find_array(store.store, array).layout.name))
    return found if isinstance(found, Result) else None


def read_result(store: KernelStore | str | Path, name: str) -> Result | dict[str, Any] | None:
    """Read the result below ``results/name`` of a store: as the solver or analysis returned it; None if there is none.

    Parameters
    ----------
    store
        Path, or an open store.
    name
        A step, such as ``eigsh`` or ``regression``; for another kernel than ``train`` its array follows, parts joined
        by ``-``, such as ``eigsh-groups-head-train``. Or another record, such as ``verification``, ``certificate`` or
        ``summary``, which is returned as a dict, as is a result of a version that saved other fields.

    Raises
    ------
    StoreError
        If the result is damaged.
    """
    opened = open_kernel(store)
    found = load_result(opened.store, name)
    entry = REGISTRY.get(name.partition("-")[0])
    for one in entry.results if entry is not None else ():
        if found is not None and one.is_of(found):
            with reading_results(opened.path):
                return one.from_saved(found)
    return found
