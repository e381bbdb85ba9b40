"""Long analyses go on from checkpoints: an interrupted call and the next one find the same in fewer passes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from regressions import features

import ntkpipe
from ntkpipe.base.errors import ConfigError
from ntkpipe.solvers.result import Result, Step

KERNEL, TEST_KERNEL, DIAGONAL = features(np.random.default_rng(1), num_train=160, num_test=12, size=200)
OTHER = KERNEL + 0.1 * np.diag(np.arange(160) % 3)
LABELS, TEST_LABELS = np.arange(160) % 3, np.arange(12) % 3
TEST = {"test_kernel": TEST_KERNEL, "test_targets": TEST_LABELS}
STREAMED: dict[str, Any] = {"method": "streamed"}
RIDGES = {"ridges": [0.1, 1.0, 10.0, 100.0]}

CALLS: dict[str, Callable[..., Result]] = {
    "spectrum": lambda **how: ntkpipe.spectrum(KERNEL, k=10, **STREAMED, **how),
    "alignment": lambda **how: ntkpipe.alignment(KERNEL, LABELS, k=20, **STREAMED, **how),
    "generalisation": lambda **how: ntkpipe.generalisation(KERNEL, LABELS, **RIDGES, **TEST, **STREAMED, **how),
    "learning_curve": lambda **how: ntkpipe.learning_curve(KERNEL, LABELS, **how),
    "ridge_path": lambda **how: ntkpipe.ridge_path(KERNEL, LABELS, **RIDGES, **TEST, **STREAMED, **how),
    "compare_kernels": lambda **how: ntkpipe.compare_kernels(
        KERNEL,
        OTHER,
        targets=LABELS,
        test_targets=TEST_LABELS,
        test_kernels=(TEST_KERNEL, TEST_KERNEL),
        ridge=1.0,
        **how,
    ),
    "compare_kernels by passes": lambda **how: CALLS["compare_kernels"](memory_limit=1, **how),
    "gaussian_process": lambda **how: ntkpipe.gaussian_process(
        KERNEL, LABELS, ridge=1.0, test_kernel=TEST_KERNEL, test_diagonal=DIAGONAL, **STREAMED, **how
    ),
}
NOT_COMPARED = {"work", "seconds", "why", "history"}


class StoppedError(Exception):
    """What a monitor raises."""


class Counter:
    """Counts passes, and stops at one of them."""

    def __init__(self, stop: float = np.inf) -> None:
        self.count, self._stop = 0, stop

    def __call__(self, step: Step) -> None:
        self.count += 1
        if self.count >= self._stop:
            raise StoppedError


def assert_same(one: Result, other: Result) -> None:
    for name, value in {**one.to_json(), **one.arrays()}.items():
        if name not in NOT_COMPARED:
            again = getattr(other, name)
            if isinstance(value, float | np.ndarray):
                np.testing.assert_allclose(again, value, rtol=1e-6, atol=1e-8, err_msg=name)
            elif name not in {"options", "message", "reasons"}:
                assert again == value, name


@pytest.mark.parametrize("share", [0.65, 0.9])
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_analysis_goes_on(name: str, share: float, tmp_path: Path) -> None:
    call, whole = CALLS[name], Counter()
    expected = call(monitor=whole)
    checkpoint = ntkpipe.Checkpoint(tmp_path, name)
    with pytest.raises(StoppedError):
        call(monitor=Counter(max(2, round(share * whole.count))), checkpoint=checkpoint)
    rest = Counter()
    found = call(monitor=rest, checkpoint=checkpoint)
    assert_same(expected, found)
    assert rest.count < whole.count
    # Densities, and solvers that go on in the middle of a stage of a comparison, count the passes of their own call.
    if name not in {"spectrum", "compare_kernels by passes"}:
        assert found.work.passes >= 0.9 * expected.work.passes
    again = Counter()
    assert_same(found, call(monitor=again, checkpoint=checkpoint))
    assert again.count <= 2


@pytest.mark.parametrize("name", CALLS)
def test_a_checkpoint_of_another_calculation_is_refused(name: str, tmp_path: Path) -> None:
    checkpoint = ntkpipe.Checkpoint(tmp_path, name)
    CALLS[name](checkpoint=checkpoint)
    with pytest.raises(ConfigError, match=r"another calculation.*seed"):
        CALLS[name](checkpoint=checkpoint, seed=5)


@pytest.mark.parametrize("name", CALLS)
def test_results_are_restored_from_what_is_saved(name: str) -> None:
    found = CALLS[name]()
    saved = {**json.loads(json.dumps(found.to_json())), **found.arrays()}
    assert str(type(found).from_saved(saved)) == str(found)
    older = {key: value for key, value in saved.items() if key not in {"targets", "classes", "is_binary"}}
    assert type(found).from_saved(older).status == found.status
