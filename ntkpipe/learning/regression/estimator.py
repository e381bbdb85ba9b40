"""Kernel ridge regression with a kernel that is there already, by scikit-learn's conventions."""

import inspect
import warnings
from dataclasses import replace
from time import perf_counter
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.arguments import check_options, known_names, options_of, require_known
from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import Budget, MemoryLimit, RidgeScale, absolute_ridge
from ntkpipe.base.errors import ConfigError, NotConvergedWarning
from ntkpipe.base.targets import Targets, Task, encode_test
from ntkpipe.learning.regression.sources import CrossKernel, initial_matrix, outputs_of, targets_of, train_targets
from ntkpipe.operators.opening import open_for_solver
from ntkpipe.solvers.inverse.passes import least_bytes
from ntkpipe.solvers.inverse.solve import solve
from ntkpipe.solvers.inverse.systems import SolveMethod
from ntkpipe.store.kernel_store import KernelSet

FitMethod = SolveMethod
Centre = Literal["initial_outputs"] | None


class KernelRegression:
    """Kernel ridge regression: ``A = (K + λI)^-1 (Y - f₀)``, and ``f(x) = f₀(x) + K(x, X) A``.

    As :class:`sklearn.kernel_ridge.KernelRidge` with ``kernel="precomputed"``, whose ``alpha`` is λ, for kernels as
    arrays, as stored kernels that need not fit in memory, and as operators; ``clone``, ``cross_val_score`` and
    ``GridSearchCV`` of scikit-learn take it. (Saunders, Gammerman, Vovk 1998, Ridge regression learning algorithm in
    dual variables, ICML.)

    A pNTK and every other kernel of one row a sample acts on all outputs alike: ``K ⊗ I_O`` is never formed. A full NTK
    has rows ``sample · O + output``, and is known by having O times as many rows as there are targets.

    Parameters
    ----------
    ridge
        λ ≥ 0, which is added to the diagonal. Zero is interpolation, and where K is singular the Moore–Penrose
        (minimum-norm least-squares) solution, of eigenvalues above a cut-off that the result names, see
        :func:`ntkpipe.solvers.inverse.exact.cut_off`.
    ridge_scale
        Unit of the ridge. None is absolute, ``"mean_diagonal"`` the mean of the diagonal.
    method
        How the system is solved, as by :func:`ntkpipe.solve`. ``auto`` takes all eigenpairs for λ = 0 where K is
        singular and they fit memory, else conjugate gradients. These find a solution of a singular system, if there is
        one, but not that of smallest norm; predictions are the same where test rows are in the range of K.
    tol
        Largest relative true residual of a column that is called converged.
    centre
        Whether outputs at initialisation f₀ are subtracted from targets and added to predictions: initial_outputs, or
        none. So does a network in its linear regime that is trained from there (Lee et al. 2019, arXiv 1902.06720).
    task
        What targets are. ``auto``: integers, booleans and strings (N,) are labels, whose classes become one-hot
        columns; others are real targets. ``"classification"``: labels, also as floats, or one-hot columns, whose
        classes are their numbers. ``"binary"``: labels of two classes that share a column of ±1. ``"regression"``:
        numbers, also integers. Targets of test samples are taken for the same.
    memory_limit
        Bytes that this process may have; default what it has and half of what is free. It decides which method fits;
        conjugate gradients take a tenth of a float32 kernel, or 6 kB a row if that is less, in any case.
    seed
        Seed of preconditioners.

    Attributes
    ----------
    dual_coef_
        Coefficients A, float64: (n,) or (n, O), with as many axes as ``y``; (N·O,) for a full NTK.
    ridge_
        λ, absolute.
    classes_
        Labels in the order of output columns; missing for real targets.
    result_
        The :class:`ntkpipe.solvers.inverse.systems.Solution`, with status, residuals, cost; prints as a table.
    targets_
        What the targets were taken for, in words.
    num_outputs_
        Number of columns of the targets.
    rows_per_sample_
        Rows of the kernel for each sample: 1, or the number of outputs of a full NTK.

    Examples
    --------
    >>> kernel = np.array([[2.0, 1.0, 0.5], [1.0, 3.0, 0.0], [0.5, 0.0, 1.5]])
    >>> model = KernelRegression(ridge=0.1, task="regression").fit(kernel, [1.0, 2.0, 0.5])
    >>> model.predict(kernel[:1]).round(3)
    array([0.988])
    """

    @known_names
    def __init__(
        self,
        ridge: float = 0.0,
        *,
        ridge_scale: RidgeScale = None,
        method: FitMethod = "auto",
        tol: float = 1e-6,
        centre: Centre = None,
        task: Task = "auto",
        memory_limit: MemoryLimit = None,
        seed: int = 0,
    ) -> None:
        self.ridge = ridge
        self.ridge_scale = ridge_scale
        self.method = method
        self.tol = tol
        self.centre = centre
        self.task = task
        self.memory_limit = memory_limit
        self.seed = seed

    def fit(self, kernel: Any, y: ArrayLike | None = None, *, initial_outputs: ArrayLike | None = None) -> Self:
        """Find the coefficients.

        Parameters
        ----------
        kernel
            Train × train kernel: a symmetric array (N·S, N·S), a stored kernel such as ``store.train``, or an operator.
            Or a store, or a group or output of one, which brings its targets and outputs.
        y
            Labels of classes (N,), or real targets (N,) or (N, O).
        initial_outputs
            f₀ of the train samples, (N, O), for ``centre="initial_outputs"``.

        Raises
        ------
        ConfigError, NonFiniteError
            If shapes do not fit, an option is out of range, or there are no targets; if something is NaN or infinite.
        IndefiniteError, ResourceError
            If ``method="cholesky"`` meets a pivot that is not positive; if the method does not fit memory.
        TileError
            If a tile is missing or damaged; the message names it.

        Warns
        -----
        NotConvergedWarning
            If the solution is not what was asked for; ``result_`` says in what respect.
        """
        if isinstance(kernel, KernelSet):
            y = targets_of(kernel, "train") if y is None else y
            if self.centre is not None and initial_outputs is None:
                initial_outputs = outputs_of(kernel, "train")
            kernel = kernel.train
        if y is None:
            raise ConfigError("no targets; needed fit(kernel, y), or fit(store) of a store that has targets")
        begin = perf_counter()
        limit = Budget.of(self.memory_limit)
        given = self.get_params() | {"memory_limit": limit.limit}
        options = check_options(options_of(type(self).__init__), given, "KernelRegression()")
        initial = self._initial(initial_outputs, "initial_outputs of the train samples, fit(…, initial_outputs=)")
        operator, budget = open_for_solver(kernel, limit)
        try:
            before = operator.work
            train = train_targets(operator, y, initial, self.task)
            self.ridge_ = absolute_ridge(self.ridge, self.ridge_scale, operator.diagonal)
            how: dict[str, Any] = {"method": self.method, "tol": self.tol, "seed": self.seed}
            # Fewer vectors than these would be no use.
            enough = budget.at_least(least_bytes(operator.num_rows))
            found = solve(operator, train.rhs, ridge=self.ridge_, task="regression", memory_limit=enough, **how)
            options |= {**found.options, "ridge": self.ridge_, "task": self.task}
            work = operator.work - before
        finally:
            if operator is not kernel:
                operator.close()
        said: dict[str, Any] = {"options": options, **train.targets.fields}
        self.result_ = replace(found, work=work, seconds=perf_counter() - begin, **said)
        self._targets, self.rows_per_sample_ = train.targets, train.width
        coefficients = np.asarray(self.result_.coefficients)
        self.dual_coef_ = coefficients[:, 0] if self._targets.is_flat or train.width > 1 else coefficients
        self.num_outputs_, self.targets_ = self._targets.matrix.shape[1], self._targets.words
        if self._targets.classes is not None:
            self.classes_ = self._targets.classes
        elif hasattr(self, "classes_"):
            del self.classes_
        if not self.result_.is_converged:
            warnings.warn(f"{self.result_.status}: {self.result_.message}", NotConvergedWarning, stacklevel=2)
        return self

    def _initial(self, given: Any | None, what: str) -> Any | None:
        if (self.centre is None) != (given is None):
            found = "no" if given is None else "given"
            raise ConfigError(f"centre={self.centre!r} and {found} {what}; needed both or none")
        return given

    def predict_outputs(self, test_kernel: Any, *, initial_outputs: ArrayLike | None = None) -> FloatArray:
        """Real predictions ``f₀ + K_test A``, shape (M, O), whatever the targets were.

        Parameters
        ----------
        test_kernel
            Test × train kernel, (M·S, N·S): an array, a stored kernel such as ``store.test_train``, of which a tile is
            in memory at a time; or the store.
        initial_outputs
            f₀ of the test samples, (M, O), for ``centre="initial_outputs"``.

        Raises
        ------
        ConfigError, NonFiniteError
            If shapes do not fit or nothing is fitted yet; if the kernel holds NaN or infinity.
        TileError
            If a tile is missing or damaged; the message names it.
        """
        if not hasattr(self, "dual_coef_"):
            raise ConfigError("this KernelRegression is not fitted yet; call fit(kernel, y) first")
        if isinstance(test_kernel, KernelSet) and self.centre is not None and initial_outputs is None:
            initial_outputs = outputs_of(test_kernel, "test")
        initial = self._initial(initial_outputs, "initial_outputs of the test samples, predict(…, initial_outputs=)")
        coefficients = self.dual_coef_.reshape(len(self.dual_coef_), -1)
        predicted = CrossKernel(test_kernel, len(coefficients), self.rows_per_sample_).outputs(coefficients)
        if initial is not None:
            predicted += initial_matrix(initial, predicted.shape)
        return predicted

    def predict(self, test_kernel: Any, *, initial_outputs: ArrayLike | None = None) -> NDArray[Any]:
        """Labels of the largest outputs (M,), or real predictions, (M,) or (M, O) as ``y`` was.

        Parameters and errors are those of :meth:`predict_outputs`.
        """
        outputs = self.predict_outputs(test_kernel, initial_outputs=initial_outputs)
        if hasattr(self, "classes_"):
            return np.asarray(self.classes_[self._targets.predicted(outputs)])
        return outputs[:, 0] if self._targets.is_flat else outputs

    def decision_function(self, test_kernel: Any, *, initial_outputs: ArrayLike | None = None) -> FloatArray:
        """Outputs of classes, (M, O); of two classes (M,), positive for the second, as scikit-learn.

        Parameters and errors are those of :meth:`predict_outputs`.

        Raises
        ------
        AttributeError
            If targets were no labels.
        """
        if not hasattr(self, "classes_"):
            raise AttributeError("decision_function is of labels of classes; predict gives real predictions")
        outputs = self.predict_outputs(test_kernel, initial_outputs=initial_outputs)
        if self._targets.is_binary:
            return outputs[:, 0]
        return outputs[:, 1] - outputs[:, 0] if len(self.classes_) == 2 else outputs

    def score(self, test_kernel: Any, y: ArrayLike | None = None, *, initial_outputs: ArrayLike | None = None) -> float:
        """Accuracy for classes; for real targets R², the mean over outputs, like ``sklearn.metrics.r2_score``.

        Parameters
        ----------
        test_kernel
            Test × train kernel, or a store, as for :meth:`predict_outputs`.
        y
            Labels or targets of the test samples. Default those of a store.
        initial_outputs
            Outputs f₀ of the test samples, (M, O), for ``centre="initial_outputs"``.

        Raises
        ------
        ConfigError
            If shapes do not fit, or there are no targets.

        Warns
        -----
        UserWarning
            If test samples are of a class that training does not have, which counts as wrong.
        """
        if y is None:
            if not isinstance(test_kernel, KernelSet):
                raise ConfigError("no targets; needed score(test_kernel, y), or score(store)")
            y = targets_of(test_kernel, "test")
        outputs = self.predict_outputs(test_kernel, initial_outputs=initial_outputs)
        wanted = encode_test(y, self._targets)
        if wanted.matrix.shape != outputs.shape:
            raise ConfigError(f"targets of shape {np.shape(y)} for predictions of shape {outputs.shape}")
        if wanted.note:
            warnings.warn(wanted.note.removeprefix("; "), stacklevel=2)
        accuracy = wanted.accuracy(outputs)
        return _r_squared(outputs, wanted) if accuracy is None else accuracy

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Options by name, as scikit-learn asks for them.

        Parameters
        ----------
        deep
            Without meaning: no option is an estimator.
        """
        del deep
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> Self:
        """Change options.

        Raises
        ------
        ArgumentError
            If there is none of that name.
        """
        require_known(params, self.get_params(), type(self).__name__, "option")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        shown = (f"{name}={value!r}" for name, value in self.get_params().items() if value != defaults[name].default)
        return f"{type(self).__name__}({', '.join(shown)})"

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn asks of estimators: rows and columns of the kernel are cut together."""
        from sklearn.utils import ClassifierTags, InputTags, RegressorTags, Tags, TargetTags  # only it asks

        is_classifier, is_regressor = self.task in {"classification", "binary"}, self.task == "regression"
        return Tags(
            estimator_type="classifier" if is_classifier else "regressor" if is_regressor else None,
            target_tags=TargetTags(required=True, multi_output=True),
            classifier_tags=ClassifierTags() if is_classifier else None,
            regressor_tags=RegressorTags() if is_regressor else None,
            input_tags=InputTags(pairwise=True),
        )


def _r_squared(outputs: FloatArray, wanted: Targets) -> float:
    """The mean over outputs of 1 - SS_res / SS_tot; where targets are constant 1 if they are met, and 0 if not."""
    residual = np.sum((wanted.matrix - outputs) ** 2, axis=0)
    total = np.sum((wanted.matrix - wanted.matrix.mean(axis=0)) ** 2, axis=0)
    constant = total == 0.0
    ratios = np.divide(residual, total, out=(residual > 0.0).astype(np.float64), where=~constant)
    return float(np.mean(1.0 - ratios))
