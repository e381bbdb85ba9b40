"""Jobs for executors."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

Pause = Callable[[], None]


def nothing(job: "Numbers", key: int, pause: Pause) -> None:
    pass


@dataclass(frozen=True)
class Numbers:
    """Yields a key and its negative; in between ``act`` is called."""

    act: Callable[["Numbers", int, Pause], None] = nothing
    size: int = 64

    def session(self) -> AbstractContextManager[None]:
        return nullcontext()

    def shrunk(self) -> "Numbers":
        return replace(self, size=self.size // 2)

    def close(self) -> None:
        pass

    def open(self, pause: Pause, folder: Path | None = None) -> Callable[[int], Iterator[int]]:
        def do(key: int) -> Iterator[int]:
            yield key
            self.act(self, key, pause)
            yield -key

        return do
