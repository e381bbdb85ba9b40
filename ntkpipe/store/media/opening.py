"""The storage medium at a path or URL."""

import os
import re
from pathlib import Path

from ntkpipe.base.errors import ConfigError, StoreError
from ntkpipe.base.paths import is_file_url, local_path
from ntkpipe.store.media.folder import Folder
from ntkpipe.store.media.medium import Medium

_SHORTENED_URL = re.compile(r"(s3|gs|az):/[^/]")  # what pathlib makes of s3://bucket


def medium_at(where: str | Path | Medium) -> Medium:
    """Open the medium at a local path, with ``~`` expanded, or at the URL of an object store."""
    if isinstance(where, Medium):
        return where
    if not isinstance(where, str | os.PathLike):
        raise ConfigError(f"the store is {type(where).__name__}; needed a path or a URL")
    text = os.fsdecode(where)
    if "://" in text and not is_file_url(text):
        try:
            from ntkpipe.store.media.objects import ObjectMedium  # keeps obstore out of sessions that use local stores
        except ModuleNotFoundError as error:
            raise StoreError(f"stores in object storage need {error.name}: pip install 'ntkpipe[objects]'") from error
        return ObjectMedium(text)
    if _SHORTENED_URL.match(text):
        raise StoreError(f"{text!r} is a URL that became a path on its way and lost a slash; give it as text")
    return Folder(local_path(text))
