"""Test kernels, their diagonals, targets and coefficients are the same in every hand, and what is none is named."""

import numpy as np
import pytest
from holders import HOLDERS, REFUSED
from matrices import matrix_with_spectrum, power_law

import ntkpipe
from ntkpipe.base.errors import ConfigError, NonFiniteError, NtkpipeError, TileError
from ntkpipe.base.operator import Operator
from ntkpipe.operators.opening import as_operator

N, M, RIDGE = 26, 9, 0.1
RNG = np.random.default_rng(0)
K = matrix_with_spectrum(power_law(N, condition=1e3, largest=10.0))
CROSS = RNG.standard_normal((M, N)) / N**0.5
DIAGONAL = np.full(M, 50.0) + np.arange(M)
Y = RNG.standard_normal(N)
INVERSE = np.linalg.inv(K + RIDGE * np.eye(N))
COEFFICIENTS = INVERSE @ Y
MEAN = CROSS @ COEFFICIENTS
VARIANCE = DIAGONAL - np.einsum("mn,nk,mk->m", CROSS, INVERSE, CROSS)
MODEL = ntkpipe.KernelRegression(RIDGE, task="regression", tol=1e-13).fit(K, Y)
EXACT = {"ridge": RIDGE, "task": "regression", "tol": 1e-13}
OPERATOR: Operator = as_operator(K)
FLOW = ntkpipe.dynamics(K + RIDGE * np.eye(N), Y, times=[np.inf], tol=1e-13)


def process(cross, diagonal):
    return ntkpipe.gaussian_process(K, Y, ridge=RIDGE, test_kernel=cross, test_diagonal=diagonal, task="regression")


# What is given, how, and what comes out by brute force.
DOORS = {
    "predict": (CROSS, MODEL.predict, MEAN),
    "mean of a process": (CROSS, lambda held: process(held, DIAGONAL).mean[:, 0], MEAN),
    "variance of a process": (CROSS, lambda held: process(held, DIAGONAL).variance[:, 0], VARIANCE),
    "diagonal": (DIAGONAL, lambda held: process(CROSS, held).variance[:, 0], VARIANCE),
    "influence": (CROSS, lambda held: ntkpipe.influence(MODEL, held, top=N).top_terms.sum(axis=1), MEAN),
    "coefficients": (
        COEFFICIENTS,
        lambda held: ntkpipe.influence(held, CROSS, top=N).top_terms.sum(axis=1),
        MEAN,
    ),
    "flow": (CROSS, lambda held: FLOW.predict(held)[0], MEAN),
    "solve": (Y, lambda held: ntkpipe.solve(K, held, **EXACT).coefficients, COEFFICIENTS),
    "fit": (
        Y,
        lambda held: ntkpipe.KernelRegression(**EXACT).fit(K, held).dual_coef_,
        COEFFICIENTS,
    ),
    "initial outputs": (
        Y / 2,
        lambda held: (
            ntkpipe.KernelRegression(**EXACT, centre="initial_outputs").fit(K, Y, initial_outputs=held).dual_coef_
        ),
        COEFFICIENTS / 2,
    ),
    "initial outputs of a flow": (
        Y / 2,
        lambda held: ntkpipe.dynamics(K, Y, times=[0.0], initial_outputs=held, tol=1e-13).residuals[0],
        -Y / 2,
    ),
    "factor": (Y, lambda held: ntkpipe.cholesky(K, ridge=RIDGE).solve(held).coefficients, COEFFICIENTS),
    "product": (Y, lambda held: OPERATOR @ held, K @ Y),
    "scikit-learn's kernel": (
        CROSS,
        lambda held: ntkpipe.PrecomputedKernel(K, held)([[N], [N + 1]], [[3]]).ravel(),
        None,
    ),
}


