"""Models that were unloaded, kept in host memory so that they come back fast: least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


@dataclass(frozen=True, slots=True)
class Kept(Generic[T]):
    """`stamp` is of the files it was read from: of others it is of no use."""

    model: T
    size: int
    stamp: int


class HostWeights(Generic[T]):
    """At most `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[str, Kept[T]] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    @property
    def bytes_used(self) -> int:
        return sum(kept.size for kept in self._kept.values())

    def has_room_for(self, size: int) -> bool:
        """Whether it could be kept, at the expense of others."""
        return size <= self.max_bytes

    def keep(self, name: str, kept: Kept[T]) -> None:
        self._kept[name] = kept
        while self.bytes_used > self.max_bytes:
            self._kept.popitem(last=False)[1].model.close()

    def take(self, name: str, stamp: int) -> T | None:
        """What is kept of these very files, which is then the caller's."""
        kept = self._kept.pop(name, None)
        if kept is None:
            return None
        if kept.stamp == stamp:
            return kept.model
        kept.model.close()
        return None
