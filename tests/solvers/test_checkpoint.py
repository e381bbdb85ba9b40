"""Calculations cut short after any pass go on to the same bits, without a pass done twice."""

import json
import math

import numpy as np
import pytest
from matrices import matrix_with_spectrum, power_law

from ntkpipe.base.errors import ConfigError
from ntkpipe.learning.dynamics import dynamics
from ntkpipe.operators.dense import DenseOperator
from ntkpipe.solvers.spectral.density import density
from ntkpipe.solvers.spectral.krylov import is_due
from ntkpipe.solvers.spectral.slq_logdet import slq_logdet
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
