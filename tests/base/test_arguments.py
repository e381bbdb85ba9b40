"""Arguments are checked by their annotations, numpy's scalars as Python's."""

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ntkpipe
from ntkpipe.base.arguments import _types_of, is_list, members_of, options_of
from ntkpipe.base.config import Budget, RunSpec, parse
from ntkpipe.base.errors import ArgumentError, ConfigError, ResourceError

K = np.diag(np.arange(1.0, 7.0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ridge": "1"}, r"solve\(\): ridge='1'; needed a number"),
        ({"method": np.float64}, "method=<class 'numpy.float64'>; needed 'auto'"),
        ({"method": np.zeros((9, 9, 9))}, r"method=\[\[\[0.0, .{100,200} …; needed 'auto'"),
        ({"max_passes": 2.5}, "max_passes=2.5; needed an integer or None"),
        ({"seed": -1}, "seed=-1; needed an integer from 0 on"),
        ({"seed": True}, "seed=True; needed an integer"),
        ({"method": "cg"}, "method='cg'; needed 'auto', 'eigh', 'cholesky', 'pcg' or 'block_cg'"),
        ({"memory_limit": "much"}, "memory_limit='much'; needed a number of bytes"),
    ],
)
def test_wrong_values_say_what_is_needed(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ntkpipe.solve(K, np.ones(6), **options)


def test_wrong_names_and_missing_arguments_are_errors_of_ours() -> None:
    with pytest.raises(ArgumentError, match=r"solve\(\) has no argument 'rigde'; the nearest is 'ridge'"):
        ntkpipe.solve(K, np.ones(6), rigde=1.0)  # type: ignore[call-arg]
    with pytest.raises(ArgumentError, match=r"solve\(\): missing a required argument: 'rhs'"):
        ntkpipe.solve(K)  # type: ignore[call-arg]
    with pytest.raises(ArgumentError, match=r"KernelRegression\(\) has no argument 'rigde'; the nearest is 'ridge'"):
        ntkpipe.KernelRegression(rigde=1.0)  # type: ignore[call-arg]


def test_numbers_of_numpy_are_numbers() -> None:
    plain = ntkpipe.solve(K, np.ones(6), ridge=0.5, max_passes=50)
    found = ntkpipe.solve(K, np.ones(6), ridge=np.float32(0.5), max_passes=np.int64(50))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.coefficients, plain.coefficients)
    assert found.options["max_passes"] == 50
    assert type(found.options["ridge"]) is float
    times = ntkpipe.dynamics(K, np.ones(6), times=range(1, 3))
    assert times.options["times"] == [1, 2]


N = 6
TARGETS = np.arange(1.0, 7.0) / 2
POSTERIOR = ntkpipe.gaussian_process(K, TARGETS, ridge=0.1, test_kernel=K[:3], test_diagonal=np.diag(K)[:3])
MODEL, INPUTS = torch.nn.Linear(3, 1).eval(), torch.ones(N, 3)
# Public function → what a call has at least.
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "alignment": ((K, TARGETS), {}),
    "compare_kernels": ((K, K), {}),
    "learning_curve": ((K, TARGETS), {"sizes": [2, 4], "ridges": [0.1]}),
    "generalisation": ((K, TARGETS), {"ridges": [0.1]}),
    "spectrum": ((K,), {"ridges": [0.1]}),
    "dynamics": ((K, TARGETS), {"times": [1.0]}),
    "calibration": ((POSTERIOR, TARGETS[:3]), {}),
    "gaussian_process": ((K, TARGETS), {"ridge": 0.1}),
    "influence": ((TARGETS, K[:3]), {}),
    "ridge_path": ((K, TARGETS), {"ridges": [0.1]}),
    "as_operator": ((K,), {}),
    "cholesky": ((K,), {}),
    "eigh": ((K,), {}),
    "eigvalsh": ((K,), {}),
    "solve": ((K, TARGETS), {"ridge": 0.1}),
    "solve_path": ((K, TARGETS), {"ridges": [0.1]}),
    "density": ((K,), {}),
    "eigsh": ((K,), {"k": 2}),
    "logdet": ((K,), {}),
    "slq_logdet": ((K,), {"ridge": 0.1}),
    "smallest": ((K,), {}),
    "KernelRegression": ((), {}),
    "kernel_matrix": ((MODEL, INPUTS), {}),
    "jacobian_operator": ((MODEL, INPUTS), {}),
    "plan_kernel": ((MODEL, INPUTS), {"store": "nowhere.zarr"}),
    "compute_kernel": ((MODEL, INPUTS), {"store": "nowhere.zarr"}),
    "repair": (("nowhere.zarr",), {}),
    "run_step": (("nowhere.zarr", "eigvalsh"), {}),
    "write_report": (("nowhere.zarr", "nowhere.html"), {}),
}
WRONG = ["x", b"1", True, 1j, float("nan"), -1, -0.5, -(10**400), {"a": 1}, [[1.0]], set(), np.bool_(True), np.nan]
WRONG += [np.complex128(1), np.array(["x"]), torch.tensor(float("nan")), Path("8GiB"), np.datetime64("2020-01-01")]
OF_NUMBERS: list[Any] = [float("inf"), [1.0], (2,), np.ones(2), torch.ones(2), range(3)]
OF_COUNTS: list[Any] = [0, 0.5, 2.0, np.float64(3), 2**31, 10**400]
OF_LISTS: list[Any] = [["x"], [None], [True], [float("nan")], [-1], 1.0]
OF_BYTES: list[Any] = [0, 0.5, float("inf"), "lots", "-1", "nan", "0 B", "8 apples", 2**70, "1e30", [8], object()]


