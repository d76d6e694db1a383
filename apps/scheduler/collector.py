"""The batch collector: how long to let requests of one lane gather before they are leased together. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class BatchCollector:
    """One lane's window. An idle worker never waits for it; a busy one would only be interrupted request by request."""

    window_ms: float
    opened_ms: float | None = None

    def hold_ms(self, now_ms: float, *, waiting: int, free: int, idle: bool) -> float:
        """Milliseconds until the lane should be leased; 0 is now. `free` sequences could be taken at once."""
        if not waiting or not free:
            self.opened_ms = None
            return 0.0
        if idle or waiting >= free:
            self.opened_ms = None
            return 0.0
        if self.opened_ms is None:
            self.opened_ms = now_ms
        left = self.opened_ms + self.window_ms - now_ms
        if left <= 0:
            self.opened_ms = None
        return max(0.0, left)
