"""Stores in object storage: S3 and its like by URL, ``s3://bucket/prefix/run.zarr``; also ``gs://`` and ``az://``.

Credentials and the endpoint come from the environment and are never part of a URL, a pickle or a message:
``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL`` for
what is not Amazon's, ``AWS_ALLOW_HTTP=true`` for an endpoint without TLS, and what obstore reads for the other two.
Each process reads its own.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from datetime import timedelta
from functools import cached_property
from typing import Any, NoReturn
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
from obstore.store import AzureStore, GCSStore, S3Store

from ntkpipe.base.errors import StoreError, StoreFullError
from ntkpipe.store.media.folder import DOCUMENT_BYTES, Data, Medium, OversizeError, check_name

_CLIENTS: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
_VENDORS = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}

# A chunk of many MiB takes its time on a slow line; a server that is gone is given up after some of the retries.
_TIMEOUTS = {"timeout": timedelta(minutes=5), "connect_timeout": timedelta(seconds=5)}
_RETRIES = {"max_retries": 8, "retry_timeout": timedelta(minutes=2)}
_LISTED_AT_ONCE = 1000
_LONGEST_LOG_BYTES = 2**30

_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")
# Without credentials in the environment the client asks what hands them out on machines of the cloud.
_NO_CREDENTIALS = ("169.254.169.254", "/latest/api/token", "/latest/meta-data", "metadata.google.internal")
_DENIED = ("403 Forbidden", "401 Unauthorized", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_FULL = ("507 Insufficient", "StorageFull", "QuotaExceeded", "EntityTooLarge.*quota")
_UNREACHABLE = ("error sending request", "Connect", "timed out", "dns error")


class AccessError(StoreError):
    """The credentials do not allow it."""


class ObjectMedium(Medium):
    """A prefix of a bucket.

    An object is put whole or does not exist, so there are no leftovers, and ``put_new`` is one conditional request
    (``If-None-Match``): of creators at once one wins. There are no locks, so nobody can know whether another run is
    writing: :meth:`exclusive` and :meth:`remove`, and with them ``mode="w"``, are refused. Two runs of the same
    manifest at once are harmless: they write equal bytes.
    """

    def __init__(self, url: str) -> None:
        self._scheme, self._bucket, self._prefix = _split(url)
        self.root: str = f"{self._scheme}://{self._bucket}/{self._prefix}"
        self._refuses_to_overwrite = False
        self._appended: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"ObjectMedium({self.root!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the client, which holds credentials: whoever unpickles it has their own.
        return ObjectMedium, (self.root,)

    @cached_property
    def _client(self) -> Any:
        with self._speaking():
            # Options given replace all that are in the environment, and this one is.
            allow_http = os.environ.get(f"{_VENDORS[self._scheme]}_ALLOW_HTTP", "").lower() in {
                "1",
                "on",
                "true",
                "yes",
            }
            return _CLIENTS[self._scheme](
                self._bucket,
                prefix=self._prefix,
                client_options={**_TIMEOUTS, "allow_http": allow_http},
                retry_config=_RETRIES,
            )

    def address(self, name: str) -> str:
        """URL of ``name``."""
        return f"{self.root}/{name}"

    def identity(self) -> str:
        """See :meth:`Medium.identity`."""
        return self.root

    def get(self, name: str, limit: int = DOCUMENT_BYTES) -> bytes:
        """See :meth:`Medium.get`."""
        check_name(name)
        with self._speaking():
            found = obstore.get(self._client, name)
            size = found.meta["size"]
            if size > limit:
                raise OversizeError(self.address(name), size, limit)
            return found.bytes().to_bytes()

    def put(self, name: str, *parts: Data) -> None:
        """See :meth:`Medium.put`: one request, never an upload in parts that could be left behind."""
        check_name(name)
        with self._speaking():
            obstore.put(self._client, name, b"".join(parts), use_multipart=False)

    def put_new(self, name: str, data: Data) -> bool:
        """See :meth:`Medium.put_new`."""
        check_name(name)
        created = self._create(name, data)
        if created and not self._refuses_to_overwrite:
            # Servers that do not know the condition ignore it: those would let any creator overwrite another's store.
            if self._create(name, data):
                raise StoreError(self._no_conditions())
            self._refuses_to_overwrite = True
        return created

    def _create(self, name: str, data: Data) -> bool:
        with self._speaking():
            try:
                obstore.put(self._client, name, bytes(data), mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            except NotSupportedError as error:
                raise StoreError(self._no_conditions()) from error
        return True

    def _no_conditions(self) -> str:
        return (
            f"the object store of {self.root} does not know conditional writes (If-None-Match), so two runs could "
            "create one store over another; use a server that does, or a local path"
        )

    def append(self, name: str, line: bytes) -> None:
        """See :meth:`Medium.append`: rewrites the whole, so it is never cut; this process remembers what it wrote."""
        if name not in self._appended:
            try:
                self._appended[name] = self.get(name, _LONGEST_LOG_BYTES)
            except FileNotFoundError:
                self._appended[name] = b""
        self.put(name, self._appended[name], line)
        self._appended[name] += line

    def size(self, name: str) -> int | None:
        """See :meth:`Medium.size`."""
        check_name(name)
        try:
            with self._speaking():
                return int(obstore.head(self._client, name)["size"])
        except FileNotFoundError:
            return None

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        """See :meth:`Medium.sizes`."""
        if prefix:
            check_name(prefix)
        with self._speaking():
            for page in obstore.list(self._client, prefix or None, chunk_size=_LISTED_AT_ONCE):
                for found in page:
                    yield found["path"], int(found["size"])

    def delete(self, name: str) -> None:
        """See :meth:`Medium.delete`."""
        check_name(name)
        with contextlib.suppress(FileNotFoundError), self._speaking():
            obstore.delete(self._client, name)

    def free_bytes(self) -> None:
        """See :meth:`Medium.free_bytes`: buckets have no end."""
        return

    def is_writable(self) -> bool:
        """See :meth:`Medium.is_writable`: puts a token and deletes it."""
        token = f"results/{uuid.uuid4().hex}.token"
        try:
            self.put(token, b"")
            self.delete(token)
        except AccessError:
            return False
        return True

    def is_vacant(self) -> bool:
        """See :meth:`Medium.is_vacant`."""
        return next(self.sizes(""), None) is None

    def leftovers(self) -> list[str]:
        """See :meth:`Medium.leftovers`: there are none."""
        return []

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """See :meth:`Medium.in_use`: nothing is held, since nothing can be taken away."""
        yield

    def exclusive(self) -> NoReturn:
        """See :meth:`Medium.exclusive`: never granted."""
        raise StoreError(
            f"{self.root} is in an object store, which has no locks, so nobody knows whether another run writes to it; "
            "a store there is only ever created and completed"
        )

    def remove(self) -> None:
        """See :meth:`Medium.remove`: refused."""
        raise StoreError(
            f"{self.root} is in an object store, which has no locks, so mode='w' does not remove it; use another URL, "
            "or delete the prefix yourself once no run writes to it"
        )

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        """Errors of the client in our words, with what to do next."""
        try:
            yield
        except StoreError:
            raise
        except (BaseError, FileNotFoundError, ValueError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> OSError:
        # What follows is the client's state; it repeats what was said.
        said = _in_one_line(str(error).partition("\n\nDebug source")[0])
        if _has(said, _NO_BUCKET):
            return StoreError(
                f"{self.root}: there is no bucket {self._bucket!r} at the endpoint; create it, or check the URL and "
                f"the endpoint in the environment ({self._variables('ENDPOINT_URL')}): {said}"
            )
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(f"nothing is there: {said}")
        if _has(said, _FULL):
            return StoreFullError(f"the object store of {self.root} is full: {said}")
        if _has(said, _NO_CREDENTIALS):
            return AccessError(
                f"{self.root}: no credentials; set them in the environment "
                f"({self._variables('ACCESS_KEY_ID', 'SECRET_ACCESS_KEY')}) of every process that opens it: {said}"
            )
        if _has(said, _DENIED):
            return AccessError(
                f"{self.root}: access is denied; check the credentials in the environment "
                f"({self._variables('ACCESS_KEY_ID', 'SECRET_ACCESS_KEY')}) and what they may do: {said}"
            )
        if "builder error" in said:
            return StoreError(
                f"{self.root}: the endpoint in the environment is no URL, or one without TLS; for http:// set "
                f"{_VENDORS[self._scheme]}_ALLOW_HTTP=true: {said}"
            )
        if _has(said, _UNREACHABLE):
            return StoreError(
                f"{self.root}: the endpoint does not answer; check the network and the endpoint in the environment "
                f"({self._variables('ENDPOINT_URL', 'REGION')}); what is stored is kept, run again: {said}"
            )
        return StoreError(f"{self.root}: the object store failed: {said}")

    def _variables(self, *names: str) -> str:
        vendor = _VENDORS[self._scheme]
        return ", ".join(f"{vendor}_{name}" for name in names) if vendor == "AWS" else f"{vendor}_…"


def _has(text: str, patterns: tuple[str, ...]) -> bool:
    return any(re.search(pattern, text) for pattern in patterns)


def _in_one_line(text: str) -> str:
    """What a server said, without its XML."""
    plain = re.sub(r"<[^>]*>", " ", re.sub(r"<(RequestId|HostId|Resource|Key|BucketName)>.*?</\1>", "", text))
    return " ".join(plain.split())


def _split(url: str) -> tuple[str, str, str]:
    """Scheme, bucket and prefix of a URL."""
    parts = urlsplit(url)
    if parts.scheme not in _CLIENTS:
        known = ", ".join(f"{scheme}://" for scheme in _CLIENTS)
        raise StoreError(
            f"the store's URL begins with {parts.scheme}://; needed one of {known}, or a path of this machine. Servers "
            "that speak S3 are named by AWS_ENDPOINT_URL in the environment"
        )
    form = f"needed {parts.scheme}://bucket/prefix"
    if "@" in parts.netloc or ":" in parts.netloc or "?" in url or "#" in url:
        raise StoreError(
            f"the store's URL holds a user, a port, a query or a fragment; {form}. Credentials and endpoint come from "
            "the environment only, so that they are in no file, log or message"
        )
    prefix = parts.path.strip("/")
    if not parts.netloc or not prefix:
        raise StoreError(f"the store's URL {url!r} has no {'prefix' if parts.netloc else 'bucket'}; {form}")
    check_name(prefix)
    return parts.scheme, parts.netloc, prefix
