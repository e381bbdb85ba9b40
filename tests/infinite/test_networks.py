"""Kernels against the values of other software in `tests/reference`, and against what is known in closed form."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ntkpipe
from ntkpipe.base.errors import ConfigError, DataError, NtkpipeError
from ntkpipe.infinite import Activation, Conv, Dense, Flatten, FullyConnected, LayerNorm, Residual, Sequential

REFERENCE = Path(__file__).parents[1] / "reference"
INPUTS = np.load(REFERENCE / "inputs.npz")
CASES = json.loads((REFERENCE / "cases.json").read_text())
DENSE = np.load(REFERENCE / "fully_connected.npz")
OTHERS = np.load(REFERENCE / "others.npz")
SCIKIT = np.load(REFERENCE / "scikit_ntk.npz")
NAMES = {"leaky_relu_0.1": "leaky_relu:0.1", "linear": "identity"}
KINKED = ("relu", "leaky_relu_0.1", "abs")
INTEGRATED = ("tanh", "sigmoid", "softplus", "silu")  # by neural-tangents with 350² points
ROOT2 = 2.0**0.5


def fully_connected(case):
    return FullyConnected(
        len(case["widths"]),
        NAMES.get(case["activation"], case["activation"]),
        case["W_std"],
        case["b_std"],
        first_layer="sum" if "first_layer" in case else "mean",
        parametrisation=case["parametrisation"],
        widths=case["widths"],
    )


def distance(net, found, expected, rows, columns=None):
    """The differences relative to √(K_ii K_jj)."""
    own = [np.sqrt(np.array(net.diagonal(net.prepare(each)))) for each in (rows, rows if columns is None else columns)]
    return np.abs(found - expected) / (own[0][:, :, None] * own[1][:, None, :])


def are_parallel(rows, columns):
    """Pairs whose angle is known to half of the digits where it is zero or π; a sample with itself, too."""
    left, right = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (rows, columns))
    return np.abs(left @ right.T) > 1.0 - 1e-12


def allowed(case, net, rows, columns):
    tolerance = np.full((len(rows), len(columns)), 2e-9 if case["activation"] in INTEGRATED else 1e-10)
    if case["activation"] in KINKED:
        tolerance[are_parallel(rows, columns)] = 1e-7
    if case["activation"] == "sin":  # e^(s − p) − e^(−s − p) cancels where variances are small
        p, q = (net.diagonal(net.prepare(each))[0] for each in (rows, columns))
        tolerance = np.maximum(tolerance, 8 * 2.0**-52 / np.sqrt(np.multiply.outer(p, q)))
    return tolerance


@pytest.mark.parametrize("name", CASES["fully_connected"])
def test_fully_connected_networks_are_those_of_neural_tangents(name):
    case = CASES["fully_connected"][name]
    net, rows = fully_connected(case), INPUTS[case["inputs"]]
    found = ntkpipe.infinite_kernel_matrix(net, rows)
    assert (distance(net, found, DENSE[name], rows) <= allowed(case, net, rows, rows)).all()
    assert np.array_equal(found, found.swapaxes(1, 2))
    assert np.array_equal(np.diagonal(found, axis1=1, axis2=2), net.diagonal(net.prepare(rows)))
    if case["cross"]:
        columns = INPUTS[case["cross"]]
        found, expected = ntkpipe.infinite_kernel_matrix(net, rows, columns), DENSE[f"{name}/cross"]
        assert (distance(net, found, expected, rows, columns) <= allowed(case, net, rows, columns)).all()


def dense(width=None):
    return Dense(ROOT2, 0.1, width=width)


def test_residual_networks_are_those_of_neural_tangents():
    block = Residual(Activation("relu"), dense())
    net = Sequential([dense(), block, block, block, Activation("relu"), dense()])
    for key, columns in (("residual/dense", None), ("residual/dense/cross", INPUTS["other"])):
        rows = INPUTS["normal"]
        error = distance(net, ntkpipe.infinite_kernel_matrix(net, rows, columns), OTHERS[key], rows, columns)
        parallel = are_parallel(rows, rows if columns is None else columns)
        assert (error <= np.where(parallel, 1e-7, 1e-10)).all()


def test_layer_norms_are_those_of_neural_tangents():
    block = [dense(), LayerNorm(1e-12), Activation("relu")]
    net, rows = Sequential([*block, *block, dense()]), INPUTS["digits_train"]
    error = distance(net, ntkpipe.infinite_kernel_matrix(net, rows), OTHERS["layer_norm/dense"], rows)
    assert error.max() <= 1e-10


@pytest.mark.parametrize("key", SCIKIT)
def test_the_preset_is_scikit_ntk(key):
    inputs, depth, bias = re.match(r"(\w+)/depth_(\d)/bias_([\d.]+)", key).groups()
    net = FullyConnected.scikit_ntk(int(depth), float(bias))
    rows = INPUTS[inputs][: 6 if inputs == "normal" else 8]
    rows, columns = (rows[:3], rows[3:]) if key.endswith("cross") else (rows, rows)
    error = distance(net, ntkpipe.infinite_kernel_matrix(net, rows, columns), SCIKIT[key], rows, columns)[1]
    # scikit-ntk takes the angle of a sample with itself from a rounded cosine.
    assert (error <= np.where(are_parallel(rows, columns), 1e-7, 1e-10)).all()


@pytest.mark.parametrize("hidden", [1, 2, 5, 50])
def test_relu_without_biases_has_a_known_diagonal(hidden):
    """Θ(x, x) = (h + 1) / 2^h · |x|² / n₀ · W^(2h + 2), and no entry is above it."""
    x, weight = INPUTS["normal"][:6], 1.3
    found = ntkpipe.infinite_kernel_matrix(FullyConnected(hidden, "relu", weight), x)
    norms = np.sum(x * x, axis=1) / 8.0
    np.testing.assert_allclose(found[0].diagonal(), norms * weight ** (2 * hidden + 2) / 2.0**hidden, rtol=1e-13)
    np.testing.assert_allclose(found[1].diagonal(), (hidden + 1) * found[0].diagonal(), rtol=1e-13)
    assert np.linalg.eigvalsh(found[1])[0] >= -1e-14 * np.trace(found[1])


NETS = [
    FullyConnected.jacot(2, 0.3),
    FullyConnected.lee(3),
    FullyConnected.arora(2),
    FullyConnected.scikit_ntk(2, 0.5),
    FullyConnected(2, "gelu", (1.0, 1.4, 0.7), (0.1, None, 0.5), parametrisation="standard", widths=(32, 8)),
    FullyConnected(2, "tanh", 1.2, 0.3, bias_init=0.4, trained={0, 2}),
    Sequential([Dense(1.2, 0.2), LayerNorm(1e-3), Residual(Activation("sin"), Dense(0.7, 0.1)), Activation("cos")]),
]


@pytest.mark.parametrize("net", NETS, ids=range(len(NETS)))
def test_the_slow_path_agrees(net):
    rows = net.prepare(INPUTS["normal"][:4])
    found = net.tile(rows, rows)
    for i, j in ((0, 0), (0, 1), (2, 3)):
        expected = net.slow(INPUTS["normal"][i], INPUTS["normal"][j])
        sizes = [np.sqrt(each[i, i] * each[j, j]) for each in found]
        assert abs(found[0][i, j] - expected[0]) <= 1e-12 * sizes[0]
        assert abs(found[1][i, j] - expected[1]) <= 1e-12 * sizes[1]


@pytest.mark.parametrize("net", NETS, ids=range(len(NETS)))
def test_rotated_samples_have_the_same_kernels(net):
    x = INPUTS["normal"][:5]
    turned = x @ np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    found, expected = (ntkpipe.infinite_kernel_matrix(net, each) for each in (turned, x))
    sizes = np.sqrt(np.diagonal(expected, axis1=1, axis2=2))
    away = ~np.eye(5, dtype=bool)
    assert (np.abs(found - expected) <= 1e-12 * sizes[:, :, None] * sizes[:, None])[:, away].all()


def test_the_standard_parametrisation_is_the_other_one_by_groups_of_parameters():
    """A layer's weights count n / W² times, its biases 1 / b²."""
    widths, weight, bias, x = (16, 4), 1.4, 0.3, INPUTS["normal"][:5]
    standard = FullyConnected(2, "erf", weight, bias, parametrisation="standard", widths=widths)
    total = 0.0
    for at, fan_in in enumerate((8, *widths)):
        # Of weights alone: all of the layer's, without its biases, which start at the same values.
        both = FullyConnected(2, "erf", weight, bias, trained={at})
        no_bias = ntkpipe.infinite_kernel_matrix(both, x)[1]
        biases = ntkpipe.infinite_kernel_matrix(_only_biases(both, at), x)[1]
        total = total + (no_bias - biases) * fan_in / weight**2 + biases / bias**2
    np.testing.assert_allclose(ntkpipe.infinite_kernel_matrix(standard, x)[1], total, rtol=1e-12)


