"""Paths of this machine: as they are meant, what stands in the way of one, and the system's errors in our words."""

import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ntkpipe.base.errors import ConfigError

_MOST_WORDS = 400  # characters of another library's error; torch lists all of its backends
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
_URL = re.compile(r"[A-Za-z][\w+.-]+:/")  # pathlib takes one of two slashes away


def local_path(given: str | os.PathLike[str]) -> Path:
    """The path that is meant: ``~`` expanded, a ``file://`` URL without its beginning."""
    text = os.fsdecode(given)
    if is_file_url(text):
        parts = urlsplit(text)
        if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/"):
            raise ConfigError(f"{text!r} names another machine or no full path; needed file:///folder/name, or a path")
        text = unquote(parts.path)
    path = os.path.expanduser(text)
    top = Path(path).parts[:1]
    if _URL.match(text) and not os.path.lexists(top[0]):
        raise ConfigError(f"{text!r} is a URL; needed a path of this machine")
    if not path or "\0" in path:
        raise ConfigError(f"the path {text!r} {'holds a zero byte' if path else 'is empty'}; needed the path of a file")
    if path.startswith("~") and not os.path.lexists(top[0]):
        raise ConfigError(f"{text!r}: this machine has no user {top[0][1:]!r}; give the folder, or './{text}'")
    if _VARIABLE.match(path) and not os.path.lexists(top[0]):
        raise ConfigError(f"{text!r}: a shell replaces {top[0]}, and nothing has here; give os.path.expandvars(path)")
    return Path(path)


def is_file_url(text: str) -> bool:
    """Whether this is a URL of a file of this machine."""
    return text[:6].lower() == "file:/"


def obstacle(path: Path, *, writes: bool = False, kind: str = "folder") -> str:
    """What keeps a folder, or a file, at the path from being opened or made; empty if nothing does."""
    absolute = path.absolute()
    every = (*reversed(absolute.parents), absolute)
    standing = every[0]
    for part in every:
        try:
            found = os.lstat(part)
            if stat.S_ISLNK(found.st_mode):
                found = os.stat(part)
        except FileNotFoundError:
            if os.path.islink(part):
                return f"{part} is a symbolic link to {os.readlink(part)}, which does not exist"
            break
        except OSError as error:
            return said(error)
        is_folder = stat.S_ISDIR(found.st_mode)
        if part != absolute and not is_folder:
            return f"{part} is {_kind(found.st_mode)}, and nothing can be below it"
        if part == absolute and _kind(found.st_mode) != f"a {kind}":
            return f"{part} is {_kind(found.st_mode)}, not a {kind}"
        if is_folder:
            standing = part
    needed = os.X_OK | os.W_OK if writes else os.X_OK
    if not os.access(standing, needed):
        if os.statvfs(standing).f_flag & os.ST_RDONLY:
            return f"the file system of {standing} is read-only"
        return f"this user may not {'write in' if writes else 'enter'} {standing} (permission denied)"
    longest = max(absolute.parts, key=lambda part: len(os.fsencode(part)))
    if len(os.fsencode(longest)) > os.pathconf(standing, "PC_NAME_MAX"):
        return f"its part {longest[:20]}… is longer than the file system takes"
    if len(os.fsencode(absolute)) >= os.pathconf(standing, "PC_PATH_MAX"):
        return "it is longer than the system takes"
    return ""


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def said(error: BaseException) -> str:
    """Words of an error, as a part of a longer message: short, without a full stop; its type where it has none."""
    if isinstance(error, OSError) and error.strerror:
        if error.filename is None:
            return error.strerror
        words = error.strerror[:1].lower() + error.strerror[1:]
        # Of an open file there is only its number.
        return f"{words}: {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else words
    words = str(error).strip().partition("\n\n")[0]
    return (words if len(words) <= _MOST_WORDS else words[:_MOST_WORDS] + "…").rstrip(".!") or type(error).__name__
