"""The KV cache's second tier: blocks in the host's memory, shared by the models of a daemon under one cap of bytes.

Eviction is GreedyDual-Size (Cao and Irani, 1997): a block's rank is what recomputing it would cost a byte, on top of the
rank that was evicted last, so what is neither dear nor used sinks. A block is worth nothing without those before it, so
of equal ranks the deeper goes first.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Key = tuple[str, bytes]


@dataclass(slots=True)
class _Kept:
    data: Any
    size: int
    worth: float  # milliseconds saved a byte
    depth: int
    rank: float = 0.0


class HostMemory:
    """What is kept, and the only place that decides what goes. Engines call it from their own threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes_used = 0
        self._kept: dict[Key, _Kept] = {}
        self._ranks: list[tuple[float, int, Key]] = []  # rank, minus depth, key; an entry whose rank has moved on is skipped
        self._floor = 0.0
        self._lock = threading.Lock()

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def put(self, key: Key, data: Any, *, size: int, worth: float, depth: int) -> None:
        """Keeps `data`, which is `size` bytes, at the expense of whatever ranks lowest."""
        if size > self.max_bytes:
            return
        with self._lock:
            self._drop(key)
            self._kept[key] = _Kept(data, size, worth, depth)
            self.bytes_used += size
            self._touch(key)
            while self.bytes_used > self.max_bytes:
                self._evict()

    def get(self, key: Key) -> Any:
        """What is kept, or None."""
        with self._lock:
            if key not in self._kept:
                return None
            self._touch(key)
            return self._kept[key].data

    def take(self, model: str) -> Iterator[tuple[bytes, int, Any]]:
        """Gives away what is kept of a model, as (key, depth, data), what is most worth first."""
        with self._lock:
            names = sorted((key for key in self._kept if key[0] == model), key=self._worth_last, reverse=True)
        for name in names:
            with self._lock:
                kept = self._kept.get(name)
                self._drop(name)
            if kept is not None:
                yield name[1], kept.depth, kept.data

    def has_room(self, size: int) -> bool:
        """Whether as much can be kept at nobody's expense."""
        return self.bytes_used + size <= self.max_bytes

    def _worth_last(self, key: Key) -> tuple[float, int]:
        return self._kept[key].rank, -self._kept[key].depth

    def _touch(self, key: Key) -> None:
        kept = self._kept[key]
        kept.rank = self._floor + kept.worth
        heapq.heappush(self._ranks, (kept.rank, -kept.depth, key))
        if len(self._ranks) > 4 * len(self._kept) + 64:
            self._ranks = [(entry.rank, -entry.depth, name) for name, entry in self._kept.items()]
            heapq.heapify(self._ranks)

    def _evict(self) -> None:
        rank, _, key = heapq.heappop(self._ranks)
        if key in self._kept and self._kept[key].rank == rank:
            self._floor = rank
            self._drop(key)

    def _drop(self, key: Key) -> None:
        if kept := self._kept.pop(key, None):
            self.bytes_used -= kept.size


@dataclass(frozen=True, slots=True)
class BlockCosts:
    """What was measured when the model was loaded, in milliseconds a block."""

    restore_ms: float
    compute_ms: float

    @property
    def restoring_pays(self) -> bool:
        return self.restore_ms < self.compute_ms


class KvStore:
    """One model's view: `read(block)` copies a block off the device, `write(block, data)` back onto it."""

    def __init__(
        self,
        memory: HostMemory,
        model: str,
        block_bytes: int,
        costs: BlockCosts,
        read: Callable[[int], Any],
        write: Callable[[int, Any], None],
    ) -> None:
        self._memory = memory
        self._model = model
        self._block_bytes = block_bytes
        self._costs = costs
        self._read = read
        self._write = write

    def save(self, key: bytes, depth: int, block: int) -> None:
        """Keeps a copy of a block, unless computing it is faster than restoring it."""
        name = self._model, key
        if self._costs.restoring_pays and self._block_bytes <= self._memory.max_bytes and name not in self._memory:
            self._keep(name, self._read(block), depth)

    def adopt(self, key: bytes, depth: int, data: Any) -> bool:
        """Keeps what another daemon left; False when there is no room."""
        if not self._memory.has_room(self._block_bytes):
            return False
        self._keep((self._model, key), data, depth)
        return True

    def restore(self, key: bytes, block: int) -> bool:
        """Fills a block with what is kept; False when nothing is, or computing it is faster."""
        data = self._memory.get((self._model, key)) if self._costs.restoring_pays else None
        if data is None:
            return False
        self._write(block, data)
        return True

    def _keep(self, name: Key, data: Any, depth: int) -> None:
        worth = self._costs.compute_ms / self._block_bytes
        self._memory.put(name, data, size=self._block_bytes, worth=worth, depth=depth)
