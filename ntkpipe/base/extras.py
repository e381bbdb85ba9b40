"""Optional libraries: what to install where one is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from ntkpipe.base.errors import ConfigError


@contextmanager
def needed_for(what: str, extra: str) -> Iterator[None]:
    """Imports within may fail, which is said in words."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"{what} needs {error.name}: pip install 'ntkpipe[{extra}]'") from error
