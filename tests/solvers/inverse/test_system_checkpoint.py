"""Regression systems cut short anywhere go on from their checkpoint: little is lost, and nothing is claimed."""

import numpy as np
import pytest
from costs import costs
from matrices import matrix_with_spectrum, power_law

from ntkpipe.base.errors import ConfigError, StoreError
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.inverse.solve import solve
from ntkpipe.solvers.linear.preconditioner import randomly_pivoted_cholesky
from ntkpipe.store.results import Checkpoint

N = 300
MATRIX = matrix_with_spectrum(power_law(N, condition=1e6))
RHS = np.random.default_rng(1).standard_normal((N, 3))
RHS[:, 1] = 0.0
OPTIONS = {"ridge": 1e-4, "rank": 20, "tol": 1e-8}
BOTH = pytest.mark.parametrize("method", ["pcg", "block_cg"])


class KilledError(BaseException):
    """Ends a process, as far as a solver can tell, with nothing saved."""


def stop_after(passes, error=KeyboardInterrupt):
    seen = []

    def monitor(step):
        seen.append(step)
        if len(seen) == passes:
            raise error

    return monitor


def unless(killed, function):
    """What a kill leaves: nothing is written where it strikes."""
    return lambda *arguments: None if killed else function(*arguments)


def residuals(found, ridge=OPTIONS["ridge"]):
    left = RHS - MATRIX @ found.coefficients - ridge * found.coefficients
    sizes = np.linalg.norm(RHS, axis=0)
    return np.linalg.norm(left, axis=0) / np.where(sizes > 0, sizes, 1.0)


@BOTH
@pytest.mark.parametrize("passes", [1, 2, 13, 26, 27, 40, 53])
def test_after_an_interrupt_it_goes_on_to_the_same_tolerance(method, passes, tmp_path):
    whole = solve(MATRIX, RHS, method=method, **OPTIONS)
    assert whole.iterations + len(whole.checks) > 53
    first, second, checkpoint = DenseOperator(MATRIX), DenseOperator(MATRIX), Checkpoint(tmp_path, "run")
    with pytest.raises(KeyboardInterrupt):
        solve(first, RHS, method=method, **OPTIONS, checkpoint=checkpoint, monitor=stop_after(passes))
    found = solve(second, RHS, method=method, **OPTIONS, checkpoint=checkpoint)
    assert found.is_converged
    assert found.residuals.max() <= 1e-8
    np.testing.assert_allclose(found.residuals, residuals(found), rtol=1e-3, atol=1e-13)
    assert found.work.passes == pytest.approx(first.work.passes + second.work.passes)
    # One pass for the true residual of where it was.
    assert found.work.passes == pytest.approx(
        found.preconditioner_work.passes + found.iterations + len(found.checks) + 1
    )
    assert found.history.shape == (found.iterations, 3)
    # Near the end there may be more: where the recurrence has the tolerance and the true residual does not yet.
    assert set(range(25, found.iterations, 25)) <= set(found.checks)
    assert found.mu == whole.mu


def test_interrupted_again_and_again_it_arrives(tmp_path):
    checkpoint, passes = Checkpoint(tmp_path, "run"), []

    def stop(step):
        passes.append(step.work.passes)
        if len(passes) % 31 == 0:
            raise KeyboardInterrupt

    for _ in range(30):
        try:
            found = solve(MATRIX, RHS, method="block_cg", **OPTIONS, checkpoint=checkpoint, monitor=stop)
        except KeyboardInterrupt:
            continue
        break
    assert found.is_converged
    assert len(passes) > 31
    # Steps tell the work of all calls, and each pass is told once.
    assert np.diff(passes).min() > 0.999
    assert passes[-1] == pytest.approx(found.work.passes)
    assert residuals(found).max() <= 1e-8


