"""Every name of the registry is a function, a command, a step, a saved result and a row of the guide."""

import html
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from regressions import make_store

import ntkpipe
from ntkpipe.app.commands import StepCommand
from ntkpipe.app.workflow import _check_step
from ntkpipe.base.config import StepSpec
from ntkpipe.base.errors import ArgumentError, ConfigError
from ntkpipe.solvers.result import Result
from ntkpipe.steps.inputs import help_of_step, options_of_step
from ntkpipe.steps.registry import REGISTRY, Entry, read_result
from ntkpipe.steps.run import run_step

GUIDE = Path(__file__).parents[2] / "notebooks" / "GUIDE.md"
RIDGES = {"ridges": [0.5, 2.0]}
# Options of steps, beside the defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "eigsh": {"k": 4},
    "density": {"num_probes": 4, "num_steps": 6},
    "logdet": {"ridge": 0.5},
    "slq_logdet": {"ridge": 0.5},
    "solve": {"ridge": 0.5, "method": "pcg"},
    "solve_path": {**RIDGES, "method": "pcg", "rank": 8},
    "dynamics": {"times": [0.0, 3.0]},
    "spectrum": RIDGES,
    "regression": RIDGES,
    "generalisation": RIDGES,
    "learning_curve": {"sizes": [8], **RIDGES},
    "gaussian_process": {"ridge": 0.5, "ridge_scale": None},
    "calibration": {"ridge": 0.5, "ridge_scale": None},
    "influence": {"ridge": 0.5, "ridge_scale": None, "top": 3},
}


def by_function(name: str, store: ntkpipe.KernelStore, other: Path) -> Result:
    """The same by the public function, every argument written out."""
    options = OPTIONS.get(name, {})
    kernel, targets = store.train, store.targets
    test = {"test_kernel": store.test_train, "test_targets": store.test_targets}
    if name in {"eigsh", "eigh", "eigvalsh", "smallest", "density", "logdet", "slq_logdet", "spectrum"}:
        return getattr(ntkpipe, name)(kernel, **options)
    if name in {"solve", "solve_path", "dynamics", "alignment", "learning_curve"}:
        return getattr(ntkpipe, name)(kernel, targets, **options)
    if name in {"regression", "generalisation"}:
        function = ntkpipe.ridge_path if name == "regression" else ntkpipe.generalisation
        return function(kernel, targets, **test, **options)
    if name in {"gaussian_process", "calibration"}:
        diagonal = store.test_diagonal
        found = ntkpipe.gaussian_process(
            kernel, targets, ridge=0.5, test_kernel=store.test_train, test_diagonal=diagonal
        )
        return (
            found if name == "gaussian_process" else ntkpipe.calibration(found, store.test_targets, scale="likelihood")
        )
    if name == "influence":
        return ntkpipe.influence(ntkpipe.KernelRegression(0.5).fit(kernel, targets), store.test_train, top=3)
    assert name == "compare"
    return ntkpipe.compare_kernels(store, ntkpipe.open_kernel(other))


