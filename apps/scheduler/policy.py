"""The order of service as pure functions: start-time fair queueing with a priority boost. lua/enqueue.lua and lease.lua
do the same inside Redis, and tests/apps/scheduler/test_policy.py holds the two against each other.

Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from apps.core.types import Priority

# How far ahead of its fair place a class stands, in milliseconds of service. It bounds how long a lower class can wait.
BOOST_MS: dict[Priority, float] = {Priority.FLEX: 0.0, Priority.DEFAULT: 15_000.0, Priority.PRIORITY: 60_000.0}
# After this long in the queue a request goes to the front whatever its score.
MAX_WAIT_MS: dict[Priority, int] = {Priority.FLEX: 120_000, Priority.DEFAULT: 30_000, Priority.PRIORITY: 15_000}


@dataclass(order=True, frozen=True, slots=True)
class Ticket:
    """A place in a lane: the smallest is served next."""

    score: float
    arrival: int
    start: float = field(compare=False)
    org: str = field(compare=False)
    promote_ms: int = field(compare=False)


@dataclass(slots=True)
class Lane:
    """One model's queue. `virtual` is the start tag of the latest request leased; it only advances."""

    virtual: float = 0.0
    finish_tags: dict[str, float] = field(default_factory=dict)
    waiting: list[Ticket] = field(default_factory=list)

    def enqueue(self, *, org: str, arrival: int, cost_ms: float, weight: float, priority: Priority, now_ms: int) -> Ticket:
        start = max(self.virtual, self.finish_tags.get(org, 0.0))
        self.finish_tags[org] = start + cost_ms / weight
        ticket = Ticket(start - BOOST_MS[priority], arrival, start, org, now_ms + MAX_WAIT_MS[priority])
        self.waiting.append(ticket)
        return ticket

    def lease(self, now_ms: int) -> Ticket | None:
        """Takes the next request: one whose wait is over its class's bound, oldest promise first, else the smallest."""
        overdue = [t for t in self.waiting if t.promote_ms <= now_ms]
        chosen = min(overdue, key=lambda t: (t.promote_ms, t.arrival)) if overdue else min(self.waiting, default=None)
        if chosen is not None:
            self.waiting.remove(chosen)
            self.virtual = max(self.virtual, chosen.start)
        return chosen

    def correct(self, org: str, *, predicted_ms: float, true_ms: float, weight: float) -> None:
        """On finish: what the organization pays is what its request really cost."""
        if org in self.finish_tags:
            self.finish_tags[org] += (true_ms - predicted_ms) / weight
