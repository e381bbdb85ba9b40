"""What methods are expected to take: growth with the size of the problem, and extrapolation of histories."""

import math

import numpy as np
import pytest
from ntkpipe.solvers.linear.systems import forecast, hopeless_after, iterations_left

from ntkpipe.base.budget import Budget
from ntkpipe.base.operator import Operator, Statistics, Work
from ntkpipe.operators.dense import DenseOperator


class Sized(Operator):
    """A matrix of any size that has no entries."""

    def __init__(self, num_rows):
        super().__init__(num_rows, np.dtype(np.float32))
        self._statistics = Statistics(np.ones(1), 1.0)

    @property
    def work(self):
        return Work()

    def identity(self):
        return "sized"

    def _multiply(self, block):
        raise AssertionError

    def _measure(self):
        raise AssertionError


def expect(num_rows, **options):
    defaults = {"num_columns": 10, "rank": 400, "num_ridges": 1, "budget": Budget(2**60)}
    return forecast(Sized(num_rows), **{**defaults, **options})


def test_small_matrices_are_factored_without_a_measurement():
    operator = DenseOperator(np.eye(10))
    found = forecast(operator, num_columns=1, rank=1, num_ridges=1, budget=Budget())
    assert (found.factoring, found.iterating, operator.work.passes) == (0.0, math.inf, 0.0)


def test_what_does_not_fit_memory_may_go_to_files():
    nothing, files = (expect(20_000, budget=Budget(2**28), in_files=in_files) for in_files in (False, True))
    assert nothing.factoring is None
    assert "path=" in nothing.words
    assert files.factoring > expect(20_000).factoring


def test_large_matrices_are_iterated_with():
    assert expect(2000).factoring < expect(2000).iterating
    assert expect(10**6).factoring > 10 * expect(10**6).iterating


def test_what_does_not_fit_is_not_factored():
    found = expect(10**5, budget=Budget(2**30))
    assert found.factoring is None
    assert "does not fit" in found.words


def test_a_preconditioner_that_is_shared_or_there_is_cheaper():
    alone = expect(10**5, rank=1000).iterating
    assert expect(10**5, rank=0).iterating < expect(10**5, rank=1000, num_ridges=10).iterating < alone


@pytest.mark.parametrize(("rate", "tol", "left"), [(0.5, 2.0**-40, 20), (0.9, 1e-6, None)])
def test_histories_go_on_as_they_were(rate, tol, left):
    history = rate ** np.arange(1.0, 21.0)[:, None] * np.array([[1.0, 0.1]])
    expected = left or math.log(history[-1, 0] / tol) / -math.log(rate)
    assert iterations_left(history, tol) == pytest.approx(expected)


def test_histories_that_rise_or_have_arrived():
    assert iterations_left(np.array([[1.0], [2.0], [4.0]]), 1e-6) == math.inf
    assert iterations_left(np.array([[1.0], [1e-7]]), 1e-6) == 0.0


def test_patience_ends_only_after_half_of_the_time():
    rising = np.ones((100, 1))
    assert not hopeless_after(1e6, 1e-6)(rising)
    assert hopeless_after(0.0, 1e-6)(rising)
    assert not hopeless_after(0.0, 1e-6)(rising[:5])
    assert not hopeless_after(0.0, 1e-6)(np.full((100, 1), 1e-7))