def number_options() -> list[tuple[str, str, set[Any]]]:
    """(function, option, types) of all that are numbers or lists of them."""
    found = []
    for name in CALLS:
        function = getattr(ntkpipe, name)
        for option in options_of(function.__init__ if isinstance(function, type) else function).values():
            types = _types_of(option.annotation)
            if types & {int, float}:
                lists = {"list"} if any(map(is_list, members_of(option.annotation))) else set()
                found.append((name, option.name, types | lists))
    return found


def called(name: str, **options: Any) -> Any:
    args, given = CALLS[name]
    names = list(inspect.signature(getattr(ntkpipe, name)).parameters)[: len(args)]
    found = getattr(ntkpipe, name)(**dict(zip(names, args, strict=True)) | given | options)
    return found.fit(K, TARGETS).result_ if name == "KernelRegression" else found


@pytest.mark.parametrize(
    ("name", "option", "types"), number_options(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_numbers_of_the_wrong_type_or_size_are_refused_at_once(
    name: str, option: str, types: set[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = list(WRONG)
    if option == "memory_limit":
        wrong = [each for each in WRONG if each != "x"] + OF_BYTES
    elif "list" in types:
        wrong += OF_LISTS
    elif float in types:
        wrong += OF_NUMBERS
    else:
        wrong += [*OF_NUMBERS, *OF_COUNTS] if option != "seed" else OF_NUMBERS
    for value in wrong:
        if isinstance(value, str) and str in types and option != "memory_limit":
            continue
        with pytest.raises(ConfigError, match=option):
            called(name, **{option: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value",
    [10**9, 1e9, "1e9", "1000000000", "1GB", "1 gb", " 1 GB ", np.int64(10**9), np.array(1e9), torch.tensor(1e9)],
)
def test_bytes_are_read_alike_everywhere(value: Any) -> None:
    assert Budget.of(value).limit == 10**9
    assert parse(RunSpec, {"memory_limit": value}, source="run").memory_limit == 10**9
    assert ntkpipe.eigvalsh(K, memory_limit=value).options["memory_limit"] == 10**9
    assert ntkpipe.solve(K, TARGETS, memory_limit=value).options["memory_limit"] == 10**9
    assert ntkpipe.ClusterSpec(workers=1, memory_limit=value).memory_limit == 10**9


@pytest.mark.parametrize("value", ["lots", 0, -1, float("nan"), True, b"1GB", Path("1GB"), [1]])
def test_what_are_no_bytes_is_refused_in_the_same_words(value: Any) -> None:
    words = re.escape("; needed a number of bytes, or text such as 8GiB")
    for call in (
        lambda: ntkpipe.eigvalsh(K, memory_limit=value),
        lambda: ntkpipe.kernel_matrix(MODEL, INPUTS, memory_limit=value),
        lambda: ntkpipe.as_operator(K, memory_limit=value),
        lambda: called("KernelRegression", memory_limit=value),
        lambda: parse(RunSpec, {"memory_limit": value}, source="run"),
    ):
        with pytest.raises(ConfigError, match=f"memory_limit=.*{words}"):
            call()


@pytest.mark.parametrize("make", [np.float32, np.float64, np.array, torch.tensor, lambda value: np.float16(value)])
def test_numbers_of_other_libraries_are_numbers(make: Any) -> None:
    assert ntkpipe.cholesky(K, ridge=make(0.5)).ridge == 0.5
    assert ntkpipe.solve_path(K, TARGETS, [make(0.5), make(2.0)]).ridges.tolist() == [0.5, 2.0]
    assert ntkpipe.dynamics(K, TARGETS, times=[make(0.5)], learning_rate=make(0.25)).times.tolist() == [0.5]
    assert len(ntkpipe.eigsh(K, make(2).astype(int) if hasattr(make(2), "astype") else make(2)).eigenvalues) == 2


@pytest.mark.parametrize("ridges", [np.array([0.5, 2.0], np.float32), torch.tensor([0.5, 2.0]), (0.5, 2), range(1, 3)])
def test_lists_of_other_libraries_are_lists(ridges: Any) -> None:
    assert ntkpipe.solve_path(K, TARGETS, ridges).ridges.tolist() == [float(one) for one in ridges]


@pytest.mark.parametrize(
    "call",
    [
        lambda limit: ntkpipe.eigsh(K, 2, memory_limit=limit),
        lambda limit: ntkpipe.eigh(K, memory_limit=limit),
        lambda limit: ntkpipe.eigvalsh(K, memory_limit=limit),
        lambda limit: ntkpipe.cholesky(K, memory_limit=limit),
        lambda limit: ntkpipe.logdet(K, memory_limit=limit),
        lambda limit: ntkpipe.solve(K, TARGETS, memory_limit=limit, method="pcg"),
        lambda limit: ntkpipe.density(K, memory_limit=limit),
        lambda limit: ntkpipe.dynamics(K, TARGETS, times=[1.0], memory_limit=limit),
        lambda limit: ntkpipe.kernel_matrix(MODEL, INPUTS, memory_limit=limit),
    ],
)
def test_a_process_above_its_limit_is_told_so_in_the_same_words(call: Any) -> None:
    with pytest.raises(
        ResourceError, match=r"this process alone has \S+ MiB, and memory_limit=1.0 MiB counts all"
    ) as error:
        call("1MiB")
    assert "-" not in re.sub(r"memory_limit|[a-z]-[a-z]", "", str(error.value).split(";")[0])
