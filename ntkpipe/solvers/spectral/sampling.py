"""Options and Lanczos processes of estimates from random probes."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ntkpipe.base.config import check_number
from ntkpipe.solvers.spectral.krylov import ProbeLanczos, steps_that_fit


@dataclass(frozen=True)
class Sampling:
    """Options that all estimates from probes share."""

    num_probes: int
    num_steps: int | None
    tol: float
    max_passes: int
    memory_limit: int | None
    seed: int

    @classmethod
    def checked(
        cls, num_probes: int, num_steps: int | None, tol: float, max_passes: int, memory_limit: int | None, seed: int
    ) -> Self:
        """Check numbers and make plain ones of those of numpy."""
        num_probes = int(check_number("num_probes", num_probes, low=2))
        tol = float(check_number("tol", tol, low=0.0, high=1.0))
        max_passes = int(check_number("max_passes", max_passes, low=1))
        if num_steps is not None:
            num_steps = int(check_number("num_steps", num_steps, low=1))
        return cls(num_probes, num_steps, tol, max_passes, memory_limit, seed)


class SampledLanczos(ProbeLanczos):
    """Lanczos processes of Rademacher probes, with as many steps as options and memory allow."""

    def __init__(
        self, num_rows: int, options: Sampling, memory_limit: int | None, deflate: NDArray[np.float64] | None = None
    ) -> None:
        wanted = min(options.num_steps or options.max_passes, num_rows)
        most = steps_that_fit(num_rows, options.num_probes, wanted, memory_limit)
        probes = np.random.default_rng(options.seed).choice(np.array([-1.0, 1.0]), (num_rows, options.num_probes))
        super().__init__(probes, most, deflate)
        self.limit = "memory_limit" if most < wanted else "num_steps or max_passes"

    @property
    def is_finished(self) -> bool:
        """Whether no more steps are allowed, or any use."""
        return self.num_steps == self.max_steps or bool(self.ended.all())
