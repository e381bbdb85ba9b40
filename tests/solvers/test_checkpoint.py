"""Calculations cut short after any pass go on to the same bits, without a pass done twice."""

import json
import math

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law

from ntkpipe.base.errors import ConfigError, StoreError
from ntkpipe.base.operator import Work
from ntkpipe.learning.dynamics import dynamics
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.checkpoint import Stages
from ntkpipe.solvers.inverse.solve import solve_path
from ntkpipe.solvers.spectral.density import density
from ntkpipe.solvers.spectral.krylov import is_due
from ntkpipe.solvers.spectral.lanczos import eigsh
from ntkpipe.solvers.spectral.logdet import slq_logdet
from ntkpipe.solvers.spectral.smallest import smallest
from ntkpipe.store.results import Checkpoint

MATRIX = matrix_with_spectrum(power_law(64, condition=1e4))
TARGETS = np.random.default_rng(1).standard_normal((64, 3))


def plain_logdet(operator, **options):
    return slq_logdet(operator, preconditioner=None, **options)


def flow(operator, **options):
    return dynamics(operator, TARGETS, times=[10.0, 1e4, math.inf], **options)


class CutShortError(Exception):
    pass


def cut_after(passes):
    seen = []

    def monitor(step):
        seen.append(step)
        if len(seen) == passes:
            raise CutShortError

    return monitor


def arrays_equal(first, second):
    assert first.arrays().keys() == second.arrays().keys()
    for name, values in first.arrays().items():
        np.testing.assert_array_equal(values, second.arrays()[name])
    assert first.status == second.status


@pytest.mark.parametrize("function", [density, plain_logdet, flow])
@pytest.mark.parametrize("passes", [1, 2, 7, 13])
def test_cut_short_it_goes_on_to_the_same_bits(function, passes, tmp_path):
    operator = DenseOperator(MATRIX)
    operator.statistics()
    whole = function(operator)
    with pytest.raises(CutShortError):
        function(operator, checkpoint=Checkpoint(tmp_path, "run"), monitor=cut_after(passes))
    rest = function(operator, checkpoint=Checkpoint(tmp_path, "run"))
    arrays_equal(whole, rest)
    assert rest.work.passes == whole.work.passes - passes


@pytest.mark.parametrize("function", [density, plain_logdet, flow])
def test_one_that_is_done_needs_no_more_steps_and_may_be_given_more(function, tmp_path):
    operator = DenseOperator(MATRIX)
    operator.statistics()
    short = function(operator, checkpoint=Checkpoint(tmp_path, "run"), max_passes=9)
    again = function(operator, checkpoint=Checkpoint(tmp_path, "run"), max_passes=9)
    arrays_equal(short, again)
    assert again.work.passes <= 1
    longer = function(operator, checkpoint=Checkpoint(tmp_path, "run"), max_passes=14)
    arrays_equal(longer, function(operator, max_passes=14))
    assert longer.num_steps == 14
    with pytest.raises(ConfigError, match="14 steps, and 9 are allowed"):
        function(operator, checkpoint=Checkpoint(tmp_path, "run"), max_passes=9)


def test_a_preconditioner_is_made_again(tmp_path):
    whole = slq_logdet(MATRIX)
    with pytest.raises(CutShortError):
        slq_logdet(MATRIX, checkpoint=Checkpoint(tmp_path, "run"), monitor=cut_after(5))
    arrays_equal(whole, slq_logdet(MATRIX, checkpoint=Checkpoint(tmp_path, "run")))
    with pytest.raises(ConfigError, match="another calculation"):
        slq_logdet(MATRIX, checkpoint=Checkpoint(tmp_path, "run"), rank=5)


def test_a_space_that_ends_is_read_again(tmp_path):
    matrix, goals = matrix_with_spectrum(np.arange(1.0, 9.0)), TARGETS[:8]
    first, second = (
        dynamics(matrix, goals, times=[1.0], tol=1e-14, checkpoint=Checkpoint(tmp_path, "run")) for _ in range(2)
    )
    assert first.dimension == 8
    arrays_equal(first, second)


