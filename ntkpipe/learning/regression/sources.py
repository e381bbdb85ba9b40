"""What a regression starts from: targets as right-hand sides, ridges, and what a store holds of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.base.operator import Operator
from ntkpipe.base.ridge import RidgeScale, absolute_ridges, ridges_or
from ntkpipe.base.tables import TableRows
from ntkpipe.base.targets import Targets, Task, as_rows, as_values, encode
from ntkpipe.store.kernel_store import KernelSet, KernelStore


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

    targets: Targets
    width: int  # rows a sample of the kernel, S: 1, or O of a full NTK
    rhs: FloatArray  # Y, or Y - f₀, in the rows of the kernel


def said_of(words: str) -> TableRows:
    """The row of a printed table that says what targets were taken for; none for results of versions before."""
    return [("targets", words)] if words else []


def with_error(value: float, error: float, form: str = ",.5g") -> str:
    """A number, and its error unless that is zero."""
    return f"{value:{form}}" + (f" ± {error:.1g}" if error else "")


def train_targets(operator: Operator, targets: Any, initial: Any | None, task: Task) -> TrainTargets:
    """Encode targets for a kernel, centred at initial outputs if there are any."""
    values = as_values(targets)
    width = _width_of(operator, len(values) if values.ndim else 0)
    columns = np.shape(initial)[1] if initial is not None and np.ndim(initial) == 2 else None
    found = encode(values, num_outputs=width if width > 1 else columns, task=task)
    matrix = found.matrix if initial is None else found.matrix - initial_matrix(initial, found.matrix.shape)
    return TrainTargets(found, width, as_rows(matrix, width))


def _width_of(operator: Operator, num_samples: int) -> int:
    """Rows a sample: those of a stored kernel, or as many as the number of targets says."""
    num_rows, known = operator.num_rows, operator.rows_per_sample
    width = known or num_rows // max(1, num_samples)
    if not num_samples or width * num_samples != num_rows:
        needed = "a sample for each row, or for each run of O rows of a full NTK"
        if known is not None:
            needed = f"{num_rows // known} samples, since the kernel has {known} rows for each"
        raise ConfigError(f"targets of {num_samples} samples for a kernel of {num_rows} rows; needed {needed}")
    return width


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
