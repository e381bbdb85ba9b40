"""Empirical neural tangent kernels at data-set size: exact, verified, resumable, out of core."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntkpipe.api import compute_kernel, kernel_matrix, plan_kernel
    from ntkpipe.config import ClusterSpec
    from ntkpipe.derive import derive_kernel
    from ntkpipe.errors import NtkpipeError
    from ntkpipe.estimate import estimate_cluster
    from ntkpipe.export import export_kernel
    from ntkpipe.kernel import Kernel, KernelStore, open_kernel
    from ntkpipe.upkeep import repair, verify

__version__ = "0.1.0"

# Resolved on first use, so that reading a store loads neither torch nor dask.
_HOMES = {
    "ClusterSpec": "config",
    "Kernel": "kernel",
    "KernelStore": "kernel",
    "NtkpipeError": "errors",
    "compute_kernel": "api",
    "derive_kernel": "derive",
    "estimate_cluster": "estimate",
    "export_kernel": "export",
    "kernel_matrix": "api",
    "open_kernel": "kernel",
    "plan_kernel": "api",
    "repair": "upkeep",
    "verify": "upkeep",
}

__all__ = [
    "ClusterSpec",
    "Kernel",
    "KernelStore",
    "NtkpipeError",
    "compute_kernel",
    "derive_kernel",
    "estimate_cluster",
    "export_kernel",
    "kernel_matrix",
    "open_kernel",
    "plan_kernel",
    "repair",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ntkpipe' has no attribute {name!r}")
    return getattr(import_module(f"ntkpipe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
