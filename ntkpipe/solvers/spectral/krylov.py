"""Krylov spaces of a symmetric matrix, with full reorthogonalisation: of many probes at once, and of one block.

Spaces do not multiply but are given products, so that one pass can serve several.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.config import Budget, check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator, Work
from ntkpipe.solvers.checkpoint import Get, Journal
from ntkpipe.solvers.memory import BLOCKS_BESIDE
from ntkpipe.solvers.probe_lanczos import ProbeLanczos
from ntkpipe.solvers.result import Monitor, Step
from ntkpipe.store.results import Checkpoint, as_integer, as_mapping, as_number, as_numbers

_EPS = float(np.finfo(np.float64).eps)
_NOTHING = 10 * _EPS  # a direction this small, relative to the norm of the matrix, is rounding
_RATE_TOLERANCE = 1e-5  # relative residual at which the largest eigenvalue is settled; its error is the square
_MOST_RATE_STEPS = 30  # after so many it counts as settled


def steps_that_fit(num_rows: int, num_columns: int, wanted: int, budget: Budget) -> int:
    """Number of Lanczos steps whose vectors fit the memory, at most ``wanted``."""
    block = 8 * num_rows * num_columns
    least, what = min(2, wanted), f"Lanczos of {num_columns} columns, of two steps or fewer,"
    budget.require(block * (least + BLOCKS_BESIDE), what, "give fewer columns or raise memory_limit", share=0.5)
    return int(min(wanted, max(least, budget.room() // block - BLOCKS_BESIDE)))


def is_due(num_steps: int) -> bool:
    """Whether errors are computed after this step: at first after each, then at intervals that grow with the steps."""
    step = 1
    while step < num_steps:
        step += max(1, step // 8)
    return step == num_steps


class TopEigenvalue(ProbeLanczos):
    """The largest eigenvalue, by the Lanczos process of one random vector."""

    def __init__(self, num_rows: int, seed: int) -> None:
        start = np.random.default_rng(seed).standard_normal((num_rows, 1))
        super().__init__(start, min(_MOST_RATE_STEPS, num_rows))

    @property
    def value(self) -> float:
        """The largest Ritz value; zero before the first step."""
        return float(self.ritz()[0][-1]) if self.num_steps else 0.0

    @property
    def is_settled(self) -> bool:
        """Whether more steps are of no use."""
        if not self.num_steps:
            return False
        is_last = self.num_steps == self.max_steps or self.ended.all()
        return bool(is_last or self.ritz()[1][-1] <= _RATE_TOLERANCE * abs(self.value))


class BlockLanczos:
    """The block Lanczos process of a block, of any rank, with full reorthogonalisation.

    ``K V = V T + next_block @ [0 ... 0 coupling]`` with orthonormal V whose first columns span the block:
    ``block = V[:, :r] @ start``. Directions that repeat or vanish are dropped, then and later, so blocks may shrink.
    Memory is the vectors, ``columns * n`` float64, touched as they are needed.
    """

    def __init__(self, block: FloatArray, max_steps: int) -> None:
        num_rows, num_columns = block.shape
        self.max_steps = max_steps
        self._num_rows = num_rows
        self._vectors = np.empty((min(num_rows, num_columns * max_steps) + num_columns, num_rows))
        vectors, self.start = _orthonormal(block, _NOTHING * float(np.linalg.norm(block)), num_rows)
        self._bounds: list[int] = [0, self.start.shape[0]]
        self._vectors[: self._bounds[1]] = vectors.T
        self._diagonals: list[FloatArray] = []
        self._couplings: list[FloatArray] = []
        self._scale = 0.0

    @property
    def num_steps(self) -> int:
        """Products taken."""
        return len(self._diagonals)

    @property
    def is_exhausted(self) -> bool:
        """Whether the space is invariant: functions of K times the block are exact in it."""
        return bool(self._bounds[-1] == self._bounds[-2])

    @property
    def block(self) -> FloatArray:
        """What to multiply next, shape (n, r)."""
        return np.ascontiguousarray(self._vectors[self._bounds[-2] : self._bounds[-1]].T)

    @property
    def coupling(self) -> FloatArray:
        """Coupling of the last block of the space to the next one."""
        return self._couplings[-1]

    @property
    def dimension(self) -> int:
        """Size of T."""
        return int(self._bounds[-2])

    def absorb(self, product: FloatArray) -> None:
        """Take ``K @ block``: one step."""
        first, last = self._bounds[-2:]
        diagonal = self._vectors[first:last] @ product
        older = self._vectors[:last]
        rest = product.copy()
        for _ in range(2):
            rest -= older.T @ (older @ rest)
        self._scale = max(self._scale, float(np.linalg.norm(diagonal, 2) + np.linalg.norm(rest, 2)))
        vectors, coupling = _orthonormal(rest, _NOTHING * self._scale, self._num_rows - last)
        # Scaling made the remainders of older vectors large in the smallest of these directions.
        for _ in range(2):
            vectors -= older.T @ (older @ vectors)
            vectors, upper = np.linalg.qr(vectors)
            coupling = upper @ coupling
        self._append(vectors.T, (diagonal + diagonal.T) / 2, coupling)

    def _append(self, rows: FloatArray, diagonal: FloatArray, coupling: FloatArray) -> None:
        last = self._bounds[-1]
        self._vectors[last : last + len(rows)] = rows
        self._diagonals.append(diagonal)
        self._couplings.append(coupling)
        self._bounds.append(last + len(rows))

    def state(self) -> dict[str, Any]:
        """State of the steps taken, beside their arrays."""
        return {"num_steps": self.num_steps, "bounds": self._bounds, "scale": self._scale}

    def arrays(self) -> dict[str, FloatArray]:
        """Arrays of the steps taken; those of earlier steps never change."""
        found = {}
        for step in range(1, self.num_steps + 1):
            found[f"rows_{step}"] = self._vectors[self._bounds[step] : self._bounds[step + 1]]
            found[f"coupling_{step}"], found[f"diagonal_{step}"] = self._couplings[step - 1], self._diagonals[step - 1]
        return found

    def restore(self, get: Get, state: Mapping[str, Any]) -> None:
        """Go on from what both were; ``get`` reads an array of this name and shape."""
        num_steps, self._scale = as_integer(state["num_steps"]), as_number(state["scale"])
        bounds = as_numbers(state["bounds"], (num_steps + 2,)).astype(np.int64)
        if list(bounds[:2]) != self._bounds or bounds[-1] > len(self._vectors):
            raise ValueError(f"its blocks begin at {bounds[:2]} and end at {bounds[-1]}")
        for step in range(1, num_steps + 1):
            width, here = (int(bounds[at + 1] - bounds[at]) for at in (step - 1, step))
            rows, coupling = get(f"rows_{step}", (here, self._num_rows)), get(f"coupling_{step}", (here, width))
            self._append(rows, get(f"diagonal_{step}", (width, width)), coupling)

    def matrix(self) -> FloatArray:
        """T, symmetric, shape (dimension, dimension)."""
        found = np.zeros((self.dimension, self.dimension))
        for step, diagonal in enumerate(self._diagonals):
            here = slice(self._bounds[step], self._bounds[step + 1])
            found[here, here] = diagonal
            if step + 1 < self.num_steps:
                after = slice(self._bounds[step + 1], self._bounds[step + 2])
                found[after, here] = self._couplings[step]
                found[here, after] = self._couplings[step].T
        return found

    def combine(self, coefficients: FloatArray) -> FloatArray:
        """``V @ coefficients``, shape (n, columns)."""
        return np.asarray(self._vectors[: self.dimension].T @ coefficients)


Space = ProbeLanczos | BlockLanczos


class Stepping(ABC):
    """A calculation in Krylov spaces, of one pass a step."""

    spaces: Mapping[str, Space]  # by the names under which they are saved

    def __init__(self, operator: Operator, tol: float) -> None:
        self._operator, self._tol = operator, tol

    @abstractmethod
    def advance(self) -> None:
        """Take one pass."""

    @abstractmethod
    def look(self) -> tuple[float | None, bool]:
        """Return the error, and whether no more steps are needed."""

    def run(self, before: Work, monitor: Monitor, checkpoint: Checkpoint | None, **decides: Any) -> None:
        """Advance until it is enough; spaces are saved after each step, and restored at the beginning."""
        journal = Journal(checkpoint, {"matrix": self._operator.identity(), **decides})
        with journal.reading():
            for name, state in as_mapping((journal.earlier or {"spaces": {}})["spaces"]).items():
                space, num_steps = self.spaces[name], as_integer(state["num_steps"])
                if num_steps > space.max_steps:
                    raise ConfigError(
                        f"{checkpoint!r} has {num_steps} steps, and {space.max_steps} are allowed; raise max_passes, "
                        "num_steps or memory_limit"
                    )
                space.restore(journal.getter(f"{name}_"), state)
        error, is_done = self.look()
        while not is_done:
            self.advance()
            taken = {name: space for name, space in self.spaces.items() if space.num_steps}
            arrays = {f"{name}_{at}": values for name, space in taken.items() for at, values in space.arrays().items()}
            journal.save({"spaces": {name: space.state() for name, space in taken.items()}}, arrays)
            error, is_done = self.look()
            monitor(Step(self._operator.work - before, error, self._tol))


@dataclass(frozen=True)
class Sampling:
    """Options that all estimates from probes share."""

    num_probes: int
    num_steps: int | None
    tol: float
    max_passes: int
    seed: int
    budget: Budget

    def __post_init__(self) -> None:
        check_number("num_probes", self.num_probes, low=2)
        check_number("tol", self.tol, low=0.0, high=1.0)
        check_number("max_passes", self.max_passes, low=1)
        if self.num_steps is not None:
            check_number("num_steps", self.num_steps, low=1)


class Sampler(Stepping):
    """An estimate from Lanczos processes of Rademacher probes, with as many steps as options and memory allow."""

    def __init__(self, operator: Operator, options: Sampling, deflate: FloatArray | None = None) -> None:
        super().__init__(operator, options.tol)
        wanted = min(options.num_steps or options.max_passes, operator.num_rows)
        most = steps_that_fit(operator.num_rows, options.num_probes, wanted, options.budget)
        shape = operator.num_rows, options.num_probes
        probes = np.random.default_rng(options.seed).choice(np.array([-1.0, 1.0]), shape)
        self.lanczos = ProbeLanczos(probes, most, deflate)
        self.spaces = {"probes": self.lanczos}
        self.limit = "memory_limit" if most < wanted else "num_steps or max_passes"
        self._is_open = options.num_steps is None  # whether the estimate decides how many steps there are
        self._error: float | None = None

    def advance(self) -> None:
        """See :class:`Stepping`."""
        self.lanczos.absorb(self._multiply(self.lanczos.block))

    def look(self) -> tuple[float | None, bool]:
        """See :class:`Stepping`."""
        steps = self.lanczos.num_steps
        is_finished = steps == self.lanczos.max_steps or bool(self.lanczos.ended.all())
        if not is_finished and (not steps or (self._error is not None and not is_due(steps))):
            return self._error, False
        self._error, is_enough = self._estimate(steps)
        return self._error, is_finished or is_enough

    def _multiply(self, block: FloatArray) -> FloatArray:
        return self._operator.matmat(block)

    @abstractmethod
    def _estimate(self, steps: int) -> tuple[float, bool]:
        """Compute the estimate after so many steps; return its error, and whether they are enough."""


def _orthonormal(block: FloatArray, smallest: float, most: int) -> tuple[FloatArray, FloatArray]:
    """``vectors @ upper = block`` with orthonormal vectors, without directions of at most ``smallest``."""
    vectors, upper = np.linalg.qr(block)
    left, sizes, right = np.linalg.svd(upper, full_matrices=False)
    kept = min(int((sizes > smallest).sum()), most)
    return vectors @ left[:, :kept], sizes[:kept, None] * right[:kept]
