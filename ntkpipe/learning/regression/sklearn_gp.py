"""A stored kernel as a kernel of scikit-learn's Gaussian processes, whose inputs are numbers of rows."""

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError, NonFiniteError, needed_for
from ntkpipe.base.given import as_real
from ntkpipe.store.kernel import Kernel
from ntkpipe.store.kernel_store import KernelSet

with needed_for("PrecomputedKernel", "scikit-learn"):
    from sklearn.gaussian_process.kernels import Kernel as GaussianProcessKernel


def _opened(name: str, matrix: Any) -> Any:
    """A stored kernel, or an array in memory."""
    found = matrix if isinstance(matrix, Kernel) else as_real(name, matrix)
    if len(found.shape) != 2:
        raise ConfigError(f"{name} of shape {found.shape}; needed a matrix")
    return found


def _finite(values: FloatArray) -> FloatArray:
    if not np.isfinite(values).all():
        raise NonFiniteError("the kernel holds NaN or infinity")
    return values


class PrecomputedKernel(GaussianProcessKernel):  # type: ignore[misc]
    """A kernel matrix where scikit-learn's Gaussian processes expect a function of inputs.

    ``GaussianProcessRegressor`` and ``GaussianProcessClassifier`` have no ``kernel="precomputed"``: they evaluate a
    kernel object on inputs. Here the inputs are row numbers, one column: train rows count from 0, and test rows go on
    behind them. :attr:`train_rows` and :attr:`test_rows` are these inputs, and a subset of them selects samples::

        kernel = PrecomputedKernel.from_store(ntkpipe.open_kernel("my_kernel.zarr"))
        process = GaussianProcessRegressor(kernel, alpha=0.1)
        process.fit(kernel.train_rows, y).predict(kernel.test_rows, return_std=True)

    It has no hyperparameters of its own and composes with scikit-learn's kernels: ``ConstantKernel() * kernel +
    WhiteKernel()`` learns a scale and a noise. Values are float64 whatever the dtype of the store. A full NTK has a row
    for each (sample, output) pair, row = sample * O + output, so that targets (N, O) become ``y.ravel()``.

    Each evaluation reads the rows that it needs. A process whose hyperparameters are optimised evaluates at every step,
    for which arrays in memory are better: ``PrecomputedKernel(store.train.to_numpy(), …)``; clones share them.
    scikit-learn factors the matrix of all train rows in memory, 8 n² bytes several times over and n³/3 operations;
    :func:`ntkpipe.solve` and :func:`ntkpipe.logdet` need not hold it.

    Parameters
    ----------
    train : (n, n) array or stored kernel
        Train rows with each other.
    test_train : (m, n) array or stored kernel, optional
        Test rows with train rows. Default none: only train rows are known.
    test_diagonal : (m,) or (M, S, S) array, optional
        Each test row with itself, or the S x S block of each test sample, as
        :attr:`ntkpipe.store.kernel.KernelSet.test_diagonal` is. Needed for the standard deviation of predictions.

    Raises
    ------
    ConfigError
        On evaluation, if inputs are no row numbers, or ask for what was not given: above all for test samples with each
        other, of which a store keeps the diagonal blocks alone, so that ``return_cov=True`` is refused.
    """

    def __init__(self, train: Any, test_train: Any = None, test_diagonal: ArrayLike | None = None) -> None:
        self.train = train
        self.test_train = test_train
        self.test_diagonal = test_diagonal

    @classmethod
    def from_store(cls, kernels: KernelSet) -> "PrecomputedKernel":
        """The kernel of a store, of a group of parameters or of one output; entries are read where they are needed.

        Parameters
        ----------
        kernels
            An opened store, ``store.group(name)`` or ``store.output(number)``.

        Raises
        ------
        ConfigError
            If each output has a kernel of its own; then ``.output(number)`` picks one.
        """
        if kernels.store.manifest.test is None:
            return cls(kernels.train)
        return cls(kernels.train, kernels.test_train, kernels.test_diagonal)

    # scikit-learn wants parameters unchanged as attributes, so they are looked at here.
    @property
    def _train(self) -> Any:
        return _opened("train", self.train)

    @property
    def _test_train(self) -> Any:
        found, size = _opened("test_train", self.test_train), self._train.shape[0]
        if found.shape[1] != size:
            raise ConfigError(f"test_train of shape {found.shape}; needed (m, {size}), test rows with train rows")
        return found

    @property
    def train_rows(self) -> NDArray[np.int64]:
        """Train rows as inputs, (n, 1)."""
        return np.arange(self._train.shape[0])[:, None]

    @property
    def test_rows(self) -> NDArray[np.int64]:
        """Test rows as inputs, (m, 1).

        Raises
        ------
        ConfigError
            If there are none.
        """
        if self.test_train is None:
            raise ConfigError(f"{self!r} has no test rows; give test_train, of test rows with train rows")
        return np.arange(self._test_train.shape[0])[:, None] + int(self._train.shape[0])

    def __repr__(self) -> str:
        tests = "" if self.test_train is None else f", {self._test_train.shape[0]} test rows"
        return f"PrecomputedKernel({self._train.shape[0]} train rows{tests})"

    def __sklearn_clone__(self) -> "PrecomputedKernel":
        return type(self)(self.train, self.test_train, self.test_diagonal)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrecomputedKernel) and self._ids() == other._ids()

    def __hash__(self) -> int:
        return hash(self._ids())

    def _ids(self) -> tuple[int, int, int]:
        return id(self.train), id(self.test_train), id(self.test_diagonal)

    def __call__(self, X: ArrayLike, Y: ArrayLike | None = None, eval_gradient: bool = False) -> Any:  # noqa: N803
        """Entries of rows ``X`` with rows ``Y``, by default ``X``: float64, shape (a, b). Raises as the class says.

        Parameters
        ----------
        X : (a, 1) array of row numbers
            Rows of the kernel.
        Y : (b, 1) array of row numbers
            Columns of the kernel; default the rows.
        eval_gradient
            Whether to return the gradient by hyperparameters, too: there are none, so that it has shape (a, b, 0).
        """
        rows = self._numbers(X)
        columns = rows if Y is None else self._numbers(Y)
        values, size = np.empty((rows.size, columns.size)), self._train.shape[0]
        for of_rows, of_columns in product((False, True), repeat=2):
            at = np.ix_((rows >= size) == of_rows, (columns >= size) == of_columns)
            if all(places.size for places in at):
                own, other = rows[at[0].ravel()] - size * of_rows, columns[at[1].ravel()] - size * of_columns
                if of_rows and of_columns:
                    values[at] = self._of_tests(own, other)
                elif of_columns:
                    values[at] = self._test_train[np.ix_(other, own)].T
                else:
                    values[at] = (self._test_train if of_rows else self._train)[np.ix_(own, other)]
        return (_finite(values), np.empty((*values.shape, 0))) if eval_gradient else _finite(values)

    def _of_tests(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> FloatArray:
        blocks = self._blocks()
        width = blocks.shape[1]
        if np.any(rows[:, None] // width != columns // width):
            raise ConfigError(
                f"{self!r} has no entries of test samples with each other, which stores do not keep; ask for "
                "return_std=True rather than return_cov=True, or compute a store that has them as train samples"
            )
        return np.asarray(blocks[rows[:, None] // width, rows[:, None] % width, columns % width])

    def _blocks(self) -> FloatArray:
        """S x S blocks of test samples, checked."""
        num_rows = 0 if self.test_train is None else self._test_train.shape[0]
        if self.test_diagonal is None:
            raise ConfigError(f"{self!r} has no test_diagonal, which variances of predictions need; give it")
        blocks = as_real("test_diagonal", self.test_diagonal)
        blocks = blocks.reshape(-1, 1, 1) if blocks.ndim == 1 else blocks
        if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or blocks.shape[0] * blocks.shape[1] != num_rows:
            raise ConfigError(
                f"test_diagonal has shape {np.shape(self.test_diagonal)}; needed ({num_rows},), or (samples, S, S) "
                f"blocks of {num_rows} test rows"
            )
        return blocks

    def diag(self, X: ArrayLike) -> FloatArray:  # noqa: N803
        """Each of rows ``X``, numbers (a, 1), with itself, (a,), by the diagonal tiles; raises as the class says."""
        rows, size = self._numbers(X), self._train.shape[0]
        values, trains = np.empty(rows.size), rows < size
        values[trains] = self._train[rows[trains], rows[trains]]
        if not np.all(trains):
            diagonal = np.diagonal(self._blocks(), axis1=1, axis2=2).ravel()
            values[~trains] = diagonal[rows[~trains] - size]
        return _finite(values)

    def is_stationary(self) -> bool:
        """Whether the kernel depends on differences of inputs alone: row numbers say nothing of that."""
        return False

    def _numbers(self, inputs: ArrayLike) -> NDArray[np.int64]:
        """Row numbers of inputs, (a,)."""
        given = np.asarray(inputs)
        limit = self._train.shape[0] + (0 if self.test_train is None else self._test_train.shape[0])
        if given.ndim != 2 or given.shape[1] != 1 or given.dtype.kind not in "iuf":
            raise ConfigError(
                f"inputs of shape {given.shape} and dtype {given.dtype}; needed row numbers as one column, such as "
                "train_rows"
            )
        numbers = given[:, 0]
        if not np.array_equal(numbers, np.floor(numbers)) or np.any(numbers < 0) or np.any(numbers >= limit):
            raise ConfigError(
                f"inputs from {numbers.min()} to {numbers.max()}; needed whole row numbers below {limit}, of {self!r}: "
                "inputs are not to be scaled or centred"
            )
        return numbers.astype(np.int64)
