"""Leading eigenpairs by block Lanczos with thick restarts."""

from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.blas import single_threaded_blas
from ntkpipe.base.config import Budget, MemoryLimit, check_number
from ntkpipe.base.operator import Operator, Work
from ntkpipe.base.resources import format_bytes
from ntkpipe.solvers.checkpoint import Journal, as_work
from ntkpipe.solvers.eigenpairs import Eigenpairs
from ntkpipe.solvers.memory import bytes_of_eigsh, sizes_of_eigsh
from ntkpipe.solvers.result import Monitor, Status, Step, ignore, recorded
from ntkpipe.solvers.spectral.thick_restart import ThickRestart, rayleigh_ritz
from ntkpipe.store.results import Checkpoint, as_integer, as_number, as_numbers

_EPS = float(np.finfo(np.float64).eps)
_ROUNDING = 50 * _EPS  # of products in float64, relative to the largest eigenvalue: no residual need be smaller
_DEFAULT_K = 100
_MOST_PASSES = 200
_CONFIDENCE = 0.95  # predicted residuals must be below this part of the limit: a check that fails costs a pass
_MOST_FAILURES = 3  # after so many failed checks in a row that did not halve the residual, more passes are no use


@recorded()
@single_threaded_blas()
def eigsh(
    matrix: Any,
    k: int | None = None,
    *,
    tol: float = 1e-6,
    block: int | None = None,
    max_basis: int | None = None,
    max_passes: int | None = None,
    memory_limit: MemoryLimit = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    monitor: Monitor = ignore,
) -> Eigenpairs:
    """The k largest eigenvalues of a symmetric matrix, with eigenvectors.

    Block Lanczos with full reorthogonalisation and thick restarts (Wu and Simon, 2000, "Thick-restart Lanczos method
    for large symmetric eigenvalue problems"; here in blocks), with two changes: where K is small on the residuals,
    vectors get one correction before they are checked, which saves a pass (:meth:`ThickRestart.refined`); and the
    result is judged by one more product with the vectors themselves, not by the residuals of the recurrence.

    A pass has ``block`` columns, the last one, which checks, has k. Kernels of networks take 12 to 15 passes at the
    defaults. Memory is ``(max_basis + 4 block + 3 k) n`` float64, 11 k n at the defaults for large k.

    Converged means that ``|K v - λ v| <= tol max(|λ|, floor)`` for each of the k pairs, or that this is less than the
    rounding of float64 products, ``50 eps λ_1``; the message says for how many pairs floor or rounding decided.

    Parameters
    ----------
    k
        Number of eigenpairs, up to n; default 100, or n if that is less.
    tol
        Relative residual of each pair.
    block
        Columns of a pass; default k/2, at least 8. A smaller block makes passes cheaper but more. An eigenvalue of
        higher multiplicity than this is found, but later.
    max_basis
        Most basis vectors, at least ``k + 2 block``; by default ``5 k + 2 block``, at least ``8 block``. With
        ``3 k + 2 block`` kernels take one pass more.
    max_passes
        Most products before the one that checks; by default 200.
    checkpoint
        Where each pass is saved: one block of columns, or the basis after a restart. A call goes on from there to the
        same bits, and returns a result that is there without a pass. The caller clears it.
    """
    operator: Operator = matrix
    n, passes = operator.num_rows, _MOST_PASSES if max_passes is None else max_passes
    k = min(_DEFAULT_K, n) if k is None else int(check_number("k", k, low=1, high=n))
    check_number("tol", tol, low=0.0, high=1.0)
    width, most = sizes_of_eigsh(n, k, block, max_basis)
    check_number("block", width, low=1)
    check_number("max_basis", most, low=min(n, k + 2 * width))
    check_number("max_passes", passes, low=1)
    need, least = (bytes_of_eigsh(n, k, block=width, max_basis=number) for number in (most, k + 2 * width))
    advice = f"give a smaller max_basis (with {k + 2 * width} it is {format_bytes(least)}), k or block"
    Budget.of(memory_limit).require(need, f"a basis of {most} vectors of {n} rows, with room to work,", advice)
    options = {"tol": float(tol), "k": k, "block": width, "max_basis": most, "max_passes": passes, "seed": seed}
    return _Search(operator, options, checkpoint).run(monitor)


