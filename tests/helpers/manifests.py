"""Manifests of small stores."""

from typing import Any

from ntkpipe.base.kinds import get_kind
from ntkpipe.store.manifest import ArrayRecord, Choices, DataRecord, Manifest, ModelRecord

# Arrays of a store with a test set, of one output and no groups.
ROOT_KEYS = {
    "kernel/train",
    "kernel/test_train",
    "kernel/test_diagonal",
    "samples/train/input",
    "samples/test/input",
    "targets/train",
    "targets/test",
    "outputs/train",
    "outputs/test",
}


def _data(num_samples: int) -> DataRecord:
    return DataRecord(
        num_samples=num_samples,
        inputs={"input": ArrayRecord(shape=(4,), dtype="float32")},
        is_mapping=False,
        inputs_digest="0" * 64,
        targets=ArrayRecord(shape=(), dtype="int64"),
        targets_digest="1" * 64,
    )


def small_manifest(
    num_train: int = 7, num_test: int | None = 5, *, num_outputs: int = 2, tile: int = 3, **fields: Any
) -> Manifest:
    kind = fields.pop("kind", "ntk")
    defaults: dict[str, Any] = {
        "format": 1,
        "kind": kind,
        "convention": get_kind(kind).convention,
        "num_outputs": num_outputs,
        "num_covectors": get_kind(kind).num_covectors(num_outputs),
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
