"""The batch collector: how long to let requests of one lane gather before they are leased together. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LaneView:
    """One lane at a moment: what waits, and what its workers could take at once or run already, in sequences."""

    waiting: int
    waiting_ms: float  # predicted work
    free: int
    busy: int
    idle: bool  # a worker of the lane runs nothing

    @property
    def load(self) -> float:
        """Of the workers' sequences, the share that is taken: 0 to 1."""
        return self.busy / max(1, self.busy + self.free)


@dataclass(slots=True)
class BatchCollector:
    """One lane's window. Interrupting a busy worker costs more the more it runs, and an idle one nothing: so the window
    and the work that may gather in it grow with the load, from nothing to `window_ms` and `max_cost_ms`. It closes early
    when nothing more is likely to come in time.
    """

    window_ms: float
    max_cost_ms: float
    _opened_ms: float | None = None
    _arrivals: _Arrivals = field(default_factory=lambda: _Arrivals())

    def hold_ms(self, now_ms: float, lane: LaneView) -> float:
        """Milliseconds until the lane should be leased; 0 is now."""
        gap = self._arrivals.gap_ms(now_ms, lane.waiting)
        if self._is_due(lane):
            self._opened_ms = None
            return 0.0
        if self._opened_ms is None:
            self._opened_ms = now_ms
        left = self._opened_ms + self.window_ms * lane.load - now_ms
        if left <= 0 or gap > left:
            self._opened_ms = None
            return 0.0
        return left

    def _is_due(self, lane: LaneView) -> bool:
        full = lane.waiting >= lane.free or lane.waiting_ms >= self.max_cost_ms * lane.load
        return not lane.waiting or lane.idle or full


@dataclass(slots=True)
class _Arrivals:
    """The usual time between arrivals of a lane: an average in which each new one counts a quarter."""

    _seen: int = 0
    _last_ms: float | None = None
    _gap_ms: float = 0.0

    def gap_ms(self, now_ms: float, waiting: int) -> float:
        new, self._seen = max(0, waiting - self._seen), waiting
        if not new:
            return self._gap_ms
        if self._last_ms is not None:
            self._gap_ms += ((now_ms - self._last_ms) / new - self._gap_ms) / 4
        self._last_ms = now_ms
        return self._gap_ms
