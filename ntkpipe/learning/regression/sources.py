"""What regressions share: targets as right-hand sides, ridges, test kernels, what a store has of them; and stages."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.arrays import FloatArray, require_bounded, runs
from ntkpipe.base.config import RidgeScale, absolute_ridges
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.given import as_real, dtype_of, is_in_slices, read_slices, real_dtype, require_opened
from ntkpipe.base.operator import Operator, Work, digest_of
from ntkpipe.base.targets import Targets, Task, as_rows, as_samples, as_values, encode, encode_test
from ntkpipe.solvers.checkpoint import Stages
from ntkpipe.solvers.inverse.contract import Fit, Inverse, Question
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelSet, KernelStore
from ntkpipe.store.results import Checkpoint

_NAME = "the test kernel"
# Size of a part of a test kernel in float64.
_BYTES_AT_ONCE = 2**24


def ridges_for(
    defaults: Sequence[float], ridges: Sequence[float] | None, scale: RidgeScale, operator: Operator
) -> tuple[FloatArray, dict[str, Any]]:
    """Absolute ridges, those given or defaults in mean diagonals; and what options of a result say of them."""
    asked, scale = (defaults, "mean_diagonal") if ridges is None else (ridges, scale)
    diagonal, options = operator.diagonal(), {"ridges": [float(ridge) for ridge in asked], "ridge_scale": scale}
    return absolute_ridges(asked, scale, lambda: diagonal), options


@dataclass(frozen=True)
class TrainTargets:
    """Targets of the train samples."""

    targets: Targets
    width: int  # rows a sample of the kernel, S: 1, or O of a full NTK
    rhs: FloatArray  # Y, or Y - f₀, in the rows of the kernel
    is_centred: bool  # whether it is Y - f₀

    def offset_of_test(self, initial: Any | None, num_samples: int) -> FloatArray:
        """What is added to predictions at test samples: their initial outputs, where those of train samples are off."""
        if self.is_centred != (initial is not None):
            raise ConfigError("initial_outputs of one of train and test samples; needed both or none")
        return np.zeros(1) if initial is None else initial_matrix(initial, (num_samples, self.targets.matrix.shape[1]))


def with_error(value: float, error: float, form: str = ",.5g") -> str:
    """A number, and its error unless that is zero."""
    return f"{value:{form}}" + (f" ± {error:.1g}" if error else "")


def train_targets(operator: Operator, targets: Any, initial: Any | None, task: Task) -> TrainTargets:
    """Encode targets for a kernel, centred at initial outputs if there are any."""
    values = as_values(targets)
    width = _width_of(operator, len(values) if values.ndim else 0)
    initial = None if initial is None else as_real("initial_outputs", initial)
    columns = initial.shape[1] if initial is not None and initial.ndim == 2 else None
    found = encode(targets, num_outputs=width if width > 1 else columns, task=task)
    matrix = found.matrix if initial is None else found.matrix - initial_matrix(initial, found.matrix.shape)
    return TrainTargets(found, width, as_rows(matrix, width), initial is not None)


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
    values = as_real("initial_outputs", initial).astype(np.float64, copy=False)
    if values.ndim == 1:
        values = values[:, None]
    if values.shape != shape:
        raise ConfigError(f"initial_outputs of shape {values.shape}; needed {shape}, as targets have")
    return require_bounded("initial_outputs", values)


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


class CrossKernel:
    """A test × train kernel that is read in parts, one of which is in memory at a time."""

    def __init__(self, matrix: Any, num_columns: int, width: int) -> None:
        if isinstance(matrix, KernelSet):
            matrix = matrix.test_train
        require_opened(_NAME, matrix)
        self._matrix = matrix if is_in_slices(matrix) else as_real(_NAME, matrix)
        shape = tuple(self._matrix.shape)
        real_dtype(_NAME, shape, dtype_of(self._matrix))
        if len(shape) != 2 or shape[1] != num_columns or not shape[0] or shape[0] % width:
            samples = f", {width} rows a sample" if width > 1 else ""
            is_turned = len(shape) == 2 and shape[0] == num_columns
            advice = "; is it train × test? Then give its transpose" if is_turned else ""
            if shape == (num_columns,) and width == 1:
                advice = "; of one test sample give kernel[None]"
            raise ConfigError(
                f"a test kernel of shape {shape}; needed (test rows, {num_columns}), a column for each row of the "
                f"train kernel{samples}{advice}"
            )
        self.num_rows = shape[0]
        self.num_samples = shape[0] // width
        self._num_columns = num_columns
        self._width = width

    @property
    def identity(self) -> str:
        """What results call it: a stored kernel by its entries."""
        if isinstance(self._matrix, Kernel):
            return self._matrix.identity
        return f"array of shape {(self.num_rows, self._num_columns)}"

    def times(self, block: FloatArray) -> FloatArray:
        """``K_test @ block`` in float64, block (N·S, c); one read of the whole."""
        found = np.zeros((self.num_rows, block.shape[1]))
        with np.errstate(over="ignore", invalid="ignore"):
            for rows, columns, part in self._parts():
                found[rows] += _finite(part, rows) @ block[columns]
        return require_bounded("predictions", found)

    def outputs(self, coefficients: FloatArray) -> FloatArray:
        """Predictions ``K_test A`` in float64, (M, O)."""
        return as_samples(self.times(coefficients), self._width)

    def sample_blocks(self, most_samples: int = sys.maxsize) -> Iterator[tuple[slice, FloatArray]]:
        """``(samples, their rows (m·S, N·S) in float64)``, in order."""
        fitting = max(1, _BYTES_AT_ONCE // (8 * self._num_columns * self._width))
        for samples in runs(self.num_samples, max(1, min(fitting, most_samples))):
            rows = slice(samples.start * self._width, samples.stop * self._width)
            yield samples, _finite(self._read(rows), rows)

    def _read(self, rows: slice) -> FloatArray:
        if isinstance(self._matrix, np.ndarray | Kernel) and not isinstance(self._matrix, np.memmap):
            return np.asarray(self._matrix[rows, :], np.float64)
        return as_real(_NAME, read_slices(_NAME, self._matrix, rows, slice(0, self._num_columns))).astype(np.float64)

    def _parts(self) -> Iterator[tuple[slice, slice, FloatArray]]:
        if not isinstance(self._matrix, Kernel):
            for rows in runs(self.num_rows, max(1, _BYTES_AT_ONCE // (8 * self._num_columns))):
                yield rows, slice(None), self._read(rows)
            return
        of_rows, of_columns = self._matrix.grid.rows, self._matrix.grid.columns
        for row, column in product(range(of_rows.num_tiles), range(of_columns.num_tiles)):
            tile = np.asarray(self._matrix.read_tile(row, column), np.float64)
            at_rows, at_columns = of_rows.rows(row), of_columns.rows(column)
            yield slice(at_rows.start, at_rows.stop), slice(at_columns.start, at_columns.stop), tile


def _finite(part: FloatArray, rows: slice) -> FloatArray:
    return require_bounded(f"the test kernel, rows {rows.start} to {rows.stop - 1},", part)


class HeldOut:
    """Test samples with targets, for predictors whose coefficients are in the rows of the train kernel."""

    def __init__(self, kernel: Any, targets: Any, train: TrainTargets, initial: Any | None) -> None:
        self.targets = encode_test(targets, train.targets)
        self._cross = CrossKernel(kernel, len(train.rhs), train.width)
        self._width = train.width
        shape = self._cross.num_samples, train.targets.matrix.shape[1]
        if self.targets.matrix.shape != shape:
            raise ConfigError(f"test targets of shape {np.shape(targets)}; needed {shape} by kernel and train targets")
        self._offset = train.offset_of_test(initial, self._cross.num_samples)

    @classmethod
    def of(cls, kernel: Any, targets: Any, train: TrainTargets, initial: Any | None = None) -> "HeldOut | None":
        """The test set, if there is one."""
        if (kernel is None) != (targets is None):
            raise ConfigError("a test kernel without test targets, or these without it; needed both or none")
        return None if kernel is None else cls(kernel, targets, train, initial)

    def predict(self, coefficients: Sequence[FloatArray]) -> list[FloatArray]:
        """Predictions (M, O) of several predictors, by one read of the test kernel."""
        predicted = self._cross.times(np.concatenate(coefficients, axis=1))
        parts = np.split(predicted, len(coefficients), axis=1)
        return [as_samples(part, self._width) + self._offset for part in parts]


class CountedStages(Stages):
    """Stages by products with an operator, such as fits; :attr:`work`, :attr:`seconds` are what earlier calls took."""

    def __init__(
        self, checkpoint: Checkpoint | None, operator: Operator, train: TrainTargets | None, **decides: Any
    ) -> None:
        if checkpoint is not None:
            decides["matrix"] = operator.identity()
            if train is not None:
                decides |= {"targets": train.targets.words, "rhs": digest_of(train.rhs)}
        super().__init__(checkpoint, decides)
        self._operator = operator
        self.work, self.seconds = Work(), 0.0

    def once(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """See :meth:`Stages.once`."""
        begin, before = perf_counter(), self._operator.work

        def counted() -> Mapping[str, Any]:
            found = compute()
            # A solver that goes on from a checkpoint of its own says what it took in all.
            work = Work(**found["work"]) if "work" in found else self._operator.work - before
            return {"seconds": perf_counter() - begin, **found, "spent": work}

        found = super().once(name, counted)
        self.work += found["spent"] - (self._operator.work - before)
        self.seconds += found["seconds"] - (perf_counter() - begin)
        return found

    def fits(
        self, inverse: Inverse, question: Question, ridges: FloatArray, measure: Callable[[Fit], Mapping[str, float]]
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """What is measured of fits, with their places, from the largest ridge to the smallest, each a stage.

        Iterations begin with the solution of the ridge before.
        """
        solution = None

        def measured(ridge: float, start: FloatArray | None) -> dict[str, Any]:
            fit = inverse.fit(question, ridge, start)
            verdict = {"status": fit.verdict.status, "message": fit.verdict.message, "residual": fit.verdict.worst}
            return {"solution": fit.solution, "measures": measure(fit), "num_left_out": len(fit.samples), **verdict}

        for place in np.argsort(-ridges, kind="stable").tolist():
            found = self.once(f"ridge-{place}", partial(measured, float(ridges[place]), solution))
            solution = np.asarray(found["solution"])
            yield place, {**found, "coefficients": solution[:, : question.rhs.shape[1]]}
