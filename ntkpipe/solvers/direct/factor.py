"""A Cholesky factor and its uses: linear systems, the log-determinant, the diagonal of the inverse."""

import contextlib
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntkpipe.base.arrays import FloatArray, column_scales, runs, scaled_back
from ntkpipe.base.blas import Pool
from ntkpipe.base.config import check_number
from ntkpipe.base.errors import ConfigError
from ntkpipe.base.operator import Operator
from ntkpipe.base.resources import format_bytes
from ntkpipe.base.tables import TableRows
from ntkpipe.solvers.blocks import as_block
from ntkpipe.solvers.direct.panels import Panels
from ntkpipe.solvers.direct.triangular import Triangle
from ntkpipe.solvers.probe_lanczos import ridge_of_solves, rounded_up
from ntkpipe.solvers.result import Result, Status


@dataclass(frozen=True, kw_only=True)
class DirectSolution(Result):
    """Solution X of (K + shift I) X = B by a Cholesky factor; its residuals are computed with K after the last step."""

    coefficients: FloatArray  # X, of the shape of B
    residuals: FloatArray  # |B - (K + shift I) X| / |B| of each column, shape (r,); zero for a column of zeros
    refinements: int  # steps of refinement
    factor_passes: float  # reads of the whole factor
    factor_bytes_read: int  # from files

    def _rows(self) -> TableRows:
        worst, count = float(self.residuals.max(initial=0.0)), len(self.residuals)
        read = f", {format_bytes(self.factor_bytes_read)}" if self.factor_bytes_read else ""
        return [
            ("residual", f"{worst:.2g}, the largest of {count} column{'' if count == 1 else 's'}"),
            ("factor", f"read {self.factor_passes:.3g} times{read}"),
        ]