@pytest.mark.parametrize("function", [density, plain_logdet, flow])
def test_a_checkpoint_of_another_calculation_is_refused(function, tmp_path):
    function(MATRIX, checkpoint=Checkpoint(tmp_path, "run"))
    for matrix, seed in ((2 * MATRIX, 0), (MATRIX, 1)):
        with pytest.raises(ConfigError, match="another calculation"):
            function(matrix, seed=seed, checkpoint=Checkpoint(tmp_path, "run"))


def test_errors_are_looked_at_often_first_and_then_each_eighth():
    assert [step for step in range(41) if is_due(step)] == [*range(1, 17), 18, 20, 22, 24, 27, 30, 33, 37]


def test_options_that_are_numpy_numbers_are_saved_as_json_too(tmp_path):
    one, few = np.float32(0.5), np.int64(4)
    for index, result in enumerate(
        [
            density(MATRIX, num_probes=few, num_steps=few, tol=one, checkpoint=Checkpoint(tmp_path, "a")),
            slq_logdet(MATRIX, ridge=one, num_probes=few, tol=one, checkpoint=Checkpoint(tmp_path, "b")),
            flow(MATRIX, learning_rate=one, tol=one, max_passes=few, checkpoint=Checkpoint(tmp_path, "c")),
        ]
    ):
        assert json.loads(json.dumps(result.to_json()))["status"] == result.status, index


HARD = matrix_with_spectrum(power_law(200, condition=1e6))
RHS = np.random.default_rng(2).standard_normal((200, 2))
SAVED = {"values": {"a": [1, None, "x"], "b": float("nan")}, "number": 0.1, "work": Work(1.5, 2, 0.25)}
SAVED |= {"floats": np.arange(6.0).reshape(2, 3), "integers": np.arange(3), "nothing": np.zeros((0, 2))}


def test_a_stage_is_computed_once_and_read_back_the_same(tmp_path):
    for number in range(3):
        stages = Stages(Checkpoint(tmp_path, "run"), {"seed": 1, "sizes": (1, 2)})
        assert ("one" in stages) == (number > 0)
        found = stages.once("one", lambda number=number: {**SAVED, "call": number})
        assert found.keys() == {*SAVED, "call"}
        assert (found["call"], found["number"], found["work"]) == (0, 0.1, SAVED["work"])
        assert str(found["values"]) == str(SAVED["values"])
        for name in ("floats", "integers", "nothing"):
            assert found[name].dtype == SAVED[name].dtype
            np.testing.assert_array_equal(found[name], SAVED[name])
    with pytest.raises(ConfigError, match=r"another calculation: seed=1 \(now 2\)"):
        Stages(Checkpoint(tmp_path, "run"), {"seed": 2, "sizes": (1, 2)})


def test_without_a_checkpoint_each_stage_is_computed():
    stages = Stages(None, {})
    assert [stages.once("one", lambda call=call: {"call": call})["call"] for call in range(2)] == [0, 1]
    assert stages.part("one") is None


def test_a_solver_within_a_stage_goes_on_and_its_checkpoint_is_dropped_after_it(tmp_path):
    def call(monitor=lambda step: None):
        outer = Stages(Checkpoint(tmp_path, "run"), {"function": "outer"})
        inner = Stages(outer.part("inner"), {"function": "inner"})
        found = inner.result(
            "pairs", type(whole), lambda: eigsh(MATRIX, 5, checkpoint=inner.part("pairs"), monitor=monitor)
        )
        outer.once("inner", found.arrays)
        return found

    whole = eigsh(MATRIX, 5)
    with pytest.raises(CutShortError):
        call(cut_after(3))
    # The work of the first call counts, too: nothing was done twice.
    found = call()
    arrays_equal(whole, found)
    assert found.work.passes == whole.work.passes
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {
        f"inner-{name}" for name in whole.arrays()
    }


