"""Every solver and analysis is right whatever the units of kernel, ridge and targets are, or says which it takes."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
import zarr
from matrices import matrix_with_spectrum, power_law

import ntkpipe
from ntkpipe import KernelRegression, as_operator
from ntkpipe.base.errors import ConfigError, NonFiniteError, NtkpipeError
from ntkpipe.base.operator import Operator, Work
from ntkpipe.solvers.linear.preconditioner import nystrom, randomly_pivoted_cholesky

N = 24
POWERS = (-900, -700, -500, -300, -190, 0, 190, 300, 500, 700, 900)
INSIDE = {-190, 0, 190}
MATRIX = matrix_with_spectrum(power_law(N, condition=1e4, largest=1.0))
TARGETS = np.random.default_rng(0).standard_normal((N, 2))
RIDGE = 0.01


def regression(matrix, targets, ridge, **options):
    return KernelRegression(ridge=ridge, **options).fit(matrix, targets).dual_coef_


def posterior(matrix, targets, ridge):
    given = {
        "test_kernel": as_operator(matrix).columns([0, 1, 2]).T,
        "test_diagonal": as_operator(matrix).diagonal()[:3],
    }
    return ntkpipe.gaussian_process(matrix, targets, ridge=ridge, **given).mean


# Name → (the power of the matrix's scale and of the targets' scale that the result has, the call).
CALLS = {
    "eigsh": (1, 0, lambda k, y, r: ntkpipe.eigsh(k, 4).eigenvalues),
    "eigh": (1, 0, lambda k, y, r: ntkpipe.eigh(k).eigenvalues),
    "eigvalsh": (1, 0, lambda k, y, r: ntkpipe.eigvalsh(k).eigenvalues),
    "smallest": (1, 0, lambda k, y, r: ntkpipe.smallest(k).eigenvalues),
    "density": (1, 0, lambda k, y, r: ntkpipe.density(k).nodes),
    "cholesky": (-1, 1, lambda k, y, r: ntkpipe.cholesky(k, ridge=r).solve(y).coefficients),
    "inverse": (-1, 0, lambda k, y, r: ntkpipe.cholesky(k, ridge=r).inverse_diagonal()),
    "solve": (-1, 1, lambda k, y, r: ntkpipe.solve(k, y, ridge=r).coefficients),
    "pcg": (-1, 1, lambda k, y, r: ntkpipe.solve(k, y, ridge=r, method="pcg").coefficients),
    "block_cg": (-1, 1, lambda k, y, r: ntkpipe.solve(k, y, ridge=r, method="block_cg").coefficients),
    "solve_path": (-1, 1, lambda k, y, r: ntkpipe.solve_path(k, y, [r, 10 * r]).coefficients),
    "dynamics": (0, 1, lambda k, y, r: ntkpipe.dynamics(k, y, times=[1.0, 50.0]).residuals),
    "regression": (-1, 1, regression),
    "minimum norm": (-1, 1, lambda k, y, r: regression(k, y, r, method="eigh")),
    "ridge_path": (0, 0, lambda k, y, r: ntkpipe.ridge_path(k, y, ridges=[r]).effective_dimension),
    "alignment": (0, 0, lambda k, y, r: ntkpipe.alignment(k, y).centred_alignment),
    "spectrum": (0, 0, lambda k, y, r: ntkpipe.spectrum(k, ridges=[r]).effective_dimension),
    "generalisation": (0, 2, lambda k, y, r: ntkpipe.generalisation(k, y, ridges=[r]).kare),
    "learning_curve": (0, 2, lambda k, y, r: ntkpipe.learning_curve(k, y, sizes=[8, 16], ridges=[r]).left_out_loss),
    "train_loss": (0, 2, lambda k, y, r: ntkpipe.ridge_path(k, y, ridges=[r]).train_loss),
    "leave_one_out": (0, 2, lambda k, y, r: ntkpipe.ridge_path(k, y, ridges=[r]).leave_one_out_loss),
    "posterior": (0, 1, posterior),
    "data_fit": (-1, 2, lambda k, y, r: ntkpipe.gaussian_process(k, y, ridge=r).data_fit),
    "rpcholesky": (1, 0, lambda k, y, r: randomly_pivoted_cholesky(k, 5).values),
    "nystrom": (1, 0, lambda k, y, r: nystrom(k, 5).values),
}
LOGARITHMS = {
    "complexity": lambda k, y, r: -ntkpipe.gaussian_process(k, y, ridge=r).complexity,
    "logdet": lambda k, y, r: ntkpipe.logdet(k, ridge=r).value,
    "slq_logdet": lambda k, y, r: ntkpipe.slq_logdet(k, ridge=r).value,
}


def stored(matrix, tmp_path):
    array = zarr.create_array(tmp_path / "m.zarr", shape=matrix.shape, chunks=(8, 8), dtype=matrix.dtype)
    array[:] = matrix
    return array


def opened(matrix, kind, tmp_path):
    return matrix if kind == "array" else as_operator(stored(matrix, tmp_path))


def outcome(call, *arguments):
    """What a call returns, as an array, or the refusal; other errors and all warnings of numpy fail."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            return np.asarray(call(*arguments), np.float64)
        except ConfigError as refusal:
            found = refusal
    assert re.search(r"needed (zero or )?\S+ to \S+, since squares", str(found)), found
    return found


