"""What a regression takes from a store: train kernel and targets, test kernel and targets, initial outputs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.base.operator import Operator
from ntkpipe.base.targets import Labels, Task, as_rows, encode
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelSet, KernelStore


def width_of(kernel: Any, num_rows: int, num_samples: int) -> int:
    """Rows a sample, S: 1, or O of a full NTK."""
    if isinstance(kernel, Kernel):
        if kernel.grid.rows.num_samples != num_samples:
            raise ConfigError(f"targets of {num_samples} samples for {kernel!r} of {kernel.grid.rows.num_samples}")
        return kernel.num_covectors
    if num_samples and num_rows % num_samples == 0:
        return num_rows // num_samples
    raise ConfigError(
        f"targets of {num_samples} samples for a kernel of {num_rows} rows; needed a sample for each row, or, of a "
        "full NTK, for each run of O rows"
    )


def train_targets(kernel: Any, operator: Operator, targets: Any, initial: Any | None, task: Task) -> tuple[Labels, int]:
    """Targets as a matrix, and rows a sample."""
    values = np.asarray(targets)
    width = width_of(kernel, operator.num_rows, len(values) if values.ndim else 0)
    columns = None
    if width > 1:
        columns = width
    elif initial is not None and np.ndim(initial) == 2:
        columns = np.shape(initial)[1]
    labels = encode(values, num_outputs=columns, task=task)
    as_rows(labels.matrix, width)
    return labels, width


def initial_matrix(initial: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """f₀ of samples, (N, O)."""
    values = np.asarray(initial, np.float64)
    if values.ndim == 1:
        values = values[:, None]
    if values.shape != shape:
        raise ConfigError(f"initial_outputs of shape {np.shape(initial)}; needed {shape}, as targets have")
    if not np.isfinite(values).all():
        raise NonFiniteError("initial_outputs hold NaN or infinity")
    return values


def targets_of(source: KernelSet, split: str) -> NDArray[Any]:
    """Train or test targets of a store."""
    store = KernelStore(source.store)
    found = store.targets if split == "train" else store.test_targets
    if found is None:
        option = "targets" if split == "train" else "test_targets"
        raise ConfigError(f"{store.path} has no {split} targets; give {option}= to compute_kernel, or arrays here")
    return found


def outputs_of(source: KernelSet, split: str) -> NDArray[Any]:
    """The model's outputs on train or test samples, (N, O)."""
    store = KernelStore(source.store)
    return store.outputs if split == "train" else store.test_outputs
