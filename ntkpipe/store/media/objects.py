"""Stores in object storage, by URL: ``s3://bucket/prefix/run.zarr`` for S3-compatible servers, ``gs://`` and ``az://``.

Credentials and the endpoint come from the environment of each process and are never part of a URL, a pickle or a
message: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``
for servers other than Amazon's, ``AWS_ALLOW_HTTP=true`` for an endpoint without TLS; for the other two, what obstore
reads.
"""

# ruff: noqa: D102 - overridden methods are documented in Medium

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
from ntkpipe.store.media.medium import DOCUMENT_BYTES, Data, Medium, OversizeError, check_name

_CLIENTS: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
_VENDORS = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}

# A chunk of many MiB takes long on a slow line; a server that is gone is given up after a few retries.
_TIMEOUTS = {"timeout": timedelta(minutes=5), "connect_timeout": timedelta(seconds=5)}
_RETRIES = {"max_retries": 8, "retry_timeout": timedelta(minutes=2)}
_TRUE = {"1", "on", "true", "yes"}
_LISTED_AT_ONCE = 1000
_LONGEST_LOG_BYTES = 2**30

_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")
# Without credentials in the environment the client asks the metadata service of cloud machines.
_NO_CREDENTIALS = ("169.254.169.254", "/latest/api/token", "/latest/meta-data", "metadata.google.internal")
_DENIED = ("403 Forbidden", "401 Unauthorized", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_FULL = ("507 Insufficient", "StorageFull", "QuotaExceeded", "EntityTooLarge.*quota")
_UNREACHABLE = ("error sending request", "Connect", "timed out", "dns error")


class AccessError(StoreError):
    """The credentials do not grant access."""


class ObjectMedium(Medium):
    """A prefix of a bucket."""

    # Objects are put atomically, so there are no leftovers, and ``put_new`` is one conditional request
    # (``If-None-Match``), which one of several creators wins. There are no locks, so nothing tells whether another run
    # is writing: `exclusive` and `remove`, and with them ``mode="w"``, are refused. Concurrent runs of the same
    # manifest are harmless: they write equal bytes.
    def __init__(self, url: str) -> None:
        self._scheme, self._bucket, self._prefix = _split(url)
        self.root: str = f"{self._scheme}://{self._bucket}/{self._prefix}"
        self._refuses_to_overwrite = False
        self._appended: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"ObjectMedium({self.root!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the client, which holds credentials: the process that unpickles has its own.
        return ObjectMedium, (self.root,)

    @cached_property
    def _client(self) -> Any:
        with self._explaining():
            # Client options replace those of the environment, so this one is passed on.
            allow_http = os.environ.get(f"{_VENDORS[self._scheme]}_ALLOW_HTTP", "").lower() in _TRUE
            return _CLIENTS[self._scheme](
                self._bucket,
                prefix=self._prefix,
                client_options={**_TIMEOUTS, "allow_http": allow_http},
                retry_config=_RETRIES,
            )

    def address(self, name: str) -> str:
        return f"{self.root}/{name}"

    def identity(self) -> str:
        return self.root

    def get(self, name: str, limit: int = DOCUMENT_BYTES) -> bytes:
        check_name(name)
        with self._explaining():
            found = obstore.get(self._client, name)
            size = found.meta["size"]
            if size > limit:
                raise OversizeError(self.address(name), size, limit)
            return found.bytes().to_bytes()

    def put(self, name: str, *parts: Data) -> None:
        """Put an object in one request: a multipart upload could leave parts behind."""
        check_name(name)
        with self._explaining():
            obstore.put(self._client, name, b"".join(parts), use_multipart=False)

    def put_new(self, name: str, data: Data) -> bool:
        check_name(name)
        created = self._create(name, data)
        if created and not self._refuses_to_overwrite:
            # Servers that ignore the condition would let any creator overwrite another's store, so try it once.
            if self._create(name, data):
                raise StoreError(self._no_conditions())
            self._refuses_to_overwrite = True
        return created

    def _create(self, name: str, data: Data) -> bool:
        with self._explaining():
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
        """Rewrite the whole object from what this process remembers of it, so it is never truncated."""
        if name not in self._appended:
            try:
                self._appended[name] = self.get(name, _LONGEST_LOG_BYTES)
            except FileNotFoundError:
                self._appended[name] = b""
        self.put(name, self._appended[name], line)
        self._appended[name] += line

    def size(self, name: str) -> int | None:
        check_name(name)
        try:
            with self._explaining():
                return int(obstore.head(self._client, name)["size"])
        except FileNotFoundError:
            return None

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        if prefix:
            check_name(prefix)
        with self._explaining():
            for page in obstore.list(self._client, prefix or None, chunk_size=_LISTED_AT_ONCE):
                for found in page:
                    yield found["path"], int(found["size"])

    def delete(self, name: str) -> None:
        check_name(name)
        with contextlib.suppress(FileNotFoundError), self._explaining():
            obstore.delete(self._client, name)

    def free_bytes(self) -> None:
        return  # buckets have no limit

    def is_writable(self) -> bool:
        """Put an empty object and delete it."""
        token = f"results/{uuid.uuid4().hex}.token"
        try:
            self.put(token, b"")
            self.delete(token)
        except AccessError:
            return False
        return True

    def is_vacant(self) -> bool:
        return next(self.sizes(""), None) is None

    def leftovers(self) -> list[str]:
        return []

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        yield  # without a lock: nothing can be taken away

    def exclusive(self) -> NoReturn:
        raise StoreError(
            f"{self.root} is in an object store, which has no locks, so nobody knows whether another run writes to it; "
            "a store there is only ever created and completed"
        )

    def remove(self) -> None:
        raise StoreError(
            f"{self.root} is in an object store, which has no locks, so mode='w' does not remove it; use another URL, "
            "or delete the prefix yourself once no run writes to it"
        )

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turn the client's errors into ones that name the remedy."""
        try:
            yield
        except StoreError:
            raise
        except (BaseError, FileNotFoundError, ValueError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> OSError:
        # The rest of the client's message is its state, which repeats this part.
        reason = _in_one_line(str(error).partition("\n\nDebug source")[0])
        endpoint, keys = self._variables("ENDPOINT_URL"), self._variables("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")
        kind: type[StoreError] = StoreError
        if _has(reason, _NO_BUCKET):
            words = (
                f"there is no bucket {self._bucket!r} at the endpoint; create it, or check the URL and the endpoint "
                f"in the environment ({endpoint})"
            )
        elif isinstance(error, FileNotFoundError):
            return FileNotFoundError(f"nothing is there: {reason}")
        elif _has(reason, _FULL):
            return StoreFullError(f"the object store of {self.root} is full: {reason}")
        elif _has(reason, _NO_CREDENTIALS):
            kind = AccessError
            words = f"no credentials; set them in the environment ({keys}) of every process that opens it"
        elif _has(reason, _DENIED):
            kind = AccessError
            words = f"access is denied; check the credentials in the environment ({keys}) and what they may do"
        elif "builder error" in reason:
            words = (
                "the endpoint in the environment is not a URL, or has no TLS; for http:// set "
                f"{_VENDORS[self._scheme]}_ALLOW_HTTP=true"
            )
        elif _has(reason, _UNREACHABLE):
            words = (
                "the endpoint does not answer; check the network and the endpoint in the environment "
                f"({self._variables('ENDPOINT_URL', 'REGION')}); what is stored is safe, run again"
            )
        else:
            words = "the object store failed"
        return kind(f"{self.root}: {words}: {reason}")

    def _variables(self, *names: str) -> str:
        vendor = _VENDORS[self._scheme]
        return ", ".join(f"{vendor}_{name}" for name in names) if vendor == "AWS" else f"{vendor}_…"


def _has(text: str, patterns: tuple[str, ...]) -> bool:
    return any(re.search(pattern, text) for pattern in patterns)


def _in_one_line(text: str) -> str:
    plain = re.sub(r"<[^>]*>", " ", re.sub(r"<(RequestId|HostId|Resource|Key|BucketName)>.*?</\1>", "", text))
    return " ".join(plain.split())


def _split(url: str) -> tuple[str, str, str]:
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