def same(found: Any, expected: Any) -> bool:
    """Equal to rounding, but for what a result says of its cost; NaN equals NaN."""
    if isinstance(found, np.ndarray):
        return np.allclose(found, expected, rtol=1e-6, atol=1e-9, equal_nan=True)
    if isinstance(found, float):
        return bool(np.isclose(found, expected, rtol=1e-6, atol=1e-9, equal_nan=True))
    if isinstance(found, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def numbers(result: Result) -> dict[str, Any]:
    left_out = {"work", "seconds", "options", "matrix", "message", "why", "history", "preconditioner_work"}
    return {name: value for name, value in {**result.to_json(), **result.arrays()}.items() if name not in left_out}


def signs_removed(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: np.abs(value) if name == "eigenvectors" and value is not None else value for name, value in values.items()
    }


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("registry")
    first = Path(make_store(folder / "a.zarr").path)
    return first, Path(make_store(folder / "b.zarr", kind="trace").path)


@pytest.fixture
def stores(computed: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A store without results, and another kernel of the same samples."""
    return Path(shutil.copytree(computed[0], tmp_path / "a.zarr")), computed[1]


@pytest.mark.parametrize("name", REGISTRY)
def test_clocks_decide_nothing(stores: tuple[Path, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose clocks leap, and which has less memory free, every bit is the same."""
    expected = numbers(by_function(name, ntkpipe.open_kernel(stores[0]), stores[1]))
    leaps = np.random.default_rng(0).exponential(1e3, 100_000).cumsum().tolist()
    for module in [one for where, one in sys.modules.items() if where.startswith("ntkpipe.")]:
        for clock in ("perf_counter", "monotonic"):
            if hasattr(module, clock):
                monkeypatch.setattr(module, clock, lambda: leaps.pop(0))
    monkeypatch.setattr("ntkpipe.base.config.available_memory", lambda: 2**30)
    found = numbers(by_function(name, ntkpipe.open_kernel(stores[0]), stores[1]))
    assert found.keys() == expected.keys()
    assert [key for key, value in found.items() if not identical(value, expected[key])] == []


def identical(found: Any, expected: Any) -> bool:
    """Equal to the last bit; NaN equals NaN."""
    if isinstance(found, np.ndarray):
        return found.dtype == expected.dtype and found.tobytes() == expected.tobytes()
    return repr(found) == repr(expected)


@pytest.mark.parametrize("name", REGISTRY)
def test_function_step_command_and_saved_result_have_the_same_numbers(stores: tuple[Path, Path], name: str) -> None:
    path, other = stores
    expected = numbers(by_function(name, ntkpipe.open_kernel(path), other))
    options = {**OPTIONS.get(name, {}), **({"other": str(other)} if name == "compare" else {})}
    step = run_step(path, name, progress=False, **options)
    _check_step(StepSpec(step=name, options=options), "a file")
    saved = read_result(path, name)
    assert type(saved) is type(step)
    assert signs_removed(numbers(step)).keys() == expected.keys()
    wrong = [
        key for key, value in signs_removed(numbers(step)).items() if not same(value, signs_removed(expected)[key])
    ]
    assert wrong == []
    assert all(same(value, numbers(step)[key]) for key, value in numbers(saved).items())
    flags = [f"--{key.replace('_', '-')}" for key in options if key != "other"]
    texts = [",".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in options.items() if k != "other"]
    pairs = [part.lower() for pair in zip(flags, texts, strict=True) for part in pair]
    done = CliRunner().invoke(
        StepCommand(REGISTRY[name]), [str(path), *options.get("other", "").split(), *pairs, "--json"]
    )
    printed = json.loads(done.stdout)
    assert all(same(value, numbers(step)[key]) for key, value in printed.items() if key in numbers(step))


# Names of steps whose section draws, and its title; the others' has the rows of the result.
DRAWN = {
    "spectrum": "Spectrum and density",
    "alignment": "Alignment of kernel and targets",
    "regression": "Ridge regression",
    "generalisation": "Predicted against measured risk",
    "gaussian_process": "Gaussian process and its calibration",
    "influence": "Most influential training points",
}


@pytest.mark.parametrize("name", REGISTRY)
def test_its_section_has_the_numbers_that_were_saved(
    stores: tuple[Path, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drawing takes most of the time.
    monkeypatch.setattr("ntkpipe.report.compose.render", lambda plot: "")
    path, other = stores
    options = {**OPTIONS.get(name, {}), **({"other": str(other)} if name == "compare" else {})}
    found = run_step(path, name, progress=False, **options)
    written = ntkpipe.write_report(path, progress=False, saved_only=True)
    text = html.unescape(Path(written.path).read_text(encoding="utf-8"))
    if name in DRAWN:
        assert "No step has saved" not in dict(written.missing).get(DRAWN[name], "")
        shown = f"{found.largest:.4g}" if name == "spectrum" else found.targets
        assert shown in text or shown in text.replace(",", "")
    else:
        assert f"Result of {name}" in text
        assert [value for _, value in found.rows() if value not in text] == []


@pytest.mark.parametrize("name", REGISTRY)
def test_a_step_has_only_options_that_its_function_knows_and_explains(name: str) -> None:
    summary, texts = help_of_step(REGISTRY[name])
    assert summary
    assert [option for option in options_of_step(REGISTRY[name]) if not texts.get(option)] == []


def reference_table() -> str:
    """The steps in Markdown, for the guide: name, what it finds, function, options with their defaults."""
    rows = ["| step, command, result | finds | function | options |", "|---|---|---|---|"]
    for entry in REGISTRY.values():
        options = ", ".join(
            f"`{name}`" if option.is_required else f"`{name}={option.default!r}`"
            for name, option in options_of_step(entry).items()
        )
        rows.append(f"| `{entry.name}` | {entry.summary} | `ntkpipe.{entry.function.__name__}` | {options} |")
    return "\n".join(rows)


def test_the_guide_lists_them() -> None:
    assert reference_table() in GUIDE.read_text(encoding="utf-8")


def test_one_is_added_in_one_place(stores: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the registry, beside the function, makes step, command, result."""
    monkeypatch.setitem(REGISTRY, "trace", Entry("trace", "trace_step:scaled_trace", "a multiple of the trace"))
    expected = float(np.trace(ntkpipe.open_kernel(stores[0]).train.to_numpy()))
    assert run_step(stores[0], "trace", factor=2.0, progress=False).value == pytest.approx(2 * expected)
    assert read_result(stores[0], "trace").value == pytest.approx(2 * expected)
    done = CliRunner().invoke(StepCommand(REGISTRY["trace"]), [str(stores[0]), "--factor", "3", "--json"])
    assert json.loads(done.stdout)["value"] == pytest.approx(3 * expected)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kk": 3}, ArgumentError, "has no option 'kk'; the nearest is 'k'"),
        ({"k": 2.5}, ConfigError, "k=2.5; needed an integer"),
        ({"k": "3"}, ConfigError, "k='3'; needed an integer"),
        ({"tol": True}, ConfigError, "tol=True; needed a number"),
    ],
)
def test_options_are_checked(stores: tuple[Path, Path], options: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        run_step(stores[0], "eigsh", progress=False, **options)
    with pytest.raises(error, match=words):
        _check_step(StepSpec(step="eigsh", options=options), "a file")


def test_names_are_checked(stores: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="no step 'eigs'; the nearest is 'eigsh'"):
        run_step(stores[0], "eigs")
    with pytest.raises(ConfigError, match="needs other"):
        run_step(stores[0], "compare", progress=False)
    with pytest.raises(ConfigError, match="needs times"):
        run_step(stores[0], "dynamics", progress=False)
