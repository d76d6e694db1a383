"""Whose turn it is on a device that several engines share: one step at a time, fair by time.

An engine's steps may be a hundred times as long as another's. Whoever waits and has had the least of the device's time is
next, and who comes after a pause begins where the others are: so a chat waits for one denoising step at the most, and then
has as many steps of its own as fit into the time of one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class DeviceTurns:
    """Of one device. Engines are told apart by name."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy = False
        self._waiting: dict[str, float] = {}
        self._used: dict[str, float] = {}  # seconds, from where each came in
        self._floor = 0.0

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Waits for the device, and has it within."""
        began_at = self._take(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._changed:
                self._used[name] = began_at + time.perf_counter() - started
                self._busy = False
                self._changed.notify_all()

    def _take(self, name: str) -> float:
        with self._changed:
            began_at = self._waiting[name] = max(self._used.get(name, 0.0), self._floor)
            while self._busy or min(self._waiting, key=self._waiting.__getitem__) != name:
                self._changed.wait()
            del self._waiting[name]
            self._busy, self._floor = True, began_at
            return began_at
