"""A small cache for what every request asks: values live a few seconds, and a crowd that misses loads once."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class TtlCache(Generic[K, V]):
    """At most `entries` values of `load(key)`, each for `seconds`. A failed load is not kept."""

    def __init__(self, load: Callable[[K], Awaitable[V]], *, seconds: float, entries: int) -> None:
        self._load = load
        self._seconds = seconds
        self._entries = entries
        self._values: OrderedDict[K, tuple[float, V]] = OrderedDict()
        # By event loop too: a load belongs to the loop that began it.
        self._loading: dict[tuple[int, K], asyncio.Task[V]] = {}

    async def get(self, key: K) -> V:
        cached = self._values.get(key)
        if cached is not None and cached[0] > time.monotonic():
            return cached[1]
        place = (id(asyncio.get_running_loop()), key)
        task = self._loading.get(place)
        if task is None:
            task = self._loading[place] = asyncio.create_task(self._fill(key))
            task.add_done_callback(lambda _: self._loading.pop(place, None))
        return await asyncio.shield(task)

    async def _fill(self, key: K) -> V:
        value = await self._load(key)
        self._values[key] = (time.monotonic() + self._seconds, value)
        self._values.move_to_end(key)
        if len(self._values) > self._entries:
            self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        self._values.clear()