@pytest.mark.parametrize("hold", HOLDERS)
@pytest.mark.parametrize("door", DOORS)
def test_results_are_those_of_the_array(door, hold):
    values, result, wanted = DOORS[door]
    wanted = CROSS[:2, 3] if wanted is None else wanted
    np.testing.assert_allclose(result(HOLDERS[hold](values)), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_array_is_named(door, what):
    values, result, _ = DOORS[door]
    make, words = REFUSED[what]
    if (door, what) == ("initial outputs of a flow", "None"):
        pytest.skip("none is the default")
    if what == "None":  # which is nothing given, where that is allowed
        words = f"{words}|needed both or none|inputs from|and no initial"
    with pytest.raises(NtkpipeError, match=words) as caught:
        result(make(values))
    assert isinstance(caught.value, ConfigError | TileError)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_seen(door, bad):
    values, result, _ = DOORS[door]
    wrong = values.copy()
    wrong.reshape(-1)[3] = bad
    for hold in ("list", "zarr", "memory map", "tensor"):
        with pytest.raises(NonFiniteError):
            result(HOLDERS[hold](wrong))


@pytest.mark.parametrize("door", ["predict", "mean of a process", "influence", "flow", "scikit-learn's kernel"])
@pytest.mark.parametrize("shape", ["train × test", "one row", "number", "one column less", "three axes", "empty"])
def test_test_kernels_of_another_shape(door, shape):
    values = {
        "train × test": CROSS.T,
        "one row": CROSS[0],
        "number": 1.0,
        "one column less": CROSS[:, :-1],
        "three axes": CROSS[None],
        "empty": CROSS[:, :0],
    }[shape]
    with pytest.raises(ConfigError, match=r"of shape|needed") as caught:
        DOORS[door][1](values)
    if shape == "train × test" and door in ("predict", "mean of a process", "influence"):
        assert "transpose" in str(caught.value)


@pytest.mark.parametrize("values", [np.diag(DIAGONAL), DIAGONAL[:-1], K.diagonal(), DIAGONAL[:, None], 50.0])
def test_diagonals_of_other_samples(values):
    with pytest.raises(ConfigError, match=r"test_diagonal of shape .*needed \(9, 1, 1\)"):
        process(CROSS, values)


@pytest.mark.parametrize("hold", ["masked", "path", "complex", "chunks not written", "group of zarr"])
def test_the_kernels_of_comparisons_and_curves(hold):
    make, words = REFUSED[hold]
    tests = {"test_targets": MEAN, "task": "regression"}
    for result in (
        lambda: ntkpipe.generalisation(K, Y, test_kernel=make(CROSS), **tests),
        lambda: ntkpipe.ridge_path(K, Y, test_kernel=make(CROSS), **tests),
        lambda: ntkpipe.compare_kernels(K, K, targets=Y, test_kernels=(make(CROSS), CROSS), ridge=RIDGE, **tests),
        lambda: ntkpipe.generalisation(K, make(Y), task="regression"),
        lambda: ntkpipe.alignment(K, make(Y), task="regression"),
        lambda: ntkpipe.dynamics(K, make(Y), times=[1.0]),
    ):
        with pytest.raises(NtkpipeError, match=words):
            result()


def test_masks_of_labels_are_no_class():
    labels = np.ma.array(np.arange(N) % 3, mask=np.arange(N) == 5)
    with pytest.raises(ConfigError, match="targets: 1 entries are masked"):
        ntkpipe.KernelRegression(RIDGE).fit(K, labels)
    whole = ntkpipe.KernelRegression(RIDGE).fit(K, np.ma.array(labels.data))
    np.testing.assert_array_equal(whole.classes_, [0, 1, 2])


def test_a_row_of_a_test_kernel_is_one_sample():
    matrix = np.eye(5)
    fitted = ntkpipe.KernelRegression(1.0, task="regression").fit(matrix, np.arange(5.0))
    with pytest.raises(ConfigError, match=r"of one test sample give kernel\[None\]"):
        fitted.predict(matrix[2])
    np.testing.assert_allclose(fitted.predict(matrix[2][None]), [1.0], atol=1e-12)
    with pytest.raises(ConfigError, match="train × test") as caught:
        fitted.predict(matrix[:, :3])
    assert "[None]" not in str(caught.value)
