"""Which training points a prediction is made of: f(x) = Σ_i K(x, x_i) α_i, term by term."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.arrays import FloatArray, require_bounded
from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.given import as_real
from ntkpipe.base.tables import TableRows
from ntkpipe.learning.regression.sources import CrossKernel, initial_matrix
from ntkpipe.solvers.result import OfTargets, recorded

_SHOWN = 5
_OF_FIT = ("targets", "classes", "is_binary")


@dataclass(frozen=True, kw_only=True)
class Influence(OfTargets):
    """Terms of predictions. M test samples, N train samples, k of these for each of those.

    A term is ``K(x, x_i) α_i`` in the output that is looked at: of classes the predicted one, of a single output that.
    Of several real outputs it is the Euclidean norm over all of them, which has no sign.
    """

    # Number of the predicted class, or column of the output, whose terms are taken, shape (M,); -1 if all outputs are
    predicted: NDArray[np.int64] = field(repr=False)
    top_samples: NDArray[np.int64] = field(repr=False)  # train samples of the largest terms, descending, shape (M, k)
    top_terms: FloatArray = field(repr=False)  # these terms, shape (M, k)
    top_share: float  # share that the k have of the sizes of all terms, the mean over test samples
    mean_size: FloatArray = field(repr=False)  # mean size of each train sample's terms over test samples, shape (N,)
    most_influential: NDArray[np.int64]  # train samples of the largest of these, descending, shape (k,)

    def _rows(self) -> TableRows:
        shown = self.most_influential[:_SHOWN]
        named = ", ".join(f"{sample} ({self.mean_size[sample]:.3g})" for sample in shown)
        count, most = self.top_samples.shape
        return [
            ("most influential", f"train samples {named}, by mean size of their terms"),
            ("concentration", f"the {most} largest of {len(self.mean_size):,} terms are {self.top_share:.1%} of all"),
            ("test samples", f"{count:,}"),
        ]


@recorded()
def influence(
    model: Any,
    test_kernel: Any,
    *,
    top: int = 10,
    is_classification: bool | None = None,
    width: int | None = None,
    test_initial_outputs: ArrayLike | None = None,
) -> Influence:
    """The terms α_i K(x, x_i) that predictions are sums of, the largest of each test sample, and over all.

    They are the representer values of Yeh, Kim, Yen, Ravikumar 2018, arXiv 1811.09720, for kernel ridge regression. A
    term says what a prediction is made of, not what it would be without the sample: that is leave-one-out, see
    :func:`ntkpipe.ridge_path`. Memory is a few copies of 16 MiB of the kernel, ``16 M k`` and ``8 N`` bytes.

    Parameters
    ----------
    model
        A fitted :class:`ntkpipe.KernelRegression`; or coefficients A, (n,) or (n, O).
    test_kernel
        Test × train kernel, (M·S, N·S), array or stored; or a store. Read once, a few rows at a time.
    top
        Number k of train samples for each test sample.
    is_classification
        For coefficients: whether the largest output is the one that is looked at. Default yes, if there are several.
    width
        For coefficients: rows a sample, S. Default 1; O of a full NTK.
    test_initial_outputs
        Outputs f₀ of the test samples (M, O), where they decide which output is the largest.
    """
    coefficients, rows_a_sample, by_class = _taken_apart(model, is_classification, width)
    fit: OfTargets | None = getattr(model, "result_", None)
    known: dict[str, Any] = {} if fit is None else {name: getattr(fit, name) for name in _OF_FIT}
    task = {} if fit is None else {"task": fit.options.get("task", "auto")}
    cross = CrossKernel(test_kernel, len(coefficients), rows_a_sample)
    num_train = len(coefficients) // rows_a_sample
    most = min(int(check_number("top", top, low=1)), num_train)
    outputs = coefficients.shape[1] if rows_a_sample == 1 else rows_a_sample
    offset = np.zeros((cross.num_samples, outputs))
    if test_initial_outputs is not None:
        offset = initial_matrix(test_initial_outputs, offset.shape)
    predicted = np.empty(cross.num_samples, np.int64)
    top_samples = np.empty((cross.num_samples, most), np.int64)
    top_terms = np.empty((cross.num_samples, most))
    sums, shares = np.zeros(num_train), 0.0
    for samples, block in cross.sample_blocks():
        terms, predicted[samples] = _terms(block, coefficients, rows_a_sample, by_class, offset[samples])
        if known.get("is_binary"):
            predicted[samples] = terms.sum(axis=1) + offset[samples, 0] > 0
        sizes = np.abs(terms)
        order = np.argsort(-sizes, axis=1, kind="stable")[:, :most]
        top_samples[samples] = order
        top_terms[samples] = np.take_along_axis(terms, order, axis=1)
        totals = sizes.sum(axis=1)
        largest = np.take_along_axis(sizes, order, axis=1).sum(axis=1)
        shares += float(np.divide(largest, totals, out=np.zeros_like(totals), where=totals > 0).sum())
        sums += sizes.sum(axis=0)
    mean_size = sums / cross.num_samples
    message = f"all {num_train:,} terms of {cross.num_samples:,} predictions"
    if fit is not None and not fit.is_converged:
        message += f", of a model that is not what was asked for: {fit.message}"
    return Influence(
        status="converged" if fit is None else fit.status,
        message=message,
        options={**task, "is_classification": by_class, "width": rows_a_sample},
        matrix=cross.identity,
        predicted=predicted,
        top_samples=top_samples,
        top_terms=top_terms,
        top_share=shares / cross.num_samples,
        mean_size=mean_size,
        most_influential=np.argsort(-mean_size, kind="stable")[:most],
        **known,
    )


def _taken_apart(model: Any, is_classification: bool | None, width: int | None) -> tuple[FloatArray, int, bool]:
    """Coefficients with two axes, rows a sample, whether the largest output counts."""
    if hasattr(model, "fit"):
        if not hasattr(model, "dual_coef_"):
            raise ConfigError(f"{model!r} is not fitted yet; call fit(kernel, y) first")
        if is_classification is not None or width is not None:
            raise ConfigError("is_classification and width are options of coefficients; a fitted model knows them")
        coefficients = model.dual_coef_
        rows, by_class = model.rows_per_sample_, hasattr(model, "classes_")
    else:
        coefficients = as_real("coefficients", model).astype(np.float64, copy=False)
        rows = 1 if width is None else int(check_number("width", width, low=1))
        several = rows > 1 or (coefficients.ndim == 2 and coefficients.shape[1] > 1)
        by_class = several if is_classification is None else is_classification
    count = len(coefficients) if coefficients.ndim in {1, 2} and coefficients.size else 0
    if not count or count % rows or (rows > 1 and coefficients.size != count):
        raise ConfigError(f"coefficients of shape {coefficients.shape} for {rows} rows a sample")
    return require_bounded("coefficients", coefficients).reshape(count, -1), rows, by_class


def _terms(
    block: FloatArray, coefficients: FloatArray, width: int, by_class: bool, offset: FloatArray
) -> tuple[FloatArray, NDArray[np.int64]]:
    """Terms of each test and train sample, and the output that they are of; see :class:`Influence`."""
    if width == 1:
        outputs = block @ coefficients
    else:
        # (m, O, N): what each train sample adds to each output.
        products = (block * coefficients[:, 0]).reshape(len(block), -1, width)
        parts = products.sum(axis=2).reshape(-1, width, len(coefficients) // width)
        outputs = parts.sum(axis=2)
    if by_class:
        column = np.asarray((outputs + offset).argmax(axis=1), np.int64)
        return (block * coefficients.T[column] if width == 1 else parts[np.arange(len(parts)), column]), column
    column = np.full(len(outputs), 0 if outputs.shape[1] == 1 else -1, np.int64)
    if width > 1:
        return np.linalg.norm(parts, axis=1), column
    if coefficients.shape[1] == 1:
        return block * coefficients.T, column
    return np.abs(block) * np.linalg.norm(coefficients, axis=1), column
