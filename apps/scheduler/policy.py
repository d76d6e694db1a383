"""The scheduler as a pure state machine: start-time fair queueing with a priority boost, leases, deadlines and bounds.

The scripts under lua/ do the same inside Redis, transition for transition and bit for bit: `replay.py` holds the two against
each other on any event log, and `simulate.py` runs this one alone against a changed policy. Every method takes the time.

Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal

from apps.core.types import ClassLimits, Priority
from apps.scheduler.cost import Cost

State = Literal["waiting", "running", "finished"]
REAP_LIMIT = 200
ATTEMPTS = 1000  # of one generation: a request that Redis lost goes on at the next thousand


@dataclass(slots=True)
class Ticket:
    """One request in the scheduler's hands. `score` and `arrival` are its place in the lane for as long as it lives."""

    id: str
    lane: str
    org: str
    priority: Priority
    choices: int
    cost: Cost
    weight: float
    arrival: int
    arrived_ms: int
    start: float
    score: float
    promote_ms: int
    deadline_ms: int
    state: State = "waiting"
    attempt: int = 0
    crashes: int = 0
    worker: str = ""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a lane holds before it refuses: requests, requests of one organization, predicted milliseconds of drain."""

    lane: int
    org: int
    drain_ms: int


@dataclass(frozen=True, slots=True)
class Admission:
    """`verdict` is admitted, lane_full, org_full or drain. `drain_ms` is the lane's predicted drain before this request."""

    verdict: str
    drain_ms: int
    ticket: Ticket | None = None


class DueTimes:
    """Ids by the time at which each is due; the latest time given to an id counts."""

    def __init__(self) -> None:
        self._due: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []

    def set(self, key: str, due_ms: int) -> None:
        self._due[key] = due_ms
        heappush(self._heap, (due_ms, key))

    def remove(self, key: str) -> None:
        self._due.pop(key, None)

    def due(self, now_ms: int, limit: int) -> list[str]:
        """Those due by now, longest overdue first. They stay until removed."""
        found: list[tuple[int, str]] = []
        while self._heap and self._heap[0][0] <= now_ms and len(found) < limit:
            entry = heappop(self._heap)
            if self._due.get(entry[1]) == entry[0] and entry not in found[-1:]:
                found.append(entry)
        for entry in found:
            heappush(self._heap, entry)
        return [key for _, key in found]

    def __len__(self) -> int:
        return len(self._due)


@dataclass(slots=True)
class Lane:
    """One model's queue. `virtual` is the start tag of the latest request leased; it only advances."""

    virtual: float = 0.0
    finish_tags: dict[str, float] = field(default_factory=dict)
    work_ms: float = 0.0  # predicted, of what waits and runs
    waiting: int = 0
    running: int = 0
    by_org: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    _order: list[tuple[float, int, Ticket]] = field(default_factory=list)
    _promises: list[tuple[float, int, Ticket]] = field(default_factory=list)

    def add(self, ticket: Ticket) -> None:
        heappush(self._order, (ticket.score, ticket.arrival, ticket))
        heappush(self._promises, (ticket.promote_ms, ticket.arrival, ticket))
        self.waiting += 1
        self.by_org[ticket.org] += 1

    def discount(self, ticket: Ticket) -> None:
        """The ticket, whose state has changed already, waits no longer; its places are dropped when they come up."""
        self.waiting -= 1
        self.by_org[ticket.org] -= 1

    def next(self, now_ms: int) -> Ticket | None:
        """Who is served next: whose wait is over its class's bound, oldest promise first; else the smallest score."""
        promised = _first_waiting(self._promises)
        if promised is not None and promised.promote_ms <= now_ms:
            return promised
        return _first_waiting(self._order)

    def spend(self, cost_ms: float) -> None:
        """Adds to the work. An empty lane has none: rounding must not pile up over millions of requests."""
        self.work_ms = self.work_ms + cost_ms if self.waiting or self.running else 0.0


def _first_waiting(heap: list[tuple[float, int, Ticket]]) -> Ticket | None:
    while heap and heap[0][2].state != "waiting":
        heappop(heap)
    return heap[0][2] if heap else None


