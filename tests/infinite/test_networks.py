"""Kernels against the values of other software in `tests/reference`, and against what is known in closed form."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import ntkpipe
from ntkpipe.infinite import Activation, Dense, FullyConnected, LayerNorm, Residual, Sequential

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
