"""Stages of an analysis, such as fits at several ridges; work, also that of earlier calls, is in its result."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.operator import Operator, Work, digest_of
from ntkpipe.learning.regression.sources import TrainTargets
from ntkpipe.solvers.checkpoint import Stages
from ntkpipe.solvers.inverse.contract import Fit, Inverse, Question
from ntkpipe.store.results import Checkpoint


class CountedStages(Stages):
    """Stages by products with an operator; :attr:`work` and :attr:`seconds` are what earlier calls took."""

    def __init__(
        self, checkpoint: Checkpoint | None, operator: Operator, train: TrainTargets | None, **decides: Any
    ) -> None:
        if checkpoint is not None:
            decides["matrix"] = operator.identity()
            if train is not None:
                decides |= {"targets": train.targets.words, "rhs": digest_of(train.rhs)}
        super().__init__(checkpoint, decides)
        self._operator = operator
        self.work, self.seconds = Work(), 0.0

    def once(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """See :meth:`Stages.once`."""
        begin, before = perf_counter(), self._operator.work

        def counted() -> Mapping[str, Any]:
            found = compute()
            # A solver that goes on from a checkpoint of its own says what it took in all.
            work = Work(**found["work"]) if "work" in found else self._operator.work - before
            return {"seconds": perf_counter() - begin, **found, "spent": work}

        found = super().once(name, counted)
        self.work += found["spent"] - (self._operator.work - before)
        self.seconds += found["seconds"] - (perf_counter() - begin)
        return found

    def fits(
        self, inverse: Inverse, question: Question, ridges: FloatArray, measure: Callable[[Fit], Mapping[str, float]]
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """What is measured of fits, with their places, from the largest ridge to the smallest, each a stage.

        Iterations begin with the solution of the ridge before.
        """
        solution = None

        def measured(ridge: float, start: FloatArray | None) -> dict[str, Any]:
            fit = inverse.fit(question, ridge, start)
            verdict = {"status": fit.verdict.status, "message": fit.verdict.message, "residual": fit.verdict.worst}
            return {"solution": fit.solution, "measures": measure(fit), "num_left_out": len(fit.samples), **verdict}

        for place in np.argsort(-ridges, kind="stable").tolist():
            found = self.once(f"ridge-{place}", partial(measured, float(ridges[place]), solution))
            solution = np.asarray(found["solution"])
            yield place, {**found, "coefficients": solution[:, : question.rhs.shape[1]]}
