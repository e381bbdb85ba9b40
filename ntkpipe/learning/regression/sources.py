"""What a regression starts from: the operator, targets as right-hand sides, and what a store holds of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError, NonFiniteError, ResourceError
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import process_memory
from ntkpipe.base.ridge import RidgeScale, absolute_ridges, ridges_or
from ntkpipe.base.targets import Labels, Task, as_rows, encode
from ntkpipe.operators.opening import as_operator, open_for_solver
from ntkpipe.solvers.on_store import StoreRequest
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelSet, KernelStore

# What a process takes beside the arrays that are counted.
_NOISE_BYTES = 2**24


def open_for_analysis(matrix: Any, memory_limit: int | None) -> tuple[Operator, int | None]:
    """The operator of a matrix and the limit for what is computed; tiles are not kept where the limit has no room."""
    if memory_limit is not None:
        check_number("memory_limit", memory_limit, low=1)
    try:
        return open_for_solver(matrix, memory_limit)
    except ResourceError:
        return as_operator(matrix, keep_tiles=False, threads=1), memory_limit


def at_least(memory_limit: int | None, num_bytes: int) -> int | None:
    """A limit for a solver that needs so many bytes: the given one, or what this process then has."""
    return None if memory_limit is None else max(memory_limit, process_memory() + num_bytes + _NOISE_BYTES)


def ridges_for(
    defaults: Sequence[float], ridges: Sequence[float] | None, ridge_scale: RidgeScale, diagonal: FloatArray
) -> tuple[FloatArray, dict[str, Any]]:
    """Absolute ridges, those given or defaults in mean diagonals; and what options of a result say of them."""
    asked, scale = ridges_or(defaults, ridges, ridge_scale)
    options = {"ridges": [float(ridge) for ridge in asked], "ridge_scale": scale}
    return absolute_ridges(asked, scale, diagonal), options


@dataclass(frozen=True)
class TrainTargets:
    """Targets of the train samples."""

    labels: Labels
    width: int  # rows a sample of the kernel, S: 1, or O of a full NTK
    rhs: FloatArray  # Y, or Y - f₀, in the rows of the kernel


def train_targets(
    kernel: Any, operator: Operator, targets: Any, initial: Any | None = None, task: Task = "auto"
) -> TrainTargets:
    """Encode targets for a kernel, centred at initial outputs if there are any."""
    values = np.asarray(targets)
    width = _width_of(kernel, operator.num_rows, len(values) if values.ndim else 0)
    columns = np.shape(initial)[1] if initial is not None and np.ndim(initial) == 2 else None
    columns = width if width > 1 else columns
    labels = encode(values, num_outputs=columns, task=task)
    rhs = labels.rows(width)
    if initial is not None:
        rhs = as_rows(labels.matrix - initial_matrix(initial, labels.matrix.shape), width)
    return TrainTargets(labels, width, rhs)


def _width_of(kernel: Any, num_rows: int, num_samples: int) -> int:
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


def initial_matrix(initial: Any, shape: tuple[int, ...]) -> FloatArray:
    """Initial outputs f₀ of samples as a checked matrix, (N, O)."""
    values = np.asarray(initial, np.float64)
    if values.ndim == 1:
        values = values[:, None]
    if values.shape != shape:
        raise ConfigError(f"initial_outputs of shape {np.shape(initial)}; needed {shape}, as targets have")
    if not np.isfinite(values).all():
        raise NonFiniteError("initial_outputs hold NaN or infinity")
    return values


def offset_of_test(initial: Any | None, shape: tuple[int, ...], *, is_centred: bool) -> FloatArray:
    """What is added to predictions at test samples: their initial outputs, where train targets are centred."""
    if is_centred != (initial is not None):
        raise ConfigError("initial_outputs of one of train and test samples; needed both or none")
    return np.zeros(1) if initial is None else initial_matrix(initial, shape)


def targets_of(source: KernelSet, split: str) -> NDArray[Any]:
    """Train or test targets of a store."""
    store = KernelStore(source.store)
    name, found = ("targets", store.targets) if split == "train" else ("test_targets", store.test_targets)
    if found is None:
        what = name.replace("_", " ")
        raise ConfigError(f"{store.path} has no {what}; give {name}= to compute_kernel, or arrays here")
    return found


def outputs_of(source: KernelSet, split: str) -> NDArray[Any]:
    """The model's outputs on train or test samples, (N, O)."""
    store = KernelStore(source.store)
    return store.outputs if split == "train" else store.test_outputs


def test_kernel_of(request: StoreRequest) -> Kernel | None:
    """Test × train kernel of the same parameters and outputs as the train kernel; None without test samples."""
    store = request.store
    if store.manifest.test is None:
        return None
    name = f"{request.kernel.name.removesuffix('train')}test_train"
    return Kernel(store.store.arrays[name], store.manifest.digest())
