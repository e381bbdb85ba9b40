"""A factor in files: its matrix, its progress and its panels, which count once the group's attributes say so."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ntkpipe.base.errors import StoreError, StoreExistsError, StoreMismatchError
from ntkpipe.solvers.direct.panels import Shape
from ntkpipe.store.documents import group_attributes, group_document
from ntkpipe.store.media.medium import Medium, writing
from ntkpipe.store.media.opening import medium_at
from ntkpipe.store.results import ArrayFolder, as_integer, as_number

_GROUP = "cholesky"
FACTOR_ARRAY = f"{_GROUP}/lower"
_DOCUMENT = "zarr.json"
_FORMAT = 1
_MOST_TEXT = 2000
_MOST_ROWS = 2**40
_PIVOTS = ("logdet", "smallest", "largest")


@dataclass(frozen=True)
class Pivots:
    """Summary of the diagonal of a panel."""

    logdet: float  # 2 Σ log L_ii
    smallest: float  # of the L_ii²
    largest: float  # of the L_ii²


@dataclass(frozen=True)
class FactorState:
    """What a factor is of, and how much of it exists."""

    matrix: str  # identity of the operator
    ridge: float
    jitter: float
    shape: Shape
    panels: tuple[Pivots, ...] = ()  # complete ones

    def to_json(self) -> dict[str, Any]:
        """Attributes of the group."""
        return {
            "format": _FORMAT,
            "matrix": self.matrix,
            "ridge": self.ridge,
            "jitter": self.jitter,
            "num_rows": self.shape.num_rows,
            "panel_width": self.shape.width,
            "chunk_rows": self.shape.height,
            "panels": [asdict(pivots) for pivots in self.panels],
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "FactorState":
        """Read what :meth:`to_json` wrote; KeyError, TypeError or ValueError if anybody has changed it."""
        matrix, panels = found["matrix"], found["panels"]
        is_text = isinstance(matrix, str) and len(matrix) <= _MOST_TEXT and matrix.isprintable()
        if found["format"] != _FORMAT or not is_text or not isinstance(panels, list):
            raise ValueError("it describes no Cholesky factor of this version")
        shape = Shape(*(as_integer(found[name], low=1) for name in ("num_rows", "panel_width", "chunk_rows")))
        is_cut = shape.width % shape.height == 0 and shape.width < shape.num_rows + shape.height
        if not is_cut or shape.num_rows >= _MOST_ROWS or len(panels) > shape.num_panels:
            raise ValueError(f"panels of {shape.width} columns in chunks of {shape.height} rows")
        ridge, jitter = as_number(found["ridge"]), as_number(found["jitter"])
        pivots = (Pivots(*(as_number(panel[name]) for name in _PIVOTS)) for panel in panels)
        return cls(matrix, ridge, jitter, shape, tuple(pivots))


class FactorFolder:
    """The group ``cholesky`` below a path: its attributes are the state, its array ``lower`` the panels."""

    def __init__(self, where: str | Path | Medium) -> None:
        self.medium = medium_at(where)
        self.root = str(self.medium.root)
        self._folder = ArrayFolder(self.medium, _GROUP)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder where the medium has locks, and remove what a killed writer left."""
        with writing(self.medium):
            self.medium.put_new(_DOCUMENT, group_document({}))
        if group_attributes(self.medium.get(_DOCUMENT), str(self.medium.address(_DOCUMENT))):
            raise StoreExistsError(f"{self.root} holds something else; give the factor a path of its own")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.medium.exclusive())
            except BlockingIOError:
                raise StoreExistsError(f"another process writes the factor in {self.root}; wait for it") from None
            except StoreError:
                pass  # no locks: two writers of one factor are harmless, since they write the same
            else:
                for name in self.medium.leftovers():
                    self.medium.delete(name)
            yield

    def load(self) -> FactorState | None:
        """Read the state; none if there is no factor yet."""
        attributes = self._folder.read_attributes()
        try:
            return None if attributes is None else FactorState.from_json(attributes)
        except (KeyError, TypeError, ValueError) as error:
            where = self.medium.address(f"{_GROUP}/{_DOCUMENT}")
            raise StoreError(f"{where} is damaged: {error!r}; delete that folder to begin anew") from error

    def commit(self, state: FactorState) -> None:
        """Replace the state in one step."""
        self._folder.write_attributes(state.to_json())


def require_same(stored: FactorState, wanted: dict[str, object], where: str) -> None:
    """Check that a stored factor is the wanted one."""
    found = stored.to_json()
    differences = tuple((name, found[name], value) for name, value in wanted.items() if found[name] != value)
    if differences:
        words = "; ".join(f"{name} is {_short(there)}, asked for {_short(value)}" for name, there, value in differences)
        raise StoreMismatchError(
            f"{where} holds the factor of something else: {words}. Give another path, or delete that folder",
            differences,
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:19]}…"
