"""The face of the package: names are there without what makes them, and imported on first use."""

import subprocess
import sys

import pytest

import ntkpipe

HEAVY = ("torch", "dask", "numpy", "zarr", "scipy", "matplotlib")


def loaded(code: str) -> set[str]:
    """Which of the heavy libraries a program loads."""
    code = f"import sys, ntkpipe\n{code}\nprint(*({set(HEAVY)} & set(sys.modules)))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_every_name_is_there_and_no_other() -> None:
    assert dir(ntkpipe) == ntkpipe.__all__ == sorted(set(ntkpipe.__all__))
    assert len(ntkpipe.__all__) > 30
    assert all(getattr(ntkpipe, name).__name__.rpartition(".")[2] == name for name in ntkpipe.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ntkpipe.nonsense
    assert ntkpipe.__version__


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded("dir(ntkpipe)") == set()
    assert not loaded("ntkpipe.open_kernel") & {"torch", "dask", "zarr", "matplotlib"}
