"""A kernel store: created, opened, locked, replaced; its manifest, its arrays and its JSON results."""

import contextlib
import heapq
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from ntkpipe.base.errors import StoreError, StoreExistsError, StoreNotFoundError
from ntkpipe.base.paths import said
from ntkpipe.base.resources import format_bytes
from ntkpipe.store.chunks import StoredArray
from ntkpipe.store.documents import DOCUMENT, group_attributes, group_document
from ntkpipe.store.layout import Index, layouts
from ntkpipe.store.manifest import ATTRIBUTE, Manifest, from_attribute
from ntkpipe.store.media.medium import DOCUMENT_BYTES, Medium, writing
from ntkpipe.store.media.opening import medium_at

Mode = Literal["a", "w", "w-"]

_MOST_RESULTS = 1000


class Store:
    """An existing store: its manifest, arrays and results."""

    def __init__(self, medium: Medium, manifest: Manifest) -> None:
        self.medium = medium
        self.manifest = manifest
        self.arrays = {name: StoredArray(medium, layout) for name, layout in layouts(manifest).items()}

    @property
    def root(self) -> Path | str:
        """Path or URL, for messages."""
        return self.medium.root

    @classmethod
    def open(cls, where: str | Path | Medium) -> "Store":
        """Open a store, reading its manifest only."""
        medium = medium_at(where)
        try:
            attributes = read_group(medium)
        except StoreError as error:
            if why := medium.obstacle():
                raise StoreError(f"{medium.root} is no kernel store: {why}") from error
            raise
        if attributes is None:
            what = "does not exist or is empty" if medium.is_vacant() else "holds no Zarr group"
            found = f"is no kernel store: {why}" if (why := medium.obstacle()) else what
            raise StoreNotFoundError(f"{medium.root} {found}; needed the path of a kernel store")
        return cls(medium, from_attribute(attributes.get(ATTRIBUTE), str(medium.root)))

    @classmethod
    def create(cls, where: str | Path | Medium, manifest: Manifest) -> "Store":
        """Create a store, or open the one that another process has just created; compare its manifest with your own."""
        medium = medium_at(where)
        with writing(medium):  # the group and its manifest in one atomic step, which the first process wins
            medium.put_new(DOCUMENT, _readable_group({ATTRIBUTE: manifest.to_attribute()}, DOCUMENT))
        store = cls.open(medium)
        store.complete_layout()
        return store

    def complete_layout(self) -> None:
        """Create missing groups and arrays, which a kill during creation may leave."""
        self.complete_groups()
        for array in self.arrays.values():
            array.create()

    def complete_groups(self) -> None:
        """Create missing groups of the arrays."""
        create_groups(self.medium, self.arrays)

    def missing(self) -> dict[str, list[Index]]:
        """Missing chunks of each incomplete array."""
        found = {name: array.missing() for name, array in self.arrays.items()}
        return {name: indices for name, indices in found.items() if indices}

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Protect the store from replacement while writing; the last of several writers removes leftovers."""
        with contextlib.ExitStack() as held:
            with writing(self.medium):
                held.enter_context(self.medium.in_use())
            self._require_current()
            yield

    @contextlib.contextmanager
    def exclusive(self, otherwise: str) -> Iterator[None]:
        """Be the only writer; ``otherwise`` says what is impossible if another run is writing."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self.medium.exclusive())
            except BlockingIOError:
                raise StoreError(
                    f"another run is writing to {self.root}, so {otherwise} now; wait for its end, or stop it"
                ) from None
            except OSError as error:
                raise StoreError(f"{self.root} cannot be locked, so {otherwise}: {said(error)}") from error
            self._require_current()
            held.enter_context(writing(self.medium))
            yield

    def replace_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest atomically; other attributes of the group stay."""
        with writing(self.medium):
            attributes = read_group(self.medium)
            self.medium.put(DOCUMENT, group_document({**(attributes or {}), ATTRIBUTE: manifest.to_attribute()}))

    def _require_current(self) -> None:
        if Store.open(self.medium).manifest != self.manifest:
            raise StoreError(f"{self.root} was replaced by another run after this one opened it; run again")

    def is_writable(self) -> bool:
        """Whether this process may write below the root, as far as can be told without writing data."""
        return self.medium.is_writable()

    def write_result(self, name: str, result: Mapping[str, Any]) -> None:
        """Store a JSON result below ``results/name`` with the digest of the manifest that it came from."""
        name = f"results/{name}"
        create_groups(self.medium, [name])
        attributes = {"result": dict(result), "manifest_digest": self.manifest.digest()}
        with writing(self.medium):
            self.medium.put(f"{name}/{DOCUMENT}", _readable_group(attributes, name))

    def append_result(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a line of JSON to the file ``results/name``, which has a single writer."""
        with writing(self.medium):
            self.medium.append(f"results/{name}", json.dumps(line).encode() + b"\n")

    def read_results(self, folder: str) -> list[dict[str, Any]]:
        """Read the last thousand results below ``results/folder`` by name, those from before a growth included."""
        names = heapq.nlargest(_MOST_RESULTS, groups_below(self.medium, f"results/{folder}"))[::-1]
        known = {manifest.digest() for manifest in (self.manifest, *self.manifest.earlier())}
        found = [self._read_result(f"{folder}/{name}", known) for name in names]
        return [result for result in found if result is not None]

    def solver_results(self) -> dict[str, dict[str, Any]]:
        """Results of solvers and analyses by name, those of this manifest."""
        digest, found = self.manifest.digest(), {}
        for name in sorted(groups_below(self.medium, "results")):
            attributes = read_group(self.medium, f"results/{name}", allow_nan=True) or {}
            result = attributes.get("result")  # none in a folder of results, such as `runs`
            if isinstance(result, dict) and "status" in result and attributes.get("manifest_digest") == digest:
                found[name] = result
        return found

    def read_result(self, name: str) -> dict[str, Any] | None:
        """Read a result; None if there is none, or if it came from another manifest, as before a growth."""
        return self._read_result(name, {self.manifest.digest()})

    def _read_result(self, name: str, digests: set[str]) -> dict[str, Any] | None:
        # Results may hold NaN, such as a mean of nothing.
        attributes = read_group(self.medium, f"results/{name}", allow_nan=True)
        if attributes is None:
            return None
        result = attributes.get("result")
        if not isinstance(result, dict) or "manifest_digest" not in attributes:
            raise StoreError(f"results/{name} of {self.root} is damaged: it holds no result")
        return result if attributes["manifest_digest"] in digests else None


