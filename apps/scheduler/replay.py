"""Replay: an event log through the pure policy. Every decision must come out as it was recorded, to the last bit. Pure.

A log is the entries of the Redis stream `log` in their order, each a mapping of strings as lua/common.lua's `record` wrote it.
Entry 1 is the first after an empty Redis, and so is any later entry numbered 1: the state begins anew. A log that begins
later begins with a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from apps.core.types import ClassLimits, Priority
from apps.scheduler.cost import Cost
from apps.scheduler.policy import Bounds, Scheduler, Ticket

Entry = Mapping[str, str]


class BrokenLog(ValueError):
    """A log that cannot be replayed: an entry is missing, or is none."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A decision that came out differently."""

    number: int
    op: str
    recorded: str
    replayed: str


@dataclass(slots=True)
class Report:
    entries: int = 0
    flushes: int = 0
    differences: list[Difference] = field(default_factory=list)
    digest: str = ""  # SHA-256 of every replayed decision


class Replay:
    """Takes entries one by one. `scheduler` is the state after the latest."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.report = Report()
        self._number = 0
        self._digest = hashlib.sha256()

    def run(self, entries: Iterable[Entry]) -> Report:
        """Raises BrokenLog."""
        for entry in entries:
            self.take(entry)
        return self.report

    def take(self, entry: Entry) -> None:
        """Raises BrokenLog."""
        try:
            self._follow(int(entry["n"]), entry["op"])
            recorded, replayed = _DECISIONS[entry["op"]](self.scheduler, entry)
        except (KeyError, ValueError) as error:
            raise BrokenLog(f"entry {self._number}: {error}") from None
        self.report.entries += 1
        self._digest.update(f"{entry['op']} {replayed}\n".encode())
        self.report.digest = self._digest.hexdigest()
        if recorded != replayed:
            self.report.differences.append(Difference(self._number, entry["op"], recorded, replayed))

    def _follow(self, number: int, op: str) -> None:
        if number == 1 or (op == "checkpoint" and not self._number):
            self.report.flushes += bool(self._number)
            self.scheduler = Scheduler()
        elif number != self._number + 1:
            raise ValueError(f"followed by entry {number}: what is between them is missing")
        self._number = number


def _enqueue(scheduler: Scheduler, e: Entry) -> tuple[str, str]:
    admission = scheduler.enqueue(
        int(e["at"]),
        request_id=e["id"],
        lane=e["lane"],
        org=e["org"],
        priority=Priority(int(e["priority"])),
        choices=int(e["choices"]),
        cost=cost_of(e),
        weight=float(e["weight"]),
        limits=limits_of(e),
        bounds=Bounds(int(e["lane_cap"]), int(e["org_cap"]), int(e["drain_cap_ms"])),
        pace=float(e["pace"]),
    )
    ticket = admission.ticket
    replayed = (
        f"{admission.verdict} {admission.drain_ms} {ticket.arrival if ticket else 0} {bits(ticket.score if ticket else 0)}"
    )
    return f"{e['verdict']} {e['drain_ms']} {e['arrival']} {bits(e['score'])}", replayed


def _restored(scheduler: Scheduler, e: Entry) -> tuple[str, str]:
    """A gateway gives back what a flush took."""
    limits, start, arrived = limits_of(e), float(e["start"]), int(e["arrived_ms"])
    due = limits.total_timeout_ms if int(e["seen"]) else min(limits.queue_timeout_ms, limits.total_timeout_ms)
    ticket = Ticket(
        e["id"], e["lane"], e["org"], Priority(int(e["priority"])), int(e["choices"]), cost_of(e), float(e["weight"]),
        int(e["arrival"]), arrived, start, start - limits.boost_ms, arrived + limits.max_wait_ms,
        arrived + limits.total_timeout_ms, attempt=int(e["attempt"]),
    )  # fmt: skip
    scheduler.restore(ticket, virtual=float(e["virtual"]), due_ms=arrived + due)
    return bits(e["score"]), bits(ticket.score)


def cost_of(e: Entry) -> Cost:
    return Cost(float(e["fixed_ms"]), float(e["token_ms"]), int(e["tokens"]))


def limits_of(e: Entry) -> ClassLimits:
    return ClassLimits(float(e["boost_ms"]), int(e["max_wait_ms"]), int(e["queue_timeout_ms"]), int(e["total_timeout_ms"]))


def _lease(scheduler: Scheduler, e: Entry) -> tuple[str, str]:
    leased = scheduler.lease(
        int(e["at"]),
        lane=e["lane"],
        worker=e["worker"],
        max_sequences=int(e["max_sequences"]),
        limit=int(e["limit"]),
        lease_ms=int(e["lease_ms"]),
    )
    return e["leased"], _flat(leased)


def _emit(scheduler: Scheduler, e: Entry) -> tuple[str, str]:
    """The tokens are not the scheduler's decision; that their attempts hold their leases is."""
    held = pairs(e["renewed"])
    return "", " ".join(scheduler.renew(int(e["at"]), held, lease_ms=int(e["lease_ms"])))


