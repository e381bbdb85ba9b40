"""Empirical neural tangent kernels at data-set size: exact, verified, resumable, out of core."""

import lazy_loader

from ntkpipe.base.version import VERSION

__version__ = VERSION
# The names are in __init__.pyi and imported on first use, so that reading a store loads neither torch nor dask.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