def read_group(medium: Medium, name: str = "", *, allow_nan: bool = False) -> dict[str, Any] | None:
    """Attributes of a group, by default the one at the root; None if there is none."""
    document = f"{name}/{DOCUMENT}".lstrip("/")
    where = f"{document} of {medium.root}" if name else str(medium.address(document))
    try:
        data = medium.get(document)
    except FileNotFoundError:
        return None
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read {where}: {said(error)}") from error
    return group_attributes(data, where, allow_nan=allow_nan)


def create_groups(medium: Medium, names: Iterable[str], *, root: bool = False) -> None:
    """Create missing groups above the arrays or groups of these names, and on request at the root."""
    parents = {name.rsplit("/", depth)[0] for name in names for depth in range(1, name.count("/") + 1)}
    with writing(medium):
        for parent in ([""] if root else []) + sorted(parents):
            document = f"{parent}/{DOCUMENT}".lstrip("/")
            if medium.size(document) is None:
                medium.put_new(document, group_document({}))


def groups_below(medium: Medium, prefix: str) -> Iterator[str]:
    """Names of the arrays and groups directly below a prefix."""
    below = (name[len(prefix) + 1 :].split("/") for name, _ in medium.sizes(prefix))
    return (parts[0] for parts in below if len(parts) == 2 and parts[1] == DOCUMENT)


def _readable_group(attributes: dict[str, Any], name: str) -> bytes:
    """Encode a group, which must be small enough to be read back."""
    data = group_document(attributes)
    if len(data) > DOCUMENT_BYTES:
        raise StoreError(
            f"{name} would have {format_bytes(len(data))}; at most {format_bytes(DOCUMENT_BYTES)} are read back"
        )
    return data


def is_taken(medium: Medium) -> bool:
    """Whether there is a group at the root; raises StoreError where a store can neither be nor be made."""
    try:
        if medium.size(DOCUMENT) is not None:
            return True
        is_vacant = medium.is_vacant()
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot read {medium.root}: {medium.obstacle() or said(error)}") from error
    if why := medium.obstacle(writes=True):
        kind = StoreError if is_vacant else StoreExistsError
        raise kind(f"{medium.root} can hold no kernel store: {why}; choose another path")
    if not is_vacant:
        raise StoreExistsError(f"{medium.root} exists and is not a kernel store; choose another path")
    return False


def prepare_path(where: str | Path | Medium, mode: Mode) -> Store | None:
    """Apply ``mode`` to the path: return the store to resume, or None where one may be created."""
    medium = medium_at(where)
    if not is_taken(medium):
        return None
    if mode == "w-":
        raise StoreExistsError(
            f"{medium.root} exists and mode='w-' only creates; use mode='a' to resume or 'w' to start over"
        )
    if mode == "a":
        return Store.open(medium)
    try:
        is_ours = ATTRIBUTE in (read_group(medium) or {})
    except OSError:
        is_ours = False
    if not is_ours:
        raise StoreExistsError(
            f"{medium.root} is not a kernel store, so mode='w' does not remove it; choose another path"
        )
    with writing(medium):
        try:
            medium.remove()
        except BlockingIOError:
            raise StoreExistsError(
                f"another run is writing to {medium.root}, so mode='w' does not remove it; stop it, or choose another "
                "path"
            ) from None
    return None
