"""The memory that a call may use, passed down whole and divided where two parts of the work need it at once."""

from dataclasses import dataclass
from typing import Union

from ntkpipe.base.config import parse_bytes
from ntkpipe.base.errors import ResourceError
from ntkpipe.base.resources import available_memory, format_bytes, process_memory

# Of callers: bytes, text such as "8GiB", or what is left of another call's; None for a share of what is free.
MemoryLimit = Union[int, str, "Budget", None]

_NOISE_BYTES = 2**24  # of a process beside the arrays that are counted


@dataclass(frozen=True)
class Budget:
    """Bytes that this process may have, everything included; without a limit a share of what is free."""

    limit: int | None = None

    @classmethod
    def of(cls, given: MemoryLimit) -> "Budget":
        """The budget of an argument ``memory_limit``; raises ConfigError for what is no number of bytes."""
        if isinstance(given, Budget):
            return given
        return cls(None if given is None else parse_bytes("memory_limit", given))

    def room(self, share: float = 0.5) -> int:
        """Bytes left, negative if the limit is exceeded; without a limit this share of the available memory."""
        return int(share * available_memory()) if self.limit is None else self.limit - process_memory()

    def fits(self, num_bytes: float, share: float = 0.5) -> bool:
        """Whether so many bytes are left."""
        return num_bytes <= self.room(share)

    def half(self) -> "Budget":
        """What each of two users may have of the room that is left."""
        if self.limit is None or (room := self.room()) <= 0:
            return self
        return Budget(self.limit - room // 2)

    def at_least(self, num_bytes: int) -> "Budget":
        """A budget with room for so many bytes, which are needed in any case: itself, or a larger one."""
        return self if self.limit is None else Budget(max(self.limit, process_memory() + num_bytes + _NOISE_BYTES))

    def require(self, num_bytes: float, what: str, advice: str, share: float = 1.0) -> None:
        """Raise ResourceError with both numbers unless so many bytes are left."""
        if num_bytes > (room := self.room(share)):
            found = f"{what} takes {format_bytes(num_bytes)}, and {format_bytes(max(0, room))} may be used"
            raise ResourceError(f"{found}; {advice}")