@pytest.mark.parametrize(
    ("power", "kind"),
    [*((power, "array") for power in POWERS), *((power, "tiles") for power in (-900, -190, 190, 500))],
)
@pytest.mark.parametrize("name", CALLS)
def test_units_of_the_kernel(name, power, kind, tmp_path):
    of_matrix, _, call = CALLS[name]
    scale = 2.0**power
    found = outcome(call, opened(MATRIX * scale, kind, tmp_path), TARGETS, min(max(RIDGE * scale, 2.0**-250), 2.0**250))
    if power not in INSIDE:
        assert isinstance(found, ConfigError)
        assert "entries of the matrix" in str(found)
        return
    wanted = outcome(call, MATRIX, TARGETS, RIDGE)
    np.testing.assert_allclose(found * scale**-of_matrix, wanted, rtol=1e-7, atol=1e-9 * np.abs(wanted).max())


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", LOGARITHMS)
def test_log_determinants(name, power):
    scale, call = 2.0**power, LOGARITHMS[name]
    found = outcome(call, MATRIX * scale, TARGETS, min(max(RIDGE * scale, 2.0**-250), 2.0**250))
    if power not in INSIDE:
        assert isinstance(found, ConfigError)
        return
    assert found - N * power * math.log(2.0) == pytest.approx(outcome(call, MATRIX, TARGETS, RIDGE), rel=1e-9)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("name", [name for name, (_, of_targets, _) in CALLS.items() if of_targets])
def test_units_of_targets(name, power):
    call = CALLS[name][-1]
    found, wanted = outcome(call, MATRIX, TARGETS * 2.0**power, RIDGE), outcome(call, MATRIX, TARGETS, RIDGE)
    if not isinstance(found, ConfigError):
        found = found * 2.0 ** (-power * CALLS[name][1] / 2) * 2.0 ** (-power * CALLS[name][1] / 2)
        np.testing.assert_array_equal(found, wanted)
    else:
        assert power not in INSIDE


@pytest.mark.parametrize("ridge", [1e-300, 1e-200, 1e-70, 1e70, 1e200, 1e300])
@pytest.mark.parametrize("name", [*CALLS, *LOGARITHMS])
def test_ridges(name, ridge):
    call = LOGARITHMS.get(name) or CALLS[name][-1]
    found = outcome(call, MATRIX, TARGETS, ridge)
    if isinstance(found, ConfigError):
        assert not 1e-77 < ridge < 1e77
        assert "ridge" in str(found)
    elif name in {"solve", "pcg", "block_cg", "cholesky", "regression", "minimum norm"}:
        wanted = TARGETS / ridge if ridge > 1 else np.linalg.solve(MATRIX, TARGETS)
        np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(("kind", "place"), [("array", (2, 20)), ("tiles", (3, 3)), ("tiles", (2, 20))])