@BOTH
def test_after_a_kill_it_goes_on_from_the_last_true_residuals(method, tmp_path, monkeypatch):
    checkpoint, killed = Checkpoint(tmp_path, "run"), []

    def kill(step):
        if step.work.passes > 40:
            killed.append(step)
            raise KilledError

    with monkeypatch.context() as patched:
        for name in ("put", "commit"):
            patched.setattr(Checkpoint, name, unless(killed, getattr(Checkpoint, name)))
        with pytest.raises(KilledError):
            solve(MATRIX, RHS, method=method, **OPTIONS, checkpoint=checkpoint, monitor=kill)
    operator = DenseOperator(MATRIX)
    found = solve(operator, RHS, method=method, **OPTIONS, checkpoint=checkpoint)
    assert found.is_converged
    assert list(found.checks[:2]) == [25, 50]
    made = found.preconditioner_work.passes
    assert operator.work.passes == pytest.approx(found.work.passes - made - 26)
    assert residuals(found).max() <= 1e-8


def test_the_preconditioner_is_not_made_twice(tmp_path):
    checkpoint = Checkpoint(tmp_path, "run")
    with pytest.raises(KeyboardInterrupt):
        solve(MATRIX, RHS, method="block_cg", **OPTIONS, checkpoint=checkpoint, monitor=stop_after(1))
    operator = DenseOperator(MATRIX)
    with pytest.raises(KeyboardInterrupt):
        solve(operator, RHS, method="block_cg", **OPTIONS, checkpoint=checkpoint, monitor=stop_after(1))
    assert operator.work.passes == 2  # the true residual, and a step


def test_one_that_is_done_costs_a_pass(tmp_path):
    checkpoint, operator = Checkpoint(tmp_path, "run"), DenseOperator(MATRIX)
    first = solve(operator, RHS, method="block_cg", **OPTIONS, checkpoint=checkpoint)
    before = operator.work.passes
    again = solve(operator, RHS, method="block_cg", **OPTIONS, checkpoint=checkpoint)
    assert operator.work.passes - before == 1
    np.testing.assert_allclose(again.coefficients, first.coefficients, rtol=1e-12)
    np.testing.assert_array_equal(again.history, first.history)
    assert again.is_converged


def test_passes_before_count_and_more_of_them_go_on(tmp_path):
    checkpoint, options = Checkpoint(tmp_path, "run"), {**OPTIONS, "method": "block_cg"}
    short = solve(MATRIX, RHS, **options, max_passes=40, checkpoint=checkpoint)
    assert (short.status, short.iterations + len(short.checks)) == ("step limit", 40)
    again = solve(MATRIX, RHS, **options, max_passes=40, checkpoint=checkpoint)
    assert (again.status, again.iterations) == ("step limit", short.iterations)
    np.testing.assert_allclose(again.residuals, short.residuals, rtol=1e-8)
    longer = solve(MATRIX, RHS, **options, checkpoint=checkpoint)
    assert longer.is_converged
    assert longer.iterations > short.iterations


def test_an_error_keeps_what_was_reached_and_is_told(tmp_path):
    checkpoint = Checkpoint(tmp_path, "run")
    with pytest.raises(OSError, match="network"):
        solve(MATRIX, RHS, method="pcg", **OPTIONS, checkpoint=checkpoint, monitor=stop_after(30, OSError("network")))
    found = solve(MATRIX, RHS, method="pcg", **OPTIONS, checkpoint=checkpoint)
    assert found.work.passes == pytest.approx(
        found.preconditioner_work.passes + found.iterations + len(found.checks) + 1
    )


def test_a_checkpoint_that_cannot_be_written_does_not_hide_the_interrupt(tmp_path, monkeypatch):
    def interrupt(step):
        monkeypatch.setattr(Checkpoint, "put", full)
        raise KeyboardInterrupt

    def full(*args):
        raise StoreError("the disk is full")

    with pytest.raises(KeyboardInterrupt) as caught:
        solve(MATRIX, RHS, method="pcg", **OPTIONS, checkpoint=Checkpoint(tmp_path, "run"), monitor=interrupt)
    assert caught.value.__notes__ == ["what was reached could not be kept: the disk is full"]


