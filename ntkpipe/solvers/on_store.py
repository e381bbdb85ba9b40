"""Solvers on stored kernels: results are saved in the store, progress is shown, Ctrl-C leaves a checkpoint."""

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

StoredResult = TypeVar("StoredResult", bound=Result)

_TRAIN = "kernel/train"


def find_kernel(store: KernelStore, array: str) -> Kernel:
    """Open a symmetric kernel of a store by name."""
    found = find_array(store.store, array)
    grid = found.layout.grid
    if grid is None or not grid.symmetric:
        raise ConfigError(f"{found.layout.name} is no kernel of samples with themselves; needed one as 'train'")
    return Kernel(found, store.manifest.digest())


def right_hand_sides(store: KernelStore) -> NDArray[np.float64]:
    """Train targets as right-hand sides, by rows of the kernel: (N, c), or (N·O, 1) for a full NTK."""
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
class StoreRequest:
    """A stored kernel to work on, and what the work may use."""

    store: KernelStore
    kernel: Kernel
    operator: Operator  # products with the kernel
    monitor: Monitor  # shows progress
    checkpoint: Checkpoint
    memory_limit: int | None  # bytes that this process may have beside tiles; none for a share of what is free
    client: "Client | None"  # of the cluster whose workers multiply, if any

    @property
    def solver_options(self) -> dict[str, Any]:
        """Options of solvers that can be interrupted."""
        return {"memory_limit": self.memory_limit, "checkpoint": self.checkpoint, "monitor": self.monitor}


def of_store(
    name: str, beside: Callable[[KernelStore, str], Mapping[str, Any]] = lambda store, array: {}
) -> Callable[[Callable[..., StoredResult]], Callable[..., StoredResult]]:
    """Turn a function of a :class:`StoreRequest` into one of a store, with the same options by keyword.

    It takes ``(store, *, array="train", memory_limit=None, client=None, progress=True)`` and the options of the
    function: ``array`` is ``train`` or another kernel of the store, such as ``groups/head/train``; ``memory_limit`` and
    ``client`` are as for :func:`ntkpipe.as_operator`, with half of the memory for tiles. Passes are shown on standard
    error. The result goes to ``results/NAME`` of the store.

    On Ctrl-C it raises `Interrupted`, which says whether the same call continues from a checkpoint. The name of the
    checkpoint depends on the options and on what ``beside`` returns; it is dropped once the result is saved.
    """

    def decorate(function: Callable[..., StoredResult]) -> Callable[..., StoredResult]:
        own = [p for p in signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]

        @wraps(function)
        def run(
            store: KernelStore,
            *,
            array: str = "train",
            memory_limit: int | None = None,
            client: "Client | None" = None,
            progress: bool = True,
            **options: Any,
        ) -> StoredResult:
            kernel = find_kernel(store, array)
            decides = [kernel.identity, {p.name: p.default for p in own} | options, dict(beside(store, array))]
            digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
            saved_as = result_name(name, kernel.name)
            checkpoint = Checkpoint(store.store, f"{saved_as}-{digest[:16]}")
            share = half_of_room(memory_limit)
            operator = as_operator(kernel, memory_limit=share, client=client)
            try:
                with store.store.in_use(), _shown(name, checkpoint, progress) as monitor:
                    request = StoreRequest(store, kernel, operator, monitor, checkpoint, share, client)
                    result = function(request, **options)
                    save_result(store.store, saved_as, result.to_json(), result.arrays())
                    checkpoint.clear()
            finally:
                operator.close()
            return result

        common = [p for p in signature(run, follow_wrapped=False).parameters.values() if p.kind is not p.VAR_KEYWORD]
        run.__signature__ = Signature([*common, *own])  # type: ignore[attr-defined]
        return run

    return decorate


def result_name(solver: str, array: str) -> str:
    """Name below ``results/``: the solver, and the kernel where it is not the main one."""
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