@pytest.mark.parametrize("entry", [1e-200, -1e200, 1e308])
@pytest.mark.parametrize("name", [*CALLS, *LOGARITHMS])
def test_one_entry(name, entry, place, kind, tmp_path):
    """One far too large is refused, one that is far too small beside the others is nothing."""
    matrix = MATRIX.copy()
    matrix[place] = matrix[place[::-1]] = entry
    call = LOGARITHMS.get(name) or CALLS[name][-1]
    if abs(entry) > 1:
        found = outcome(call, opened(matrix, kind, tmp_path), TARGETS, 1.0)
        assert isinstance(found, ConfigError)
        assert "entries of the matrix" in str(found)
        return
    zero = np.where(matrix == entry, 0.0, matrix)
    wanted = outcome(call, opened(zero, kind, tmp_path / "zero"), TARGETS, 1.0) if name not in NEED_DEFINITE else None
    if wanted is not None:
        found = outcome(call, opened(matrix, kind, tmp_path), TARGETS, 1.0)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9 * np.abs(wanted).max())


NEED_DEFINITE = {"smallest", "dynamics", "ridge_path", "spectrum", "generalisation", "nystrom", "density"}


@pytest.mark.parametrize("power", [-900, -300, 300, 900])
def test_what_the_error_advises_works(power, tmp_path):
    matrix, scale = MATRIX * 2.0**power, 2.0**power
    for given in (matrix, stored(matrix, tmp_path)):
        with pytest.raises(ConfigError) as caught:
            ntkpipe.solve(given, TARGETS, ridge=0.0)
        factor = eval(re.search(r"scaled\((2\.0\*\*-?\d+)\)", str(caught.value))[1])
        operator = as_operator(given).scaled(factor)
        found = ntkpipe.solve(operator, TARGETS, ridge=RIDGE * scale * factor).coefficients * factor
        wanted = np.linalg.solve(MATRIX + RIDGE * np.eye(N), TARGETS)
        np.testing.assert_allclose(found * scale, wanted, rtol=1e-4, atol=1e-6)
        values = ntkpipe.eigh(operator).eigenvalues / factor
        np.testing.assert_allclose(values / scale, np.linalg.eigvalsh(MATRIX)[::-1], rtol=1e-9)


@pytest.mark.parametrize("kind", ["array", "tiles"])
@pytest.mark.parametrize("power", POWERS)
def test_frobenius_norms_of_all_sizes(power, kind, tmp_path):
    operator = as_operator(opened(MATRIX * 2.0**power, kind, tmp_path))
    plain = as_operator(opened(MATRIX, kind, tmp_path / "plain"))
    views = (
        lambda k, s: k,
        lambda k, s: k.shifted(0.5 * s),
        lambda k, s: k.scaled(-3.0),
        lambda k, s: k.centred(),
        lambda k, s: k.kronecker(2),
    )
    for view in views:
        found, wanted = view(operator, 2.0**power), view(plain, 1.0)
        assert found.frobenius() * 2.0**-power == pytest.approx(wanted.frobenius(), rel=1e-12)
        assert found.storage_floor() * 2.0**-power == pytest.approx(wanted.storage_floor(), rel=1e-12)
        assert found.trace() * 2.0**-power == pytest.approx(wanted.trace(), rel=1e-12)


def test_float32_is_always_inside_and_costs_no_pass(tmp_path):
    for scale in (1e-30, 1.0, 1e30):
        operator = as_operator(stored((MATRIX * scale).astype(np.float32), tmp_path / str(scale)))
        operator.require_range()
        operator.shifted(1.0).require_range()
        operator.scaled(2.0).require_range()
        assert operator.work.passes == 0.0
        ntkpipe.eigvalsh(operator)


def test_zero_matrices_are_inside():
    as_operator(np.zeros((3, 3))).require_range()
    assert not ntkpipe.eigvalsh(np.zeros((3, 3))).eigenvalues.any()


def test_nothing_but_errors_of_ours(tmp_path):
    """Largest and smallest numbers that there are."""
    for entry in (5e-324, 1.7e308):
        for name, call in {**{name: call for name, (_, _, call) in CALLS.items()}, **LOGARITHMS}.items():
            with pytest.raises(NtkpipeError):
                raise outcome(call, np.diag(np.full(5, entry)), TARGETS[:5], RIDGE)
            assert name