def _only_biases(net, at):
    """The network whose Θ is that of the biases of one layer."""
    layers = list(net.layers)
    dense = layers[2 * at]
    layers[2 * at] = _Biases(dense.W_std, dense.b_std, dense.bias_init)
    return Sequential(layers)


class _Biases(Dense):
    """A dense layer whose weights are not trained."""

    def apply(self, state, left, right):
        trained = Dense(self.W_std, self.b_std, self.bias_init, trained=False)
        trained.apply(state, left, right)
        state.theta += self.b_std**2


def test_equal_options_make_equal_networks():
    one, other = (
        FullyConnected(2, "relu", weights, None, trained=trained)
        for weights, trained in (([1, 1, 1], {1}), ((1.0,) * 3, [1]))
    )
    assert one == other
    assert hash(one) == hash(other)
    assert one.canonical() == Sequential(one.layers).canonical() != FullyConnected(2, "relu").canonical()
    assert json.loads(json.dumps(one.canonical())) == one.canonical()
    named = Activation((np.tanh, lambda x: 1 - np.tanh(x) ** 2), name="mine")
    assert "mine" in json.dumps(FullyConnected(1, named).canonical())
    with pytest.raises(ConfigError, match="without a name"):
        FullyConnected(1, (np.tanh, lambda x: 1 - np.tanh(x) ** 2)).canonical()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "rleu"}, "did you mean 'relu'"),
        ({"activation": "relu:0.1"}, "leaky_relu:0.1"),
        ({"activation": "leaky_relu:x"}, "leaky_relu:0.1"),
        ({"activation": "leaky_relu:1e300"}, "leaky_relu:0.1"),
        ({"activation": "ReLU"}, "did you mean 'relu'"),
        ({"activation": np.tanh}, r"functions \(f, df\)"),
        ({"hidden": 0}, "hidden=0"),
        ({"hidden": 2, "W_std": (1.0, 1.0)}, "2 of W_std; needed 3"),
        ({"hidden": 2, "b_std": (0.1,)}, "1 of b_std; needed 3"),
        ({"W_std": 0.0}, "needed a positive number"),
        ({"W_std": -1.0}, "W_std=-1.0"),
        ({"W_std": "1"}, "W_std='1'"),
        ({"W_std": float("nan")}, "W_std=nan"),
        ({"b_std": 1j}, "b_std"),
        ({"parametrisation": "standard"}, "needs widths="),
        ({"parametrisation": "mup"}, "'ntk' or 'standard'"),
        ({"hidden": 2, "widths": (5,)}, "1 of widths; needed 2"),
        ({"first_layer": "max"}, "'mean' or 'sum'"),
        ({"trained": {2}}, "numbers from 0 to 1"),
        ({"trained": "first"}, "trained='first'"),
    ],
)
def test_options_that_are_wrong_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        FullyConnected(**options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Activation("tanh", kinks=(1.0,)), "whose kinks are known"),
        (lambda: Activation((np.abs, np.sign), kinks=(np.nan,)), "a kink=nan"),
        (lambda: Activation("tanh", tolerance=1e-20), "from 1e-14"),
        (lambda: Sequential(Dense()), "at least one layer"),
        (lambda: Sequential([Dense(), Residual()]), "at least one layer"),
    ],
)
def test_layers_that_are_wrong_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_the_standard_parametrisation_needs_widths():
    net = Sequential([Dense(), Activation("relu"), Dense(parametrisation="standard")])
    with pytest.raises(ConfigError, match=r"layer 3 \(Dense\).*needs width="):
        ntkpipe.infinite_kernel_matrix(net, np.ones((1, 2)))
    with pytest.raises(ConfigError, match="needed a network"):
        ntkpipe.infinite_kernel_matrix(Sequential, np.ones((1, 2)))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.ones(3), "needed .n, features."),
        (np.ones((0, 3)), "needed .n, features."),
        (np.ones((2, 1, 4, 4)), "ends with pixels"),
        (np.array([[1.0], [np.nan]]), "sample 1 holds NaN"),
        (np.ones((2, 2)) * 1j, "real numbers"),
        (np.array([["a"]]), "real numbers"),
        ([[1.0], [1.0, 2.0]], "x: a list that NumPy does not take"),
    ],
)
def test_samples_that_are_wrong_are_refused(x, words):
    with pytest.raises((ConfigError, DataError), match=words):
        ntkpipe.infinite_kernel_matrix(FullyConnected(), x)


