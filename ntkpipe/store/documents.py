"""The JSON documents of a store, ``zarr.json``: written as Zarr writes them, read as untrusted input."""

import json
from typing import Any

from ntkpipe.base.errors import StoreError
from ntkpipe.base.paths import said
from ntkpipe.store.layout import ArrayLayout

DOCUMENT = "zarr.json"
# Fields that decide how a reader decodes; attributes and names of dimensions are for people.
_ARRAY = ("zarr_format", "node_type", "shape", "data_type")
_DECISIVE = (*_ARRAY, "chunk_grid", "chunk_key_encoding", "codecs", "fill_value", "storage_transformers")


def parse(data: bytes, where: str, *, allow_nan: bool = False) -> Any:
    """Parse strict JSON: UTF-8, no repeated key, and no NaN unless allowed."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"it holds {constant}, which is not a number")

    try:
        text, constants = data.decode("utf-8"), None if allow_nan else refuse
        return json.loads(text, object_pairs_hook=_without_repetition, parse_constant=constants)
    except RecursionError:
        raise StoreError(f"{where} is damaged: nested too deeply") from None
    except ValueError as error:
        raise StoreError(f"{where} is damaged or not JSON: {said(error)}") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def group_document(attributes: dict[str, Any]) -> bytes:
    """Encode a Zarr group that holds attributes only."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=1).encode()


def group_attributes(data: bytes, where: str, *, allow_nan: bool = False) -> dict[str, Any]:
    """Decode the attributes of a Zarr group."""
    document = parse(data, where, allow_nan=allow_nan)
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict):
        raise StoreError(f"{where} is damaged or not a Zarr v3 group: it has no attributes")
    return attributes


def array_document(layout: ArrayLayout) -> bytes:
    """Encode a Zarr array of uncompressed chunks, each followed by its crc32c."""
    # Importing Zarr takes longer than everything else that readers need, and only writers need Zarr.
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    documents: dict[str, Any] = {}
    zarr.create_array(
        zarr.storage.MemoryStore(documents),
        shape=layout.shape,
        chunks=layout.chunks,
        dtype=layout.dtype,
        fill_value=layout.fill_value,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        filters=None,
        dimension_names=layout.dimensions,
        config={"write_empty_chunks": True},
    )
    data: bytes = documents[DOCUMENT].to_bytes()
    return data


def array_difference(found: bytes, needed: bytes, where: str) -> str | None:
    """Describe the first difference between two array documents, or return None."""
    # Not opened with Zarr, since the one that was found may name arbitrary codecs and dtypes.
    left, right = parse(found, where), parse(needed, where)
    if not isinstance(left, dict):
        raise StoreError(f"{where} is damaged: it is not a JSON object")
    for field in _DECISIVE:
        if _plain(left.get(field)) != _plain(right.get(field)):
            return f"it has {field} {_short(left.get(field))}, needed {_short(right.get(field))}"
    return None


def _plain(value: Any) -> Any:
    """Drop what Zarr allows to be omitted: empty configurations and empty lists of storage transformers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if not (key == "configuration" and item == {})}
    if isinstance(value, list):
        return [_plain(item) for item in value] or None
    return value


def _short(value: object) -> str:
    text = f"({', '.join(map(str, value))})" if isinstance(value, list) else repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
