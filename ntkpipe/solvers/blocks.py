"""Checks of blocks of columns from callers: targets, right-hand sides, starts."""

import numpy as np
from numpy.typing import ArrayLike

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.base.operator import Operator
from ntkpipe.base.targets import Targets, Task, as_values, encode


def as_block(name: str, values: ArrayLike, num_rows: int, *, allow_none: bool = False) -> FloatArray:
    """Check a block, and return it as C-contiguous float64 of two axes; without a copy where it is that already."""
    block = np.asarray(values)
    fits = block.ndim in {1, 2} and block.shape[0] == num_rows and (block.size > 0 or allow_none)
    if not fits or block.dtype.kind not in "fiub":
        raise ConfigError(
            f"{name} of shape {block.shape} and dtype {block.dtype}; needed ({num_rows},) or ({num_rows}, c) of real "
            "numbers"
        )
    block = np.ascontiguousarray(block, np.float64).reshape(num_rows, -1 if block.size else 0)
    if not np.isfinite(block).all():
        raise NonFiniteError(f"{name} hold NaN or infinity")
    return block


def as_targets(targets: ArrayLike, operator: Operator, task: Task) -> tuple[Targets, FloatArray, tuple[int, ...]]:
    """Encode targets of samples; return them, the right-hand sides that they are, (n, c), and what shape results have.

    Where each sample has as many rows as outputs, as in a full NTK, there is one right-hand side.
    """
    values, n, width = as_values(targets), operator.num_rows, 1
    if 0 < (count := len(values) if values.ndim else 0) < n and n % count == 0:
        is_flat = values.ndim == 1 and values.dtype.kind != "f"
        are_labels = task in {"classification", "binary"} or (task == "auto" and is_flat)
        width = n // count if are_labels or values.size == n else 1
    if count * width != n:
        raise ConfigError(
            f"targets of shape {values.shape}; needed ({n},) or ({n}, c), or for kernels of several rows a sample a "
            "column or a class for each of these, labels that are floats with task='classification'"
        )
    found = encode(targets, task=task, num_outputs=width if width > 1 else None)
    if found.classes is not None and width == 1 and (operator.rows_per_sample or 1) > 1:
        raise ConfigError(
            f"labels of {n} rows where each sample has several; needed a label of each sample, or "
            "task='regression' for integers that are numbers"
        )
    rows = np.ascontiguousarray(found.rows(width))
    return found, rows, (n,) if found.is_flat or width > 1 else rows.shape