@dataclass(frozen=True, kw_only=True)
class CholeskyFactor(Result):
    """``K + shift I = L L'``, as :func:`ntkpipe.cholesky` returns it.

    Every method reads L once or more, as it says. L may be in files, which must stay as they are.
    """

    num_rows: int  # n
    ridge: float  # added to the diagonal as requested
    jitter: float  # added to the diagonal because it was needed and allowed
    logdet: float  # log det(K + shift I) = 2 Σ log L_ii
    smallest_pivot: float  # of the L_ii²
    largest_pivot: float  # of the L_ii²; their ratio is at most the condition number
    num_panels: int  # of L
    panel_width: int  # columns of a panel
    resumed: int  # number of panels that already existed
    path: str | None  # where L is; none if it is in memory
    factor_passes: float  # reads of the whole factor while it was made
    factor_bytes_read: int  # from files while it was made
    factor_bytes_written: int  # to files
    _panels: Panels = field(repr=False, compare=False)
    _operator: Operator = field(repr=False, compare=False)

    @property
    def shift(self) -> float:
        """``ridge + jitter``."""
        return self.ridge + self.jitter

    def storage_floor(self) -> float:
        """Storage floor of the matrix; one pass if it is not known yet."""
        return self._operator.storage_floor()

    def _rows(self) -> TableRows:
        where = "in memory" if self.path is None else f"in {self.path}"
        added = f"{self.ridge:.4g}" + (f", and a jitter of {self.jitter:.4g}" if self.jitter else "")
        written = f", {format_bytes(self.factor_bytes_written)} written" if self.factor_bytes_written else ""
        read = f", {format_bytes(self.factor_bytes_read)} read" if self.factor_bytes_read else ""
        return [
            ("ridge", added),
            ("log det", f"{self.logdet:.12g}"),
            ("pivots", f"{self.smallest_pivot:.4g} to {self.largest_pivot:.4g}"),
            ("factor", f"{self.num_rows:,} rows, {self.num_panels} panels of {self.panel_width:,} columns {where}"),
            ("traffic", f"the factor was read {self.factor_passes:.3g} times{read}{written}"),
        ]

    def solve(self, rhs: ArrayLike, *, refine: int = 1, tol: float = 1e-6) -> DirectSolution:
        """Solve (K + shift I) X = B for all columns together, B of shape (n, r) or (n,).

        Forward and back substitution read L twice, and twice more for every step of refinement, of which there are at
        most ``refine``: one pass for the residual in float64 with the matrix, and its correction (Wilkinson; Higham,
        Accuracy and Stability of Numerical Algorithms, 2nd ed., chapter 12, "fixed precision iterative refinement"). A
        column keeps its solution where a step would make its residual larger. The status is ``converged`` if every
        residual, relative to its column, is at most ``tol``, otherwise ``stagnated``. Memory is four blocks of the
        shape of B and a few chunks of L.
        """
        check_number("refine", refine, low=0)
        check_number("tol", tol, low=0.0)
        start, work, traffic = perf_counter(), self._operator.work, self._panels.traffic
        block = as_block("right-hand sides", rhs, self.num_rows, allow_none=True)
        scales = column_scales(block)
        block = block / scales
        sizes = np.linalg.norm(block, axis=0)
        solution = self._inverse_times(block.copy())
        residual = self._residual(block, solution)
        norms = np.linalg.norm(residual, axis=0)
        taken = 0
        while taken < refine and norms.any():
            solution_next = self._inverse_times(residual)
            solution_next += solution
            residual = self._residual(block, solution_next)
            norms_next = np.linalg.norm(residual, axis=0)
            better = norms_next < norms
            taken += 1
            solution[:, better], norms = solution_next[:, better], np.minimum(norms, norms_next)
            if not better.all():
                break
        relative = np.divide(norms, sizes, out=np.zeros_like(norms), where=sizes > 0)
        worst = float(relative.max(initial=0.0))
        status: Status = "converged" if worst <= tol else "stagnated"
        message = f"residuals are at most {worst:.2g}"
        if status == "stagnated":
            # At least twice what is there and does not do.
            ridge = max(rounded_up(2.0 * self.shift), ridge_of_solves(self._operator, tol))
            message += f", more than tol={tol:.2g}: the matrix is too ill-conditioned for float64. Give an absolute "
            message += f"ridge of at least {ridge:.2g}, or a larger tol"
        used = self._panels.traffic - traffic
        return DirectSolution(
            status=status,
            message=message,
            work=self._operator.work - work,
            seconds=perf_counter() - start,
            options={"ridge": self.ridge, "jitter": self.jitter, "refine": refine, "tol": tol},
            matrix=self.matrix,
            coefficients=scaled_back(solution, scales).reshape(np.shape(rhs)),
            residuals=relative,
            refinements=taken,
            factor_passes=used.passes,
            factor_bytes_read=used.bytes_read,
        )

    def half_solve(self, rhs: ArrayLike, *, transposed: bool = False) -> FloatArray:
        """``inv(L) @ B``, or ``inv(L).T @ B``, of the shape of B; reads L once.

        The squared norm of a column of the first is ``b' (K + shift I)^-1 b``; one after the other they apply the
        inverse.
        """
        block = as_block("right-hand sides", rhs, self.num_rows, allow_none=True).copy()
        return (self._backward(block) if transposed else self._forward(block, 0)).reshape(np.shape(rhs))

    def inverse_diagonal(self, rows: ArrayLike | None = None, *, columns_at_once: int | None = None) -> NDArray[Any]:
        """Entries ``(K + shift I)^-1_ii`` of some rows, by default of all, shape (len(rows),), float64.

        Each is the squared norm of a column of inv(L). With ``alpha = solve(y)`` the exact leave-one-out residual of
        kernel ridge regression is ``alpha_i / inverse_diagonal()_i`` (Rasmussen and Williams, Gaussian Processes for
        Machine Learning, 2006, equation 5.12). Memory is n · columns_at_once float64 numbers and a few chunks of L.
        """
        n = self.num_rows
        wanted = np.arange(n) if rows is None else np.asarray(rows, np.int64).reshape(-1)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < n:
            raise ConfigError(f"rows {wanted.min()} to {wanted.max()} of a matrix that has 0 to {n - 1}")
        at_once = self.panel_width if columns_at_once is None else columns_at_once
        check_number("columns_at_once", at_once, low=1)
        order = np.argsort(wanted, kind="stable")
        found = np.empty(len(wanted))
        for some in runs(len(wanted), at_once):
            places = order[some]
            of_rows = wanted[places]
            # A column of inv(L) begins at its diagonal, so earlier panels contribute nothing.
            first_panel = int(of_rows[0]) // self.panel_width
            first_row = first_panel * self.panel_width
            unit = np.zeros((n - first_row, len(places)))
            unit[of_rows - first_row, np.arange(len(places))] = 1.0
            self._forward(unit, first_panel)
            found[places] = np.einsum("ij,ij->j", unit, unit)
        return found

    def logdet_error(self, *, num_probes: int = 8, seed: int = 0) -> float:
        """Estimate the error of :attr:`logdet` from rounding of the stored entries, to first and second order.

        Reads L twice, and takes one pass for the Frobenius norm if it is not known yet. For float64 entries rounding of
        the arithmetic is of the same size.

        Rounding adds a symmetric E of independent entries of standard deviation s, at most ``eps |K|_F / (2 n)``, see
        :meth:`ntkpipe.base.operator.Operator.storage_floor`. With A = (K + shift I)^-1 the logarithm moves by tr(A E),
        of standard deviation √2 s |A|_F, and by -tr(A E A E) / 2, of mean -s² (tr(A)² + |A|_F²) / 2. The sum of both
        sizes is returned, with probes' estimates of tr(A) and |A|_F².
        """
        check_number("num_probes", num_probes, low=1)
        deviation = self._operator.storage_floor() / (2.0 * self.num_rows**0.5)
        probes = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), (self.num_rows, num_probes))
        half = self._forward(probes, 0)
        trace = float(np.vdot(half, half)) / num_probes
        inverse = self._backward(half)
        squared = float(np.vdot(inverse, inverse)) / num_probes
        return float((2.0 * squared) ** 0.5 * deviation + (trace**2 + squared) * deviation**2 / 2.0)

    def _residual(self, block: FloatArray, solution: FloatArray) -> FloatArray:
        """``B - (K + shift I) X``; one pass."""
        residual = self._operator.matmat(solution)
        residual += self.shift * solution
        return np.subtract(block, residual, out=residual)

    def _inverse_times(self, block: FloatArray) -> FloatArray:
        """Overwrite a block with the solution; reads L twice."""
        return self._backward(self._forward(block, 0))

    def _forward(self, block: FloatArray, first_panel: int) -> FloatArray:
        """Overwrite ``block`` by ``inv(L) @ block``; both begin at the first row of ``first_panel``."""
        shape = self._panels.shape
        origin = first_panel * shape.width
        scratch = np.empty(shape.height * block.shape[1])
        requests = ((p, rows) for p in range(first_panel, shape.num_panels) for rows in shape.chunks(p))
        with Pool.open(self.options["threads"]) as pool, contextlib.closing(self._panels.read(requests)) as chunks:
            for panel, rows, chunk in chunks:
                columns = shape.columns(panel)
                target = block[rows.start - origin : rows.stop - origin]
                inner = min(rows.start, columns.stop) - columns.start
                known = block[columns.start - origin : columns.start - origin + inner]
                pool.subtract_product(target, chunk[:, :inner], known.T, scratch)
                if rows.start < columns.stop:
                    Triangle(chunk[:, inner : inner + len(chunk)]).solve_left(target, transposed=False)
        return block

    def _backward(self, block: FloatArray) -> FloatArray:
        """Overwrite ``block`` by ``inv(L).T @ block``."""
        shape = self._panels.shape
        scratch = np.empty(shape.width * block.shape[1])
        panels = reversed(range(shape.num_panels))
        requests = ((p, rows) for p in panels for rows in reversed(list(shape.chunks(p))))
        with Pool.open(self.options["threads"]) as pool, contextlib.closing(self._panels.read(requests)) as chunks:
            for panel, rows, chunk in chunks:
                columns, target = shape.columns(panel), block[rows]
                inner = min(rows.start, columns.stop) - columns.start
                if rows.start < columns.stop:
                    Triangle(chunk[:, inner : inner + len(chunk)]).solve_left(target, transposed=True)
                unknown = block[columns.start : columns.start + inner]
                pool.subtract_product(unknown, chunk[:, :inner].T, target.T, scratch)
        return block
