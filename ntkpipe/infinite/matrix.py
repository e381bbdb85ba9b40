"""Kernels of infinite width in memory."""

from math import prod

import numpy as np

from ntkpipe.base.arguments import checked
from ntkpipe.base.arrays import FloatArray
from ntkpipe.base.blas import Pool
from ntkpipe.base.config import Budget, MemoryLimit
from ntkpipe.base.given import as_array
from ntkpipe.infinite.networks import Network, as_network


@checked
def infinite_kernel_matrix(
    net: Network,
    x: object,
    other: object = None,
    *,
    memory_limit: MemoryLimit = None,
    force: bool = False,
) -> FloatArray:
    """Covariance and tangent kernel of a network of infinite width, in memory, from one recursion [1]_ [2]_.

    An entry depends on its two samples alone, to the last bit: rows may be computed in parts, in any order, and by any
    number of threads, and :func:`ntkpipe.compute_infinite_kernel` stores the same numbers.

    Parameters
    ----------
    net
        A :class:`ntkpipe.infinite.FullyConnected`, ``Convolutional`` or ``Sequential``.
    x
        n samples: features (n, n₀), or images (n, C, H, W). They are taken in float64.
    other
        m other samples for the columns; default the samples themselves.
    force
        Whether to begin with pairs of images that take more than about a day.

    Returns
    -------
    Array (2, n, m) of float64: the NNGP Σ(x, x'), which is the covariance of an output over initialisations, then the
    NTK Θ(x, x'). Those of several outputs are the same, and zero between outputs. Beside this array a thread takes
    12 MiB and up to 4,352 samples, copied where their number is no multiple of 64; and there is what layers keep of
    each sample: three numbers an activation in closed form, 262 in a series.

    Raises
    ------
    ConfigError
        If an option is wrong, images do not fit a layer, an integral does not converge (undeclared kinks), or a
        kernel leaves the range of float64; the message names the layer.
    DataError
        If samples have no features, or hold NaN or infinity.
    ResourceError
        If the array does not fit the memory, or images take days.

    References
    ----------
    .. [1] Jacot, Gabriel, Hongler (2018). Neural Tangent Kernel: Convergence and Generalization in Neural Networks.
       NeurIPS. Theorem 1.
    .. [2] Lee, Xiao, Schoenholz, Bahri, Novak, Sohl-Dickstein, Pennington (2019). Wide Neural Networks of Any Depth
       Evolve as Linear Models Under Gradient Descent. NeurIPS. arXiv:1902.06720.

    Examples
    --------
    >>> import numpy as np, ntkpipe
    >>> net = ntkpipe.infinite.FullyConnected(hidden=2, activation="relu", W_std=2**0.5)
    >>> ntkpipe.infinite_kernel_matrix(net, np.eye(2)).round(4)[1]
    array([[3.    , 0.6857],
           [0.6857, 3.    ]])
    """
    net, samples, others = as_network(net), as_array("x", x), None if other is None else as_array("other", other)
    if samples.ndim == 4:
        num_columns = (len(samples) + 1) / 2 if others is None else others.size // max(1, samples[0].size)
        net.require_time(samples.shape[1:], len(samples) * num_columns, force=force)
    rows = net.prepare(samples)
    columns = rows if others is None else net.prepare(others)
    shape = (2, len(rows), len(columns))
    advice = "use compute_infinite_kernel, which writes a store"
    Budget.of(memory_limit).require(8.0 * prod(shape), f"an array {shape} of both kernels", advice, share=0.7)
    found = np.empty(shape)
    with Pool.open() as pool:
        net.fill(rows, columns, found, pool)
    return found