def test_samples_of_other_sizes_are_refused():
    with pytest.raises(DataError, match=r"\(3,\) and \(2,\)"):
        ntkpipe.infinite_kernel_matrix(FullyConnected(), np.ones((2, 3)), np.ones((2, 2)))


def test_overflow_names_the_layer_and_the_sample():
    x = np.ones((3, 2))
    x[2] = 1e10
    with pytest.raises(ConfigError, match=r"layer 29 of 61 \(Dense\): the covariance of sample 2"):
        ntkpipe.infinite_kernel_matrix(FullyConnected(30, "relu", 1e10), x)


def test_undeclared_kinks_are_refused_with_the_layer():
    net = FullyConnected(2, (np.abs, np.sign))
    with pytest.raises(ConfigError, match=r"layer 2 \(Activation\).*kinks=\(0.0,\)"):
        ntkpipe.infinite_kernel_matrix(net, INPUTS["normal"])


def test_what_does_not_fit_the_memory_is_refused():
    with pytest.raises(ntkpipe.NtkpipeError, match="use compute_infinite_kernel"):
        ntkpipe.infinite_kernel_matrix(FullyConnected(), np.ones((300_000, 1)))


def test_samples_of_integers_and_of_zeros_are_samples():
    x = np.array([[0, 0], [1, 2]])
    for bias in (None, 0.5):
        found = ntkpipe.infinite_kernel_matrix(FullyConnected(2, "relu", 1.0, bias), x)
        assert np.isfinite(found).all()
        assert np.array_equal(
            found, ntkpipe.infinite_kernel_matrix(FullyConnected(2, "relu", 1.0, bias), x.astype(float))
        )
        assert (found[:, 0] == 0.0).all() == (bias is None)


def test_layers_are_made_from_their_options_as_files_have_them() -> None:
    inner = [{"layer": "Activation", "function": "relu"}, {"layer": "Dense"}]
    made = Sequential([{"layer": "Dense", "W_std": 1.4}, {"layer": "Residual", "inner": inner}])
    assert made == Sequential([Dense(1.4), Residual(Activation("relu"), Dense())])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sequential([{"layer": "Dens"}]), "the nearest is 'Dense'"),
        (lambda: Sequential([{"layer": "Dense", "inner": []}]), "has no option 'inner'"),
        (lambda: Sequential(Dense()), "needed at least one layer"),
        (lambda: Residual(), "needed at least one"),
        (lambda: Activation("leaky_relu:inf"), "with its slope"),
        (lambda: Sequential([Conv(padding=10**9), Flatten(), Dense()]).prepare(np.ones((1, 1, 4, 4))), "at most 7"),
        (lambda: Sequential([Activation((lambda u: 1 / 0, np.cos), name="f")]).prepare(np.ones((1, 2))), "Zero"),
        (lambda: ntkpipe.infinite_kernel_matrix(object(), np.ones((1, 2))), "net is object"),
    ],
)
def test_wrong_layers_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(NtkpipeError, match=words):
        make()
