"""The JSON documents of a store, ``zarr.json``: written as Zarr does, read as what anybody may have written."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ntkpipe.base.errors import StoreError

# What a reader decodes by; attributes and names of dimensions are for people.
_DECISIVE = (
    "zarr_format",
    "node_type",
    "shape",
    "data_type",
    "chunk_grid",
    "chunk_key_encoding",
    "codecs",
    "fill_value",
    "storage_transformers",
)


def parse(data: bytes, where: str, *, allow_nan: bool = False) -> Any:
    """JSON as the standard has it: UTF-8, no key twice, and no NaN unless it is allowed."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"it holds {constant}, which is no number")

    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_repetition,
            parse_constant=None if allow_nan else refuse,
        )
    except RecursionError:
        raise StoreError(f"{where} is damaged: nested too deeply") from None
    except ValueError as error:
        raise StoreError(f"{where} is damaged or no JSON: {error}") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def group_document(attributes: dict[str, Any]) -> bytes:
    """A Zarr group of attributes alone."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(document, indent=1).encode()


def group_attributes(data: bytes, where: str, *, allow_nan: bool = False) -> dict[str, Any]:
    """The attributes of a Zarr group."""
    document = parse(data, where, allow_nan=allow_nan)
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict):
        raise StoreError(f"{where} is damaged or no Zarr v3 group: it has no attributes")
    return attributes


def array_document(
    *, shape: Sequence[int], chunks: Sequence[int], dtype: np.dtype[Any], fill_value: float, dimensions: Sequence[str]
) -> bytes:
    """A Zarr array of uncompressed chunks, each followed by its crc32c."""
    # Zarr takes longer to import than everything else that reads a store, and only writers need it.
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    documents: dict[str, Any] = {}
    zarr.create_array(
        zarr.storage.MemoryStore(documents),
        shape=tuple(shape),
        chunks=tuple(chunks),
        dtype=dtype,
        fill_value=fill_value,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        filters=None,
        dimension_names=tuple(dimensions),
        config={"write_empty_chunks": True},
    )
    data: bytes = documents["zarr.json"].to_bytes()
    return data


def array_difference(found: bytes, needed: bytes, where: str) -> str | None:
    """How an array's document differs from the one that is needed, in words, or none.

    Documents are compared, and the found one is not given to Zarr: it may name codecs and dtypes of anybody's.
    """
    left, right = parse(found, where), parse(needed, where)
    if not isinstance(left, dict):
        raise StoreError(f"{where} is damaged: it is no JSON object")
    for field in _DECISIVE:
        if _plain(left.get(field)) != _plain(right.get(field)):
            return f"it has {field} {_short(left.get(field))}, needed {_short(right.get(field))}"
    return None


def _plain(value: Any) -> Any:
    """``value`` without what says nothing: an empty configuration, and no storage transformers, may be left out."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if not (key == "configuration" and item == {})}
    if isinstance(value, list):
        return [_plain(item) for item in value] or None
    return value


def _short(value: object) -> str:
    text = f"({', '.join(map(str, value))})" if isinstance(value, list) else repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
