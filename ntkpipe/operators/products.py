"""A symmetric matrix that another library multiplies: sparse ones, and linear operators."""

from time import perf_counter
from typing import Any

import numpy as np

from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.errors import ConfigError, NonFiniteError
from ntkpipe.base.given import dtype_of, real_dtype, require_square
from ntkpipe.base.operator import Operator, Work, digest_of
from ntkpipe.base.paths import said

_PROBES = 4


class ProductOperator(Operator):
    """A sparse matrix or linear operator: whatever has ``shape``, ``dtype`` and products ``matrix @ block``.

    Entries are products with unit vectors, n of them where diagonal and Frobenius norm are asked for.
    """

    work = Work()

    def __init__(self, matrix: Any, name: str = "the matrix") -> None:
        shape = tuple(matrix.shape)
        require_square(name, shape)
        dtype = real_dtype(name, shape, dtype_of(matrix))
        super().__init__(shape[0], dtype)
        self._matrix, self._name = matrix, name
        self._require_symmetric(float(np.finfo(dtype).eps))

    def _require_symmetric(self, eps: float) -> None:
        """Compare X'KY with (Y'KX)' for random vectors; keep the products, by which the matrix is named."""
        probes = np.random.default_rng(0).standard_normal((self.num_rows, _PROBES))
        products = self.matmat(probes)
        forms = probes.T @ products
        size = float(np.linalg.norm(probes) * np.linalg.norm(products))
        gap = float(np.abs(forms - forms.T).max())
        if gap > 100 * eps * size:
            raise ConfigError(
                f"{self._name} is not symmetric: x'Ky and y'Kx of random vectors differ by {gap:.3g}, and are at most "
                f"{size:.3g}; give (K + K.T) / 2, if that is meant"
            )
        self._identity = digest_of(products)

    def identity(self) -> str:
        """See :meth:`Operator.identity`: the digest of products with fixed vectors."""
        return self._identity

    def _multiply(self, block: FloatArray) -> FloatArray:
        start = perf_counter()
        try:
            product = np.asarray(self._matrix @ block, np.float64)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            what = f"{self._name}: a {type(self._matrix).__name__} whose product with a block of columns fails"
            raise ConfigError(
                f"{what} ({said(error)}); give an array, or a scipy.sparse.linalg.LinearOperator"
            ) from error
        if product.shape != block.shape:
            raise ConfigError(f"{self._name}: a product of shape {product.shape} with a block of shape {block.shape}")
        if not np.isfinite(product).all():
            raise NonFiniteError(f"{self._name} holds NaN or infinity: its product with finite numbers does")
        self.work += Work(1.0, 0, perf_counter() - start)
        return np.array(product, order="C", copy=None)