TEST_KERNEL, DIAGONAL = MATRIX[:3], MATRIX.diagonal()[:3]
POSTERIOR = ntkpipe.gaussian_process(MATRIX, TARGETS, ridge=0.1, test_kernel=TEST_KERNEL, test_diagonal=DIAGONAL)
# Other numbers than kernels, ridges and targets: name → (power of their scale that the result has, the call).
BESIDE = {
    "initial": (0, lambda s: ntkpipe.solve(MATRIX, TARGETS, ridge=0.1, method="pcg", initial=s * TARGETS).coefficients),
    "outputs": (
        0,
        lambda s: ntkpipe.dynamics(MATRIX, TARGETS, times=[1.0], initial_outputs=0 * TARGETS + s).losses / s,
    ),
    "times": (0, lambda s: ntkpipe.dynamics(MATRIX, TARGETS, times=[s], learning_rate=1.0).losses * 0.0),
    "rates": (0, lambda s: ntkpipe.dynamics(MATRIX, TARGETS, times=[1.0], learning_rate=s).losses * 0.0),
    "test kernel": (
        1,
        lambda s: (
            ntkpipe.gaussian_process(
                MATRIX, TARGETS, ridge=0.1, test_kernel=s * TEST_KERNEL, test_diagonal=DIAGONAL
            ).mean
        ),
    ),
    "test diagonal": (
        0,
        lambda s: (
            ntkpipe.gaussian_process(
                MATRIX, TARGETS, ridge=0.1, test_kernel=TEST_KERNEL, test_diagonal=s * DIAGONAL
            ).mean
        ),
    ),
    "predictions": (1, lambda s: KernelRegression(ridge=0.1).fit(MATRIX, TARGETS).predict(s * TEST_KERNEL)),
    "influence": (1, lambda s: ntkpipe.influence(TARGETS, s * TEST_KERNEL).top_terms),
    "held out": (
        0,
        lambda s: (
            ntkpipe.ridge_path(
                MATRIX, TARGETS, ridges=[0.1], test_kernel=s * TEST_KERNEL, test_targets=TARGETS[:3]
            ).leave_one_out_loss
        ),
    ),
    "compared": (0, lambda s: ntkpipe.compare_kernels(MATRIX, s * MATRIX).alignment),
    "aligned": (0, lambda s: ntkpipe.compare_kernels(s * MATRIX, MATRIX).centred_alignment),
    "tol of pcg": (0, lambda s: ntkpipe.solve(MATRIX, TARGETS, ridge=1.0, method="pcg", tol=min(s, 1e-6)).coefficients),
    "tol of slq": (0, lambda s: ntkpipe.slq_logdet(MATRIX, ridge=1.0, tol=min(s, 0.1)).standard_error),
}


@pytest.mark.parametrize("power", [-1000, -700, -500, -300, -190, 190, 300, 500, 700, 1000])
@pytest.mark.parametrize("name", BESIDE)
def test_what_goes_beside_a_kernel(name, power):
    """Right, or refused in words that name it; nothing overflows inside."""
    of_scale, call = BESIDE[name]
    scale = 2.0**power
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            found = np.asarray(call(scale), np.float64)
        except ConfigError as refusal:
            assert abs(power) > 200
            assert re.search(r"; needed (at most )?\S+", str(refusal)), refusal  # noqa: PT017
            return
        wanted = np.asarray(call(1.0), np.float64)
    if name == "outputs":  # far from the targets, these do not matter
        wanted = found if power > 0 or power < -20 else wanted
        assert np.isfinite(found).all()
    np.testing.assert_allclose(found * 2.0 ** (-of_scale * power), wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.uint8, bool, np.longdouble, ">f8", ">f4"])
