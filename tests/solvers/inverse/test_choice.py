"""What methods are expected to take: growth with the size of the problem, and extrapolation of histories."""

import math

import numpy as np
import pytest

from ntkpipe.base.config import Budget
from ntkpipe.base.operator import Operator, Statistics, Work
from ntkpipe.solvers.inverse.choice import (
    are_all_cheaper,
    cost_of_factor,
    cost_of_iterating,
    hopeless_after,
    iterations_left,
)


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


def factoring(num_rows, room=2**60, **options):
    return cost_of_factor(Sized(num_rows), Budget(room), **options)


def iterating(num_rows, rank=400, made=400, num_ridges=1):
    return cost_of_iterating(Sized(num_rows), 10, rank, made, num_ridges)


def test_a_factor_in_files_costs_more_than_one_in_memory():
    assert factoring(20_000, 2**28, in_files=True) > factoring(20_000)


def test_large_matrices_are_iterated_with():
    assert factoring(2000) < iterating(2000)
    assert factoring(10**6) > 10 * iterating(10**6)


def test_a_preconditioner_that_is_shared_or_there_is_cheaper():
    alone = iterating(10**5, rank=1000, made=1000)
    assert iterating(10**5, rank=1000, made=0) < iterating(10**5, rank=1000, made=1000, num_ridges=10) < alone


def test_leading_eigenpairs_are_cheaper_than_all_of_many_rows():
    assert are_all_cheaper(Sized(500), 100)
    assert not are_all_cheaper(Sized(5000), 100)


@pytest.mark.parametrize(("rate", "tol", "left"), [(0.5, 2.0**-40, 20), (0.9, 1e-6, None)])
def test_histories_go_on_as_they_were(rate, tol, left):
    history = rate ** np.arange(1.0, 21.0)[:, None] * np.array([[1.0, 0.1]])
    expected = left or math.log(history[-1, 0] / tol) / -math.log(rate)
    assert iterations_left(history, tol) == pytest.approx(expected)


def test_histories_that_rise_or_have_arrived():
    assert iterations_left(np.array([[1.0], [2.0], [4.0]]), 1e-6) == math.inf
    assert iterations_left(np.array([[1.0], [1e-7]]), 1e-6) == 0.0


def test_patience_ends_only_after_half_of_the_cost():
    rising = np.ones((100, 1))
    assert not hopeless_after(1.0, 1e6, 1e-6)(rising)
    assert not hopeless_after(1.0, 201.0, 1e-6)(rising)
    assert hopeless_after(1.0, 199.0, 1e-6)(rising)
    assert not hopeless_after(1.0, 0.0, 1e-6)(rising[:5])
    assert not hopeless_after(1.0, 0.0, 1e-6)(np.full((100, 1), 1e-7))