def test_stages_that_are_damaged_are_refused(tmp_path):
    for state in ({"stages": 3}, {"stages": {"one": 3}}, {"stages": {"one": {"arrays": 1}}}, {"parts": {"one": {}}}):
        Checkpoint(tmp_path, "run").commit({"decides": {}, "stages": {}, "parts": {}, **state}, set())
        with pytest.raises(StoreError, match="delete it to begin anew"):
            Stages(Checkpoint(tmp_path, "run"), {}).once("one", dict)


@pytest.mark.parametrize("passes", [1, 4, 9, 16, 24])
def test_smallest_eigenvalues_go_on_without_a_pass_lost(passes, tmp_path):
    whole, checkpoint = smallest(HARD, certify=False, tol=1e-5), Checkpoint(tmp_path, "run")
    assert whole.work.passes > 30
    first, second = DenseOperator(HARD), DenseOperator(HARD)
    with pytest.raises(CutShortError):
        smallest(first, certify=False, tol=1e-5, checkpoint=checkpoint, monitor=cut_after(passes))
    steps = []
    found = smallest(second, certify=False, tol=1e-5, checkpoint=checkpoint, monitor=steps.append)
    assert (found.status, whole.status) == ("converged", "converged")
    np.testing.assert_allclose(found.eigenvalues, whole.eigenvalues, rtol=1e-5)
    assert found.residuals[0] <= 1e-5 * found.eigenvalues[0]
    # The diagonal is read again.
    assert first.work.passes + second.work.passes <= whole.work.passes + 3
    assert second.work.passes <= whole.work.passes - passes + 2
    assert steps[-1].work.passes <= found.work.passes <= first.work.passes + second.work.passes
    again = DenseOperator(HARD)
    np.testing.assert_allclose(
        smallest(again, certify=False, tol=1e-5, checkpoint=checkpoint).eigenvalues, found.eigenvalues
    )
    assert again.work.passes <= 3
    with pytest.raises(ConfigError, match="another calculation: tol="):
        smallest(HARD, certify=False, tol=1e-3, checkpoint=checkpoint)


@pytest.mark.parametrize("passes", [1, 12, 40, 70])
def test_a_path_of_ridges_goes_on_without_one_solved_twice(passes, tmp_path):
    ridges, options = [1e-4, 1.0, 1e-2], {"method": "pcg", "rank": 10, "tol": 1e-8}
    whole, checkpoint = solve_path(HARD, RHS, ridges, **options), Checkpoint(tmp_path, "run")
    first, second = DenseOperator(HARD), DenseOperator(HARD)
    with pytest.raises(CutShortError):
        solve_path(first, RHS, ridges, **options, checkpoint=checkpoint, monitor=cut_after(passes))
    found = solve_path(second, RHS, ridges, **options, checkpoint=checkpoint)
    for one, ridge in zip(found, ridges, strict=True):
        left = RHS - HARD @ one.coefficients - ridge * one.coefficients
        assert (np.linalg.norm(left, axis=0) <= 1.01e-8 * np.linalg.norm(RHS, axis=0)).all()
        assert one.ridge == ridge
    # Ridges are solved from large to small. New directions take a few iterations more.
    ends = np.cumsum([whole[number].work.passes for number in (1, 2, 0)]) - whole[1].preconditioner_work.passes
    open_ = [whole[number].work.passes for number, end in zip((1, 2, 0), ends, strict=True) if end > passes]
    assert second.work.passes <= sum(open_) + 8
    passes_told = sum(one.work.passes for one in found)
    assert passes_told == pytest.approx(first.work.passes + second.work.passes, abs=2)
    made = [sum(one.preconditioner_work.passes for one in each) for each in (whole, found)]
    assert made[0] == pytest.approx(made[1])
    third = DenseOperator(HARD)
    for one, other in zip(solve_path(third, RHS, ridges, **options, checkpoint=checkpoint), found, strict=True):
        arrays_equal(one, other)
    assert third.work.passes == 0
