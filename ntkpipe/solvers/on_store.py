"""What is found of a stored kernel is kept in its store: progress is shown, Ctrl-C leaves a checkpoint."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import Signature, signature
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import ConfigError, Interrupted
from ntkpipe.base.operator import Operator
from ntkpipe.base.progress import Passes
from ntkpipe.base.resources import half_of_room
from ntkpipe.base.targets import num_classes_of, target_matrix, target_rows
from ntkpipe.operators.opening import as_operator
from ntkpipe.solvers.result import Monitor, Result, Step
from ntkpipe.store.export import find_array
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelStore
from ntkpipe.store.results import Checkpoint, save_result

if TYPE_CHECKING:
    from distributed import Client

Found = TypeVar("Found", bound=Result)

_TRAIN = "kernel/train"


def find_kernel(store: KernelStore, array: str) -> Kernel:
    """A symmetric kernel of a store by name."""
    found = find_array(store.store, array)
    grid = found.layout.grid
    if grid is None or not grid.symmetric:
        raise ConfigError(f"{found.layout.name} is no kernel of samples with themselves; needed one as 'train'")
    return Kernel(found, store.manifest.digest())


def right_hand_sides(store: KernelStore) -> NDArray[np.float64]:
    """The train targets as right-hand sides in the rows of the kernel: (N, c), or (N·O, 1) for a full NTK."""
    targets = store.targets
    if targets is None:
        raise ConfigError(f"{store.path} has no targets; give them to compute_kernel, or call ntkpipe.solve with yours")
    matrix = target_matrix(targets, num_classes_of(targets))
    rows = target_rows(matrix, store.manifest.num_covectors)
    if rows is None:
        raise ConfigError(
            f"the targets of {store.path} have {matrix.shape[1]} columns and the kernel {store.manifest.num_covectors} "
            "rows a sample; call ntkpipe.solve with right-hand sides of your own"
        )
    return rows


@dataclass(frozen=True)
class Question:
    """What is asked of a stored kernel, and what the answer may use."""

    store: KernelStore  # store, kernel, operator: the kernel, and its products
    kernel: Kernel
    operator: Operator
    monitor: Monitor  # monitor, checkpoint: shown and kept while the answer is looked for
    checkpoint: Checkpoint
    # Bytes that this process may have without what is for tiles; none for a share of what is free
    memory_limit: int | None
    client: "Client | None"  # of the cluster whose workers multiply, if any


def of_store(
    name: str, beside: Callable[[KernelStore, str], Mapping[str, Any]] = lambda store, array: {}
) -> Callable[[Callable[..., Found]], Callable[..., Found]]:
    """Make of a function that answers a :class:`Question` one of a store, with the same options by keyword.

    It takes ``(store, *, array="train", memory_limit=None, client=None, progress=True)`` and the options of the
    function: ``array`` is ``train`` or, as ``groups/head/train``, another kernel of the store; ``memory_limit`` and
    ``client`` as for :func:`ntkpipe.as_operator`, and half of the memory is for the answer; passes
    are shown on standard error. The result goes to ``results/NAME`` of the store.

    On Ctrl-C it raises `Interrupted`, which says whether the same call goes on from a checkpoint;
    that has the name of the options, and is dropped when the result is there.
    """

    def decorate(answer: Callable[..., Found]) -> Callable[..., Found]:
        own = [p for p in signature(answer).parameters.values() if p.kind is p.KEYWORD_ONLY]

        @wraps(answer)
        def ask(
            store: KernelStore,
            *,
            array: str = "train",
            memory_limit: int | None = None,
            client: "Client | None" = None,
            progress: bool = True,
            **options: Any,
        ) -> Found:
            kernel = find_kernel(store, array)
            asked = {p.name: p.default for p in own} | options
            question = [kernel.identity, asked, dict(beside(store, array))]
            digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
            saved = result_name(name, kernel.name)
            checkpoint = Checkpoint(store.store, f"{saved}-{digest[:16]}")
            share = half_of_room(memory_limit)
            operator = as_operator(kernel, memory_limit=share, client=client)
            try:
                with store.store.in_use(), _shown(name, checkpoint, progress) as monitor:
                    found = answer(Question(store, kernel, operator, monitor, checkpoint, share, client), **options)
                    save_result(store.store, saved, found.to_json(), found.arrays())
                    checkpoint.clear()
            finally:
                operator.close()
            return found

        common = [p for p in signature(ask, follow_wrapped=False).parameters.values() if p.kind is not p.VAR_KEYWORD]
        ask.__signature__ = Signature([*common, *own])  # type: ignore[attr-defined]
        return ask

    return decorate


def result_name(solver: str, array: str) -> str:
    """Below ``results/``: the solver, and the kernel where it is not the main one."""
    return solver if array == _TRAIN else f"{solver}-{array.replace('/', '-')}"


@contextmanager
def _shown(name: str, checkpoint: Checkpoint, progress: bool) -> Iterator[Monitor]:
    with Passes(name, enabled=progress) as shown:

        def monitor(step: Step) -> None:
            shown.show(step.work.passes, step.residual, step.target)

        try:
            yield monitor
        except KeyboardInterrupt:
            left = "begins again: it keeps nothing on the way"
            if checkpoint.load() is not None:
                left = "goes on from the checkpoint that it left"
            raise Interrupted(f"{name} was interrupted; the same command {left}") from None