class _Search:
    """One call of :func:`eigsh`."""

    def __init__(self, operator: Operator, options: Mapping[str, Any], checkpoint: Checkpoint | None) -> None:
        self._operator, self._options = operator, options
        self._k, self._tol = int(options["k"]), float(options["tol"])
        width, most = int(options["block"]), int(options["max_basis"])
        # A restart keeps many pairs beside the wanted ones, since they filter for them, and makes room for new blocks.
        keep = max(self._k, min(self._k + width, most - width), most - 4 * width)
        self._space = ThickRestart(operator.num_rows, width, most, keep, int(options["seed"]))
        self._start, self._started, self._earlier = operator.work, perf_counter(), (Work(), 0.0)
        self._history: list[list[float]] = []
        # The excess of each check that failed, and the pass that it followed.
        self._failures: list[tuple[int, float]] = []
        self._floor = 0.0
        # Everything that decides the numbers.
        decides = {name: value for name, value in options.items() if name != "max_passes"}
        decides |= {"solver": "eigsh", "matrix": operator.identity()}
        self._journal = Journal(checkpoint, decides, key="key")

    def run(self, monitor: Monitor) -> Eigenpairs:
        """Run from the beginning, or from the checkpoint."""
        with self._journal.reading():
            finished = None if self._journal.earlier is None else self._restore(self._journal.earlier)
        while finished is None:
            residual: float | None
            if self._is_time_to_check():
                # Refined vectors are no Ritz vectors; Rayleigh-Ritz within their span costs no further pass.
                vectors = self._space.combine(self._space.refined(self._k).coordinates)
                pairs = rayleigh_ritz(self._operator, vectors, descending=True)
                excess = float((pairs[2] / self._limits(pairs[0])).max())
                status, residual = self._judge(excess), excess * self._tol
                finished = None if status is None else self._result(status, *pairs)
            else:
                self._space.advance(self._operator, self._k, self._limits)
                residual = self._note()
            self._save(finished)
            monitor(Step(self._work(), residual, self._tol))
        return finished

    def _scale(self, values: FloatArray) -> FloatArray:
        return np.maximum(np.abs(values), max(self._floor, np.finfo(np.float64).tiny))

    def _limits(self, values: FloatArray) -> FloatArray:
        rounding = _ROUNDING * float(np.abs(values).max(initial=0.0))
        return np.maximum(self._tol * self._scale(values), max(rounding, np.finfo(np.float64).tiny))

    def _note(self) -> float | None:
        """Add the pass to the history; return its largest relative residual, if there is one."""
        found = self._space.ritz(self._space.size)
        eps = float(np.finfo(self._operator.storage_dtype).eps)
        self._floor = eps * float(np.linalg.norm(found.values)) / self._operator.num_rows**0.5
        if self._space.size < self._k:
            self._history.append([np.nan, np.nan])
            return None
        values, norms = found.values[: self._k], found.residuals[: self._k]
        largest = float(np.abs(found.values).max())
        residual = float((norms / self._scale(values)).max())
        self._history.append([float(norms.max()) / largest if largest else 0.0, residual])
        return residual

    def _is_time_to_check(self) -> bool:
        space = self._space
        if space.size < self._k or (self._failures and self._failures[-1][0] == space.passes):
            return False
        if space.is_whole or space.passes >= self._options["max_passes"]:
            return True
        found = space.refined(self._k)
        limits = _CONFIDENCE * self._limits(found.values)
        return space.is_settled and bool((found.residuals <= limits).all())

    def _judge(self, excess: float) -> Status | None:
        if excess <= 1.0:
            return "converged" if self._space.is_settled else "not converged"
        if self._space.is_whole:
            return "stagnated"
        if self._space.passes >= self._options["max_passes"]:
            return "step limit"
        self._failures.append((self._space.passes, excess))
        recent = [failed for _, failed in self._failures[-_MOST_FAILURES:]]
        if len(recent) == _MOST_FAILURES and min(recent[1:]) > recent[0] / 2:
            return "stagnated"
        return None

    def _result(self, status: Status, values: FloatArray, vectors: FloatArray, norms: FloatArray) -> Eigenpairs:
        residuals = norms / self._scale(values)
        gram = vectors.T @ vectors
        gram[np.diag_indices_from(gram)] -= 1.0
        return Eigenpairs(
            status=status,
            message=self._message(status, values, residuals),
            work=self._earlier[0],
            seconds=self._earlier[1],
            options=self._options,
            eigenvalues=values,
            eigenvectors=vectors,
            residuals=residuals,
            orthogonality=float(np.abs(gram).max()),
            floor=self._floor,
            history=np.array(self._history).reshape(-1, 2),
        )

    def _message(self, status: Status, values: FloatArray, residuals: FloatArray) -> str:
        k, tol, worst = self._k, self._tol, float(residuals.max())
        met = int((residuals <= tol).sum())
        below = int((np.abs(values) < self._floor).sum())
        notes = []
        if below:
            notes.append(f"{below} eigenvalues lie below the storage floor {self._floor:.2g} and are not known")
        if status == "converged":
            if met < k:
                notes.append(f"{k - met} residuals are at the rounding of float64 products, up to {worst:.2g}")
            return "; ".join([f"{met} of {k} residuals from a product with the vectors are within {tol:g}", *notes])
        why = {
            "step limit": f"{met} of {k} residuals are within {tol:g}, the largest is {worst:.2g}; raise max_passes",
            "not converged": "the space was exhausted and its replacement is not settled; raise max_passes",
        }.get(status, f"residuals stay at {worst:.2g}, {met} of {k} are within {tol:g}; raise tol")
        return "; ".join([why, *notes])

    def _work(self) -> Work:
        return self._earlier[0] + (self._operator.work - self._start)

    def _save(self, result: Eigenpairs | None) -> None:
        state: dict[str, Any] = {"floor": self._floor, "history": self._history, "space": self._space.state()}
        seconds = self._earlier[1] + perf_counter() - self._started
        state |= {"failures": self._failures, "work": self._work(), "seconds": seconds}
        arrays = self._space.arrays()
        if result is not None:
            arrays |= {f"result-{name}": values for name, values in result.arrays().items()}
            fields = {name: getattr(result, name) for name in ("status", "message", "orthogonality")}
            state["result"] = {**fields, "max_passes": self._options["max_passes"]}
        self._journal.save(state, arrays)

    def _restore(self, state: Mapping[str, Any]) -> Eigenpairs | None:
        """Return the result in the state if it answers this call; else restore the space."""
        self._earlier = as_work(state["work"]), as_number(state["seconds"])
        self._floor, num_passes = as_number(state["floor"]), as_integer(state["space"]["passes"])
        self._history = as_numbers(state["history"], (num_passes, 2), allow_nan=True).tolist()
        self._failures = [(as_integer(passes), as_number(excess)) for passes, excess in state["failures"]]
        result = state.get("result")
        is_short = result is not None and as_integer(result["max_passes"]) < self._options["max_passes"]
        if result is None or (is_short and result["status"] == "step limit"):
            self._space.restore(self._journal.get, state["space"])
            return None
        k = self._k
        shapes = {"eigenvalues": (k,), "eigenvectors": (self._operator.num_rows, k), "residuals": (k,)}
        arrays = {name: self._journal.get(f"result-{name}", shape) for name, shape in shapes.items()}
        history = self._journal.get("result-history", (num_passes, 2), allow_nan=True)
        fields = {name: result[name] for name in ("status", "message", "orthogonality")}
        found = Eigenpairs.from_saved({**fields, "floor": self._floor, "history": history, **arrays})
        return replace(found, work=self._earlier[0], seconds=self._earlier[1], options=self._options)
