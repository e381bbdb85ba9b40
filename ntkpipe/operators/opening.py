"""The operator of what users have: a stored kernel, an array, or an operator already."""

from numpy.typing import ArrayLike

from ntkpipe.operators.dense import DenseOperator
from ntkpipe.operators.operator import Operator


def as_operator(matrix: Operator | ArrayLike) -> Operator:
    """The operator of a matrix.

    Parameters
    ----------
    matrix
        An operator, which is returned as it is, or a symmetric array of shape (n, n).

    Raises
    ------
    ConfigError
        If it is no symmetric matrix.
    NonFiniteError
        If an array holds NaN or infinity.
    """
    return matrix if isinstance(matrix, Operator) else DenseOperator(matrix)
