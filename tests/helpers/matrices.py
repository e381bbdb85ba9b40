"""For tests of operators and solvers, here and in other packages: matrices of known spectrum, checks of operators."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.base.operator import Operator

# Twice the unit roundoff, since both the computed and the reference product are rounded.
_EPS = float(np.finfo(np.float64).eps)
_TINY = float(np.finfo(np.float64).tiny)


def matrix_with_spectrum(eigenvalues: ArrayLike, *, seed: int = 0) -> FloatArray:
    """An exactly symmetric matrix with these eigenvalues and random eigenvectors."""
    values = np.asarray(eigenvalues, np.float64)
    rng = np.random.default_rng(seed)
    vectors, upper = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    vectors *= np.sign(np.diagonal(upper))
    matrix = (vectors * values) @ vectors.T
    return np.asarray((matrix + matrix.T) / 2, np.float64)


def power_law(num_rows: int, *, condition: float, largest: float = 1e4) -> FloatArray:
    """Eigenvalues ``largest * i^-p`` with p such that the last is ``largest / condition``, descending."""
    exponent = np.log(condition) / np.log(num_rows)
    return np.asarray(largest * np.arange(1, num_rows + 1) ** -exponent, np.float64)


def spectra(num_rows: int) -> Mapping[str, FloatArray]:
    """Spectra that solvers must cope with, by name, each in descending order.

    Power laws, which neural tangent kernels have, at condition numbers of 1e4 to 1e10; clusters of equal eigenvalues; a
    few large ones over a floor; a singular spectrum of rank 3n/4; and an indefinite one, as rounding to float32 makes.
    """
    n = num_rows
    found = {f"power_law_1e{digits}": power_law(n, condition=10.0**digits) for digits in (4, 6, 8, 10)}
    found["clustered"] = np.sort(np.repeat([1e3, 1e2, 10.0, 1.0], -(-n // 4))[:n])[::-1]
    found["spiked"] = np.concatenate([np.geomspace(1e5, 1e3, min(10, n)), np.ones(max(0, n - 10))])
    found["singular"] = np.concatenate([power_law(3 * n // 4, condition=1e4), np.zeros(n - 3 * n // 4)])
    rounded = power_law(n, condition=1e8)
    negative = -1e-4 * np.arange(1, n // 10 + 1) / max(1, n // 10)
    found["indefinite"] = np.concatenate([rounded[: n - len(negative)], negative])
    return found


def check_operator(
    make: Callable[[NDArray[Any]], Operator],
    *,
    sizes: Iterable[int] = (1, 2, 7, 40),
    dtypes: Iterable[DTypeLike] = (np.float32, np.float64),
    rounding: float = 0.0,
) -> None:
    """Check everything that solvers rely on in an implementation of :class:`ntkpipe.base.operator.Operator`.

    Products are compared with those of the entries in float64, up to rounding: with u the unit roundoff of float64, a
    sum of n products has an error of at most n u times the sum of their sizes (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1), and a computed and a reference product differ by twice that. An implementation
    that multiplies in float32 fails.
    """
    for num_rows in sizes:
        for dtype in dtypes:
            for name, matrix in _matrices(num_rows, np.dtype(dtype)).items():
                _Contract(make, matrix, rounding, f"{name} matrix, {num_rows} rows, {np.dtype(dtype)}").check()


def _matrices(num_rows: int, dtype: np.dtype[Any]) -> dict[str, NDArray[Any]]:
    """A positive definite and an indefinite matrix, neither of zero mean."""
    spectrum = power_law(num_rows, condition=1e4) if num_rows > 1 else np.array([3.0])
    definite = matrix_with_spectrum(spectrum) + 1.0
    rough = np.random.default_rng(1).standard_normal((num_rows, num_rows))
    return {"definite": definite.astype(dtype), "indefinite": (rough + rough.T).astype(dtype)}


class _Contract:
    """The checks with one matrix."""

    def __init__(
        self, make: Callable[[NDArray[Any]], Operator], matrix: NDArray[Any], rounding: float, of: str
    ) -> None:
        self._make = make
        self._matrix = matrix
        self._dense = matrix.astype(np.float64)
        self._rounding = rounding * float(np.abs(self._dense).max())
        self._of = of
        self._rng = np.random.default_rng(0)
        self._operator = make(matrix)

    def check(self) -> None:
        self._attributes()
        self._blocks()
        self._algebra()
        self._entries(self._operator, self._dense, float(np.abs(self._dense).max()), "")
        self._statistics_are_kept()
        self._work()
        self._views()
        self._solvers_of_others()
        self._refusals()
        self._after_close()

    def _require(self, holds: bool | np.bool_, what: str, detail: str = "") -> None:
        if not holds:
            raise AssertionError(f"{what} ({self._of}){': ' if detail else ''}{detail}")

    def _near(self, found: NDArray[Any], wanted: NDArray[Any], bound: NDArray[Any] | float, what: str) -> None:
        self._require(found.shape == wanted.shape, what, f"shape {found.shape}; needed {wanted.shape}")
        self._require(found.dtype == np.float64, what, f"dtype {found.dtype}; needed float64")
        error = np.abs(found - wanted)
        self._require(bool((error - bound <= 0).all()), what, f"off by {error.max(initial=0):.3g}")

    def _product(self, found: NDArray[Any], block: FloatArray, what: str) -> None:
        self._near(found, self._dense @ block, self._product_bound(block), what)

    def _product_bound(self, block: FloatArray) -> FloatArray:
        sizes = np.abs(block)
        of_sums = len(self._dense) * _EPS * (np.abs(self._dense) @ sizes)
        return np.asarray(of_sums + self._rounding * sizes.sum(axis=0) + _TINY, np.float64)

    def _attributes(self) -> None:
        operator, n = self._operator, len(self._dense)
        self._require(operator.num_rows == n and operator.shape == (n, n), "shape is that of the matrix")
        self._require(operator.dtype == np.float64, "dtype is that of products, float64")
        self._require(operator.identity() == self._make(self._matrix).identity(), "identity is that of equal entries")

    def _blocks(self) -> None:
        n = len(self._dense)
        block = self._rng.standard_normal((n, 3))
        apart = np.zeros((n, 6))
        apart[:, ::2] = block
        whole = self._rng.integers(-9, 9, (n, 2))
        unaligned = np.zeros(block.nbytes + 1, np.uint8)[1:].view(np.float64).reshape(n, 3)
        unaligned[:] = block
        before = block.copy()
        product = self._operator.matmat(block)
        self._require(np.array_equal(block, before), "matmat leaves the block as it is")
        self._product(product, block, "matmat of a block is float64's to rounding")
        self._require(product.flags.writeable and product.base is not block, "matmat gives new memory")
        same = {
            "again": block,
            "in Fortran order": np.asfortranarray(block),
            "of strided columns": apart[:, ::2],
            "at an odd address": unaligned,
            "of big-endian numbers": block.astype(">f8"),
            "as lists": block.tolist(),
        }
        for how, each in same.items():
            self._require(np.array_equal(self._operator.matmat(each), product), f"matmat {how} has equal bits")
        self._require(np.array_equal(self._operator @ block, product), "@ is matmat")
        vector = self._operator.matmat(block[:, 0])
        self._product(vector, block[:, 0], "matmat of a vector is float64's")
        self._near(self._operator.matmat(block[:, :1])[:, 0], vector, 0.0, "a vector is a block of one column")
        for each in (whole, block.astype(np.float32), whole > 0):
            self._product(self._operator.matmat(each), each.astype(np.float64), f"matmat of {each.dtype}")
        self._near(self._operator.matmat(np.zeros((n, 0))), np.zeros((n, 0)), 0.0, "matmat of no columns")
        self._near(self._operator.matmat(np.zeros(n)), np.zeros(n), 0.0, "matmat of zeros")

    def _algebra(self) -> None:
        n = len(self._dense)
        x, y = self._rng.standard_normal((2, n))
        of_x, of_y = self._operator.matmat(x), self._operator.matmat(y)
        size = float(np.abs(x) @ (self._product_bound(y) + len(x) * _EPS * np.abs(of_y)))
        self._require(abs(float(x @ of_y - y @ of_x)) <= 2 * size, "products are symmetric: x'Ky = y'Kx")
        bound = 2 * (2 * self._product_bound(x) + 3 * self._product_bound(y))
        self._near(self._operator.matmat(2 * x - 3 * y), 2 * of_x - 3 * of_y, bound, "products are linear")

    def _entries(self, operator: Operator, dense: FloatArray, size: float, of: str) -> None:
        """Check columns, blocks and statistics; they are exact unless the operator is a view ``of`` another."""
        n = len(dense)
        off = self._rounding * size / max(float(np.abs(self._dense).max()), _TINY) if of else self._rounding
        off += 16 * n * _EPS * size if of else 0.0
        numbers = self._rng.integers(0, n, 5)
        self._near(operator.columns(numbers), dense[:, numbers], off, f"columns{of}, repeated and in any order")
        self._near(operator.columns([]), np.zeros((n, 0)), 0.0, f"no columns{of}")
        for first, last, left, right in ((0, n, n // 2, n), (n // 3, n, 0, n // 2), (0, 0, 0, n)):
            rows, columns = slice(first, last), slice(left, right)
            found = operator.block(rows, columns)
            self._near(found, dense[rows, columns], off, f"block{of} of {rows} and {columns}")
            self._require(found.flags.c_contiguous and found.flags.writeable, f"a block{of} is contiguous and new")
        self._near(operator.diagonal(), dense.diagonal(), off, f"diagonal{of}")
        error = abs(operator.trace() - float(dense.trace()))
        self._require(error <= n * (off + 2 * _EPS * n * size), f"trace{of} is the sum of the diagonal")
        squared, wanted = operator.frobenius() ** 2, float(np.vdot(dense, dense))
        is_near = abs(squared - wanted) <= n * n * (2 * off * size + 16 * n * _EPS * size**2)
        self._require(is_near, f"Frobenius norm{of}", f"{squared**0.5:.17g}; needed {wanted**0.5:.17g}")

    def _statistics_are_kept(self) -> None:
        operator = self._make(self._matrix)
        before = operator.work.passes
        first = operator.statistics()
        once = operator.work.passes - before
        operator.diagonal(), operator.trace(), operator.frobenius(), operator.storage_floor()
        self._require(operator.statistics() is first, "statistics are found once")
        self._require(operator.work.passes - before == once, "statistics that are known cost nothing")
        eps = float(np.finfo(operator.storage_dtype).eps)
        wanted = eps * operator.frobenius() / len(self._dense) ** 0.5
        self._require(abs(operator.storage_floor() - wanted) <= 1e-9 * wanted, "storage floor is eps |K|_F / sqrt(n)")

    def _work(self) -> None:
        operator, n = self._operator, len(self._dense)
        before = operator.work
        for columns in (1, 5):
            operator.matmat(np.ones((n, columns)))
        cost = operator.work - before
        is_one = abs(cost.passes - 2) < 1e-9
        self._require(is_one, "a product is one pass, whatever the columns", f"{cost.passes / 2:.6g}")
        self._require(cost.bytes_read >= 0 and cost.seconds >= 0, "work does not become less")
        before = operator.work
        operator.columns([0])
        self._require(0 <= (operator.work - before).passes < 1 + 1e-9, "a column costs at most a pass")

    def _views(self) -> None:
        operator, dense, n = self._operator, self._dense, len(self._dense)
        eye, part = np.eye(n), (n + 1) // 2
        centring, of_part = eye - 1.0 / n, np.eye(part) - 1.0 / part
        centred, shifted, double = centring @ dense @ centring, dense + 0.3 * eye, np.kron(dense, np.eye(2))
        views: dict[str, tuple[Operator, NDArray[Any]]] = {
            "shifted": (operator.shifted(0.3), shifted),
            "shifted to a negative side": (operator.shifted(-2.5), dense - 2.5 * eye),
            "scaled": (operator.scaled(-1.7), -1.7 * dense),
            "centred": (operator.centred(), centred),
            "of several outputs": (operator.kronecker(3), np.kron(dense, np.eye(3))),
            "leading": (operator.leading(part), dense[:part, :part]),
            "scaled and shifted": (operator.scaled(0.5).shifted(0.3), 0.5 * dense + 0.3 * eye),
            "shifted and centred": (operator.shifted(0.3).centred(), centring @ shifted @ centring),
            "centred and shifted": (operator.centred().shifted(0.3), centred + 0.3 * eye),
            "leading and centred": (operator.leading(part).centred(), of_part @ dense[:part, :part] @ of_part),
            "centred and leading": (operator.centred().leading(part), centred[:part, :part]),
            "shifted and leading": (operator.shifted(0.3).leading(part), shifted[:part, :part]),
            "shifted and of several outputs": (operator.shifted(0.3).kronecker(2), np.kron(shifted, np.eye(2))),
            "of several outputs and leading": (operator.kronecker(2).leading(part + 1), double[: part + 1, : part + 1]),
        }
        size = 2 * float(np.abs(dense).max()) + 3.0
        for name, (view, wanted) in views.items():
            of = f" of the matrix {name}"
            block = self._rng.standard_normal((len(wanted), 2))
            rounding = 16 * len(wanted) * _EPS * size + 2 * self._rounding
            for each in (block, block[:, 0]):
                self._near(view.matmat(each), wanted @ each, rounding * np.abs(each).sum(axis=0), f"product{of}")
            self._entries(view, wanted, size, of)
            self._require(view.shape == wanted.shape, f"shape{of}")
            self._require(view.storage_floor() >= 0.0, f"storage floor{of}")
            self._require((view.identity() == operator.identity()) == (view is operator), f"identity{of}")
        for unchanged in (operator.shifted(0.0), operator.scaled(1.0), operator.kronecker(1), operator.leading(n)):
            self._require(unchanged is operator, "a view of the same is the operator")

    def _solvers_of_others(self) -> None:
        from scipy.sparse.linalg import cg, eigsh

        n = len(self._dense)
        if n < 4:
            return
        values = np.linalg.eigvalsh(self._dense)
        largest = float(np.abs(values).max())
        start = np.ones(n)
        found = eigsh(self._operator.aslinearoperator(), k=2, which="LA", v0=start, return_eigenvectors=False)
        off = 1e-10 * largest + n * self._rounding
        self._near(np.sort(found), values[-2:], off, "scipy's eigsh finds the largest eigenvalues")
        shift = 2 * largest
        right = self._rng.standard_normal(n)
        solution, failed = cg(self._operator.shifted(shift).aslinearoperator(), right, rtol=1e-12, atol=0.0)
        wanted = np.linalg.solve(self._dense + shift * np.eye(n), right)
        self._require(failed == 0, "scipy's cg converges")
        off = (1e-10 + n * self._rounding / shift) * float(np.abs(wanted).max())
        self._near(solution, wanted, off, "scipy's cg solves a shifted system")

    def _refusals(self) -> None:
        operator, n = self._operator, len(self._dense)
        bad = np.ones((n, 2))
        bad[n // 2, 1] = np.nan
        infinite = np.full(n, np.inf)
        cases: list[tuple[str, type[Exception], Callable[[], object]]] = [
            ("a block of too many rows", ConfigError, lambda: operator.matmat(np.ones(n + 1))),
            ("a block of too few rows", ConfigError, lambda: operator.matmat(np.ones((n - 1, 2)))),
            ("a block of three axes", ConfigError, lambda: operator.matmat(np.ones((n, 2, 2)))),
            ("a number for a block", ConfigError, lambda: operator.matmat(1.0)),
            ("a complex block", ConfigError, lambda: operator.matmat(np.ones(n, complex))),
            ("a block with NaN", NonFiniteError, lambda: operator.matmat(bad)),
            ("a block with infinity", NonFiniteError, lambda: operator.matmat(infinite)),
            ("a column beyond the last", ConfigError, lambda: operator.columns([0, n])),
            ("a negative column", ConfigError, lambda: operator.columns([-1])),
            ("a block of entries beyond the last", ConfigError, lambda: operator.block(slice(0, n + 1), slice(0, n))),
            ("a block of entries with a step", ConfigError, lambda: operator.block(slice(0, n, 2), slice(0, n))),
            ("leading(0)", ConfigError, lambda: operator.leading(0)),
            ("a leading block that is larger", ConfigError, lambda: operator.leading(n + 1)),
            ("kronecker(0)", ConfigError, lambda: operator.kronecker(0)),
        ]
        for what, error, act in cases:
            try:
                act()
            except error:
                continue
            except Exception as other:
                raise AssertionError(f"{what} raises {error.__name__} ({self._of}): it raises {other!r}") from other
            self._require(False, f"{what} raises {error.__name__}", "nothing is raised")

    def _after_close(self) -> None:
        block = self._rng.standard_normal((len(self._dense), 2))
        before = self._operator.matmat(block)
        self._operator.close()
        self._operator.close()
        self._require(np.array_equal(self._operator.matmat(block), before), "products after close have equal bits")