class Scheduler:
    """Every lane, lease and deadline."""

    def __init__(self) -> None:
        self.lanes: defaultdict[str, Lane] = defaultdict(Lane)
        self.tickets: dict[str, Ticket] = {}  # of what has not ended
        self.busy: defaultdict[str, int] = defaultdict(int)
        self.arrivals = 0
        self._deadlines = DueTimes()
        self._leases = DueTimes()

    def enqueue(
        self,
        now_ms: int,
        *,
        request_id: str,
        lane: str,
        org: str,
        priority: Priority,
        choices: int,
        cost: Cost,
        weight: float,
        limits: ClassLimits,
        bounds: Bounds,
        pace: float,
    ) -> Admission:
        place = self.lanes[lane]
        drain_ms = math.floor(max(0.0, place.work_ms) / pace)
        if request_id in self.tickets:
            return Admission("admitted", drain_ms, self.tickets[request_id])
        if refusal := self._refusal(place, org, bounds, drain_ms):
            return Admission(refusal, drain_ms)
        self.arrivals += 1
        start = max(place.virtual, place.finish_tags.get(org, 0.0))
        place.finish_tags[org] = start + cost.expected_ms / weight
        ticket = Ticket(
            request_id, lane, org, priority, choices, cost, weight, self.arrivals, now_ms, start, start - limits.boost_ms,
            now_ms + limits.max_wait_ms, now_ms + limits.total_timeout_ms,
        )  # fmt: skip
        self.tickets[request_id] = ticket
        place.add(ticket)
        place.spend(cost.expected_ms)
        self._deadlines.set(request_id, now_ms + min(limits.queue_timeout_ms, limits.total_timeout_ms))
        return Admission("admitted", drain_ms, ticket)

    def restore(self, ticket: Ticket, *, virtual: float, due_ms: int) -> None:
        """A request that was lost, back at the place it had."""
        lane = self.lanes[ticket.lane]
        lane.virtual = max(virtual, lane.virtual)
        tag = ticket.start + ticket.cost.expected_ms / ticket.weight
        lane.finish_tags[ticket.org] = max(tag, lane.finish_tags.get(ticket.org, 0.0))
        self.arrivals = max(ticket.arrival, self.arrivals)
        self.take_over(ticket, due_ms=due_ms, lease_ms=None)
        lane.spend(ticket.cost.expected_ms)

    def take_over(self, ticket: Ticket, *, due_ms: int, lease_ms: int | None) -> None:
        """A request as another scheduler held it. The lane's tags and work are the caller's to set."""
        lane = self.lanes[ticket.lane]
        self.tickets[ticket.id] = ticket
        self._deadlines.set(ticket.id, due_ms)
        if lease_ms is None:
            lane.add(ticket)
        else:
            lane.running += 1
            self._leases.set(ticket.id, lease_ms)

    @staticmethod
    def _refusal(lane: Lane, org: str, bounds: Bounds, drain_ms: int) -> str:
        if lane.waiting >= bounds.lane:
            return "lane_full"
        if lane.by_org[org] >= bounds.org:
            return "org_full"
        return "drain" if drain_ms >= bounds.drain_ms else ""

    def lease(
        self, now_ms: int, *, lane: str, worker: str, max_sequences: int, limit: int, lease_ms: int
    ) -> list[tuple[str, int]]:
        """(id, attempt) of the next requests that fit the worker's free sequences; an idle worker takes one of any size."""
        leased: list[tuple[str, int]] = []
        place = self.lanes[lane]
        while len(leased) < limit and (ticket := place.next(now_ms)) is not None:
            if self.busy[worker] > 0 and self.busy[worker] + ticket.choices > max_sequences:
                break
            ticket.state, ticket.worker, ticket.attempt = "running", worker, ticket.attempt + 1
            place.discount(ticket)
            place.running += 1
            place.virtual = max(place.virtual, ticket.start)
            self.busy[worker] += ticket.choices
            self._leases.set(ticket.id, now_ms + lease_ms)
            self._deadlines.set(ticket.id, ticket.deadline_ms)
            leased.append((ticket.id, ticket.attempt))
        return leased

    def renew(self, now_ms: int, held: Iterable[tuple[str, int]], *, lease_ms: int) -> list[str]:
        """Returns the ids whose lease is not that attempt's."""
        lost = []
        for request_id, attempt in held:
            if self.holds(request_id, attempt):
                self._leases.set(request_id, now_ms + lease_ms)
            else:
                lost.append(request_id)
        return lost

    def holds(self, request_id: str, attempt: int) -> bool:
        ticket = self.tickets.get(request_id)
        return ticket is not None and ticket.state == "running" and ticket.attempt == attempt

    def finish(self, request_id: str, *, generated: int) -> None:
        """Ends a request that waits or runs: what its organization pays is what it cost, not what was predicted."""
        ticket = self.tickets.pop(request_id)
        lane = self.lanes[ticket.lane]
        started = ticket.attempt % ATTEMPTS or generated
        true_ms = ticket.cost.of(generated) if started else 0.0
        was_waiting, ticket.state = ticket.state == "waiting", "finished"
        if was_waiting:
            lane.discount(ticket)
        else:
            self._leave_worker(ticket)
        self._deadlines.remove(request_id)
        lane.spend(-ticket.cost.expected_ms)
        if ticket.org in lane.finish_tags:
            lane.finish_tags[ticket.org] += (true_ms - ticket.cost.expected_ms) / ticket.weight

    def _leave_worker(self, ticket: Ticket) -> None:
        self._leases.remove(ticket.id)
        self.busy[ticket.worker] -= ticket.choices
        self.lanes[ticket.lane].running -= 1

    def requeue(self, request_id: str, attempt: int, *, blame: bool, max_attempts: int) -> str:
        """What becomes of a lease that is given back: waiting, ended (end it with `finish`), or stale."""
        if not self.holds(request_id, attempt):
            return "stale"
        ticket = self.tickets[request_id]
        ticket.crashes += blame
        if ticket.crashes >= max_attempts:
            return "ended"
        self._leave_worker(ticket)
        ticket.state = "waiting"
        self.lanes[ticket.lane].add(ticket)
        return "waiting"

    def overdue(self, now_ms: int) -> list[str]:
        """Requests past their deadline: in the queue, or altogether."""
        return self._deadlines.due(now_ms, REAP_LIMIT)

    def lapsed(self, now_ms: int) -> list[tuple[str, int]]:
        """Leases that nobody renewed."""
        return [(request_id, self.tickets[request_id].attempt) for request_id in self._leases.due(now_ms, REAP_LIMIT)]
