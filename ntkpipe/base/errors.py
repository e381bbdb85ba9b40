"""Exceptions of the package; each also derives from the builtin that callers would expect, such as ``ValueError``."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from numpy.linalg import LinAlgError


def _restored(kind: type[BaseException], *args: object) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    return error


class NtkpipeError(Exception):
    """Base of every error that ntkpipe raises on purpose."""

    def __reduce__(self) -> tuple[object, ...]:
        # Other processes, such as joblib's, send back what was raised; some are not made of their message alone.
        return _restored, (type(self), *self.args), vars(self)


class ConfigError(NtkpipeError, ValueError):
    """An argument, a workflow file or an import string is wrong."""


class ArgumentError(ConfigError, TypeError):
    """An argument has a name that the function does not know."""


class ModelError(NtkpipeError, ValueError):
    """The model cannot be used as it is: its outputs, mode, parameters or checkpoint."""


class DataError(NtkpipeError, ValueError):
    """The samples or targets cannot be used as they are."""


class NonFiniteError(NtkpipeError, ArithmeticError):
    """NaN or infinity in inputs, parameters, outputs, Jacobians or tiles. What holds them was not written."""


class SelfCheckError(NtkpipeError, ArithmeticError):
    """The Jacobian engine and the plain reference disagree, so no tile was computed."""


class IndefiniteError(NtkpipeError, LinAlgError):
    """A matrix that must be positive definite is not; with ``ridge`` it would be."""

    def __init__(self, found: str, *, row: int, pivot: float, floor: float, ridge: float, otherwise: str = "") -> None:
        super().__init__(f"{found}. Give an absolute ridge of at least {ridge:.2g}{otherwise}")
        self.found, self.row, self.pivot, self.floor, self.ridge = found, row, pivot, floor, ridge
        self.otherwise = otherwise  # what else would help, if anything

    def advising(self, least: float, otherwise: str = "") -> "IndefiniteError":
        """The same for a caller that needs at least this ridge, and can do this otherwise."""
        row, pivot, floor, ridge = self.row, self.pivot, self.floor, max(self.ridge, least)
        return IndefiniteError(self.found, row=row, pivot=pivot, floor=floor, ridge=ridge, otherwise=otherwise)


class ResourceError(MemoryError, NtkpipeError):  # in this order, since Dask creates it by the first base's ``__new__``
    """The work does not fit the memory or the disk; the message holds both numbers."""


class ClusterError(NtkpipeError, RuntimeError):
    """The Dask cluster cannot be used as it is, or was lost. Every tile that was finished is kept."""


class StoreError(NtkpipeError, OSError):
    """A kernel store is missing, damaged or cannot be written."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no kernel store at the path."""


class StoreExistsError(StoreError, FileExistsError):
    """Something is at the path already, and the mode does not allow changing it."""


class StoreMismatchError(StoreError, ValueError):
    """The store was made with other settings, model or data than the present ones."""

    def __init__(self, message: str, differences: tuple[tuple[str, object, object], ...]) -> None:
        super().__init__(message)
        self.differences = differences


class TileError(StoreError):
    """A chunk of a store is missing, truncated or fails its checksum; the message names it."""


class StoreFullError(StoreError):
    """The disk is full. Every tile that was finished is kept."""


class Interrupted(NtkpipeError, KeyboardInterrupt):  # noqa: N818 - not an error of the program
    """The run was interrupted from outside. Every tile that was finished is kept."""


class NotConvergedWarning(UserWarning):
    """A result falls short of what was asked for; its status and message say how."""


def nearest(name: str, known: Iterable[str]) -> str:
    """What a message on an unknown name adds where a known one is like it; else nothing."""
    close = get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


@contextmanager
def needed_for(what: str, extra: str) -> Iterator[None]:
    """Say which extra to install if an import inside fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"{what} needs {error.name}: pip install 'ntkpipe[{extra}]'") from error