def test_the_checkpoint_of_another_system_is_refused(tmp_path):
    checkpoint, options = Checkpoint(tmp_path, "run"), {**OPTIONS, "method": "pcg"}
    solve(MATRIX, RHS, **options, checkpoint=checkpoint)
    others = [{"ridge": 1.0}, {"rank": 5}, {"tol": 1e-3}, {"seed": 1}, {"method": "cholesky"}]
    for other in [*others, {"preconditioner": "nystrom"}]:
        with pytest.raises(ConfigError, match=rf"another calculation: {next(iter(other))}="):
            solve(MATRIX, RHS, **{**options, **other}, checkpoint=checkpoint)
    for matrix, rhs, word in ((2 * MATRIX, RHS, "matrix="), (MATRIX, RHS[:, :1], "rhs=")):
        with pytest.raises(ConfigError, match=word):
            solve(matrix, rhs, **options, checkpoint=checkpoint)
    assert solve(MATRIX, RHS, **options, initial=RHS, max_passes=900, checkpoint=checkpoint).is_converged


def test_a_preconditioner_that_was_given_is_not_written(tmp_path):
    checkpoint, made = Checkpoint(tmp_path, "run"), randomly_pivoted_cholesky(DenseOperator(MATRIX), 20)
    options = {"ridge": 1e-4, "preconditioner": made, "method": "pcg", "tol": 1e-8, "checkpoint": checkpoint}
    with pytest.raises(KeyboardInterrupt):
        solve(MATRIX, RHS, **options, monitor=stop_after(30))
    assert not [path for path in tmp_path.rglob("*") if "preconditioner" in path.name]
    assert solve(MATRIX, RHS, **options).preconditioner_work.passes == 0


def test_a_factor_in_memory_leaves_nothing(tmp_path):
    found = solve(MATRIX, RHS, method="cholesky", ridge=1e-4, checkpoint=Checkpoint(tmp_path, "run"))
    assert found.is_converged
    assert not list(tmp_path.iterdir())


def test_what_was_given_up_for_a_factor_is_not_taken_up_again(tmp_path, monkeypatch):
    costs(monkeypatch, iterating=-1.0, factoring=0.0)
    checkpoint, options = Checkpoint(tmp_path, "run"), {"ridge": 1e-4, "tol": 1e-9, "rank": 2}
    # Ten iterations, a check, and the only panel of the factor.
    with pytest.raises(KeyboardInterrupt):
        solve(MATRIX, RHS, **options, checkpoint=checkpoint, monitor=stop_after(12))
    found = solve(MATRIX, RHS, **options, checkpoint=checkpoint)
    assert (found.method, found.iterations, found.status) == ("cholesky", 10, "converged")
    assert "given up after 10 iterations" in found.why


def test_what_iterates_goes_on_whatever_clocks_say_now(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path, "run")
    costs(monkeypatch, iterating=-1.0, factoring=float("inf"))
    with pytest.raises(KeyboardInterrupt):
        solve(MATRIX, RHS, **OPTIONS, checkpoint=checkpoint, monitor=stop_after(30))
    monkeypatch.undo()
    found = solve(MATRIX, RHS, **OPTIONS, checkpoint=checkpoint)
    assert (found.method, found.is_converged) == ("block_cg", True)
    assert found.why == "a Cholesky factor does not fit memory, and path= names no folder for it"


def test_single_columns_and_small_matrices(tmp_path):
    matrix = matrix_with_spectrum(np.arange(1.0, 9.0))
    for number, rhs in enumerate([np.ones(8), np.zeros((8, 2))]):
        checkpoint = Checkpoint(tmp_path, f"run-{number}")
        found = [solve(matrix, rhs, method="pcg", rank=1, checkpoint=checkpoint) for _ in range(2)]
        assert found[1].is_converged
        np.testing.assert_allclose(found[1].coefficients, found[0].coefficients)