def test_matrices_of_every_real_dtype(dtype):
    matrix = np.round(np.abs(MATRIX) * 200 + 5 * np.eye(N)).astype(dtype)
    exact = matrix.astype(np.float64)
    np.testing.assert_allclose(ntkpipe.eigvalsh(matrix).eigenvalues, np.linalg.eigvalsh(exact)[::-1], atol=1e-10)
    found = ntkpipe.solve(matrix, TARGETS, ridge=300.0, tol=1e-10).coefficients
    np.testing.assert_allclose(found, np.linalg.solve(exact + 300.0 * np.eye(N), TARGETS), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("sizes", [(1e-30, 1.0), (1.0, 1e28), (1e-28, 1e28), (1e-90, 1.0), (1e-200, 1.0)])
def test_rows_of_very_different_size(sizes):
    """D K D: the factor of a definite matrix does not care for its scaling."""
    scale = np.ones(N)
    scale[0], scale[-1] = sizes
    definite = MATRIX + 0.1 * np.eye(N)
    matrix = scale[:, None] * definite * scale
    top = np.abs(matrix).max()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        factor = ntkpipe.cholesky(matrix) if min(sizes) > 1e-150 else ntkpipe.cholesky(matrix, ridge=0.1)
        leading = ntkpipe.eigsh(matrix, 1).eigenvalues[0]
    assert leading == pytest.approx(np.linalg.eigvalsh(matrix / top)[-1] * top, rel=1e-9)
    if min(sizes) > 1e-150:
        wanted = np.linalg.slogdet(definite)[1] + 2 * np.log(scale).sum()
        assert factor.logdet == pytest.approx(wanted, rel=1e-9)


def test_columns_of_very_different_size():
    sizes = np.array([1e-70, 1e70])
    exact = np.linalg.solve(MATRIX + 0.1 * np.eye(N), TARGETS)
    for method in ("cholesky", "pcg", "block_cg", "eigh"):
        found = ntkpipe.solve(MATRIX, TARGETS * sizes, ridge=0.1, method=method, tol=1e-10).coefficients / sizes
        np.testing.assert_allclose(found, exact, rtol=1e-7, atol=1e-8 * np.abs(exact).max())


@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18, 1e30])
def test_models_whose_kernels_leave_float32(factor):
    """Entries are the square of the scale: refused where they overflow, exact where float64 is asked for."""
    model = torch.nn.Linear(3, 1, bias=False).eval()
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = (inputs * factor).float().double()
    found = ntkpipe.kernel_matrix(model, given.float(), compute_dtype="float64")
    np.testing.assert_allclose(
        found / factor**2, ((given / factor) @ (given / factor).T).numpy(), rtol=1e-12, atol=1e-12
    )
    if factor > 1e20:
        with pytest.raises(NtkpipeError):
            ntkpipe.kernel_matrix(model, given.float())


@pytest.mark.parametrize("power", [-1074, -1050, -600, 600, 1000])
def test_the_factor_that_is_advised_can_be_given(power):
    """Also where 2.0 to the power that a matrix lacks is beyond float64, and where its products are denormal."""
    matrix = np.ldexp(np.eye(3), power)
    with pytest.raises(ConfigError, match=r"2\.0\*\*") as caught:
        ntkpipe.eigh(matrix)
    factor = 2.0 ** int(re.search(r"2\.0\*\*(-?\d+)", str(caught.value))[1])
    is_view = "scaled(" in str(caught.value)
    found = ntkpipe.eigh(as_operator(matrix).scaled(factor) if is_view else matrix * factor)
    np.testing.assert_allclose(found.eigenvalues / factor, 2.0**power if power > -1074 else 5e-324, rtol=1e-14)


@pytest.mark.parametrize("norm", [0.0, 0.1, -1.0])
def test_a_norm_that_an_operator_cannot_have(norm):
    class Own(Operator):
        work = Work()

        def identity(self):
            return "own"

        def _multiply(self, block):
            return MATRIX @ block

        def frobenius(self):
            return norm

    with pytest.raises(ConfigError, match="whose diagonal alone has"):
        ntkpipe.alignment(Own(N, np.dtype(np.float64)), TARGETS)


def test_coefficients_whose_squares_leave_the_range():
    with pytest.raises(ConfigError, match=r"coefficients of up to 1e\+200"):
        ntkpipe.influence(np.full((N, 2), 1e200), MATRIX[:3], is_classification=False)
    with pytest.raises(NonFiniteError, match="coefficients hold"):
        ntkpipe.influence(np.full(N, np.nan), MATRIX[:3])