def _renew(scheduler: Scheduler, e: Entry) -> tuple[str, str]:
    return e["lost"], " ".join(scheduler.renew(int(e["at"]), pairs(e["held"]), lease_ms=int(e["lease_ms"])))


def _end(scheduler: Scheduler, e: Entry) -> tuple[str, str]:
    ticket = scheduler.tickets[e["id"]]
    scheduler.finish(e["id"], generated=int(e["generated"]))
    tag = scheduler.lanes[ticket.lane].finish_tags[ticket.org]
    return f"{e['attempt']} {bits(e['tag'])}", f"{ticket.attempt} {bits(tag)}"


def _requeue(scheduler: Scheduler, e: Entry) -> tuple[str, str]:
    blame, most = e["blame"] == "1", int(e["max_attempts"])
    return e["became"], scheduler.requeue(e["id"], int(e["attempt"]), blame=blame, max_attempts=most)


def _reap(scheduler: Scheduler, e: Entry) -> tuple[str, str]:
    now = int(e["at"])
    return f"{e['overdue']}|{e['lapsed']}", f"{' '.join(scheduler.overdue(now))}|{_flat(scheduler.lapsed(now))}"


def _checkpoint(scheduler: Scheduler, e: Entry) -> tuple[str, str]:
    """At the head of a log it is the state to begin with; later it is a state to be found equal."""
    state = json.loads(e["state"])
    recorded = _requests_of(state)
    if not scheduler.arrivals:
        _restore(scheduler, state)
    replayed = sorted(f"{t.id} {t.state} {t.attempt} {bits(t.score)}" for t in scheduler.tickets.values())
    return "; ".join(recorded), "; ".join(replayed)


def _requests_of(state: dict[str, Any]) -> list[str]:
    return sorted(f"{r['id']} {r['state']} {r['attempt']} {bits(r['score'])}" for r in state["requests"] or ())


def _restore(scheduler: Scheduler, state: dict[str, Any]) -> None:
    scheduler.arrivals = int(state["arrivals"])
    scheduler.busy.update({worker: int(count) for worker, count in dict(state["busy"]).items()})
    for r in state["requests"] or ():
        scheduler.take_over(_ticket(r), due_ms=int(r["due"]), lease_ms=int(r["lease"]) if r.get("lease") else None)
    for name, stored in dict(state["lanes"]).items():
        lane = scheduler.lanes[name]
        lane.work_ms = float(stored["work"])
        for key, value in dict(stored["fair"]).items():
            if key == "V":
                lane.virtual = float(value)
            else:
                lane.finish_tags[key.removeprefix("F:")] = float(value)


def _ticket(r: Entry) -> Ticket:
    return Ticket(
        r["id"], r["lane"], r["org"], Priority(int(r["priority"])), int(r["choices"]),
        Cost(float(r["fixed_cost_ms"]), float(r["token_cost_ms"]), int(r["tokens"])), float(r["weight"]),
        int(r["member"][:16]), int(r["arrived_ms"]), float(r["start"]), float(r["score"]), int(r["promote_ms"]),
        int(r["deadline_ms"]), "running" if r["state"] == "running" else "waiting", int(r["attempt"]),
        int(r.get("crashes", 0)), r.get("worker", ""),
    )  # fmt: skip


_DECISIONS: dict[str, Callable[[Scheduler, Entry], tuple[str, str]]] = {
    "enqueue": _enqueue,
    "lease": _lease,
    "emit": _emit,
    "renew": _renew,
    "end": _end,
    "requeue": _requeue,
    "reap": _reap,
    "restore": _restored,
    "checkpoint": _checkpoint,
}


def pairs(text: str) -> list[tuple[str, int]]:
    """ "a 1 b 2" -> [("a", 1), ("b", 2)]."""
    words = text.split()
    return list(zip(words[::2], map(int, words[1::2]), strict=True))


def _flat(held: Iterable[tuple[str, int]]) -> str:
    return " ".join(f"{request_id} {attempt}" for request_id, attempt in held)


def bits(value: str | float) -> str:
    """A double by its bits: equal only when nothing at all differs."""
    return float(value).hex()
