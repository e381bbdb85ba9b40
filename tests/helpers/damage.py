"""Ways of damaging a stored chunk."""

from pathlib import Path

import google_crc32c
import numpy as np

from ntkpipe.store.store import Store


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "crc32c": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "has 0 bytes": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


def forge(store: Store, name: str, index: tuple[int, ...], change) -> None:
    """Change entries of a chunk and give it a checksum that fits."""
    array = store.arrays[name]
    values = array.read(index).copy()
    change(values)
    whole = np.zeros(array.layout.chunks, array.layout.dtype)
    whole[tuple(map(slice, values.shape))] = values
    payload = whole.tobytes()
    array.path(index).write_bytes(payload + google_crc32c.value(payload).to_bytes(4, "little"))
