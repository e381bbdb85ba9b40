"""A first look at a kernel, exact and in memory, on its leading samples: spectrum, alignment, ridge regression."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ntkpipe.analysis.alignment import alignments
from ntkpipe.base.config import RidgeScale, check_number
from ntkpipe.base.targets import Task, as_rows, as_samples, encode, encode_test
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.inverse.solve import solve
from ntkpipe.store.kernel_store import KernelStore

_MOST_ROWS = 4096
_NUM_EIGENVALUES = 5


@dataclass(frozen=True)
class Summary:
    """What :func:`summarize` found."""

    num_train: int  # train samples of the store
    num_samples: int  # num_samples, num_rows: leading samples that were looked at, and their rows
    num_rows: int
    eigenvalues: tuple[float, ...]  # the largest of that block, in descending order
    smallest_eigenvalue: float  # the smallest of that block
    trace: float  # its trace
    # alignment, centred_alignment: as :func:`ntkpipe.alignment` of that block; none without targets
    alignment: float | None = None
    centred_alignment: float | None = None
    ridge: float | None = None  # lambda of the regression; none without targets and a test set
    # Share of test samples whose largest prediction is their class; none if targets are no classes
    accuracy: float | None = None
    mean_squared_error: float | None = None  # of the predictions on the test samples
    num_test: int = 0  # test samples
    targets: str = ""  # what targets were taken for, such as "10 classes, one-hot"; empty without targets
    note: str = ""  # on test samples of classes that training does not have

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def summarize(
    store: KernelStore,
    *,
    samples: int | None = None,
    ridge: float = 1e-4,
    ridge_scale: RidgeScale = "mean_diagonal",
    task: Task = "auto",
) -> Summary:
    """Look at the leading block of a store's kernel."""
    total, width = store.manifest.train.num_samples, store.manifest.num_covectors
    if samples is not None:
        check_number("samples", samples, low=1, high=total)
    count = samples or max(1, min(total, _MOST_ROWS // width))
    block = store.train[: count * width, : count * width].astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(block)[::-1]
    targets = (
        None if store.targets is None else encode(store.targets, task=task, num_outputs=width if width > 1 else None)
    )
    operator = DenseOperator(block, storage_dtype=store.train.dtype)
    found: dict[str, Any] = {}
    if targets is not None and width in {1, targets.matrix.shape[1]}:
        rows = as_rows(targets.matrix[:count], width)
        found["alignment"], found["centred_alignment"] = alignments(operator, rows, width)
        if store.manifest.test is not None and store.test_targets is not None:
            test = encode_test(store.test_targets, targets)
            fit = solve(operator, rows, ridge=ridge, ridge_scale=ridge_scale, task="regression")
            outputs = as_samples(store.test_train[:, : len(block)].astype(np.float64) @ fit.coefficients, width)
            found |= {"ridge": fit.ridge, "accuracy": test.accuracy(outputs), "num_test": len(test.matrix)}
            found |= {"mean_squared_error": test.loss(outputs), "note": test.note.removeprefix("; ")}
    return Summary(
        num_train=total,
        num_samples=count,
        num_rows=len(block),
        eigenvalues=tuple(float(value) for value in eigenvalues[:_NUM_EIGENVALUES]),
        smallest_eigenvalue=float(eigenvalues[-1]),
        trace=float(np.trace(block)),
        targets="" if targets is None else targets.words,
        **found,
    )
