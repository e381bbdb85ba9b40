"""Arrays: a short name of their type, and their digest."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def digest_of(values: NDArray[Any]) -> str:
    """Digest of an array's dtype, shape and entries."""
    digest = hashlib.sha256(f"{values.dtype.str} {values.shape} ".encode())
    digest.update(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()
