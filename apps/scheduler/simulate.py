"""A trace of requests served by the pure policy under any weights, caps, classes and number of workers. Pure, and fast.

A worker serves `slots` requests at a time, each `slots` times slower than alone: what a full batch costs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any

from apps.core.types import ClassLimits, Priority
from apps.scheduler.cost import Cost
from apps.scheduler.policy import Bounds, Scheduler
from apps.scheduler.replay import cost_of, limits_of

REAP_MS = 1000
_FOREVER = 10**15
_BOUNDS = {"lane_cap": "lane", "org_cap": "org", "drain_cap_ms": "drain_ms"}


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace: what was predicted of it, and the tokens it really generated."""

    at_ms: int
    lane: str
    org: str
    priority: Priority
    cost: Cost
    generated: int
    weight: float = 1.0
    choices: int = 1


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be changed. `weights` are by organization; others keep the trace's."""

    classes: Mapping[Priority, ClassLimits]
    bounds: Bounds
    workers: int = 1
    slots: int = 1
    weights: Mapping[str, float] = field(default_factory=dict)

    def changed(self, setting: str) -> Policy:
        """With one setting changed, such as `weight.acme=3`, `lane_cap=200`, `workers=2`, `flex.max_wait_ms=60000`.

        Raises ValueError.
        """
        name, _, value = setting.partition("=")
        group, _, rest = name.partition(".")
        if group == "weight" and rest:
            return replace(self, weights={**self.weights, rest: _positive(value)})
        if group.upper() in Priority.__members__ and rest in ClassLimits.__dataclass_fields__:
            priority = Priority[group.upper()]
            changes: dict[str, Any] = {rest: float(value) if rest == "boost_ms" else int(value)}
            limits = replace(self.classes[priority], **changes)
            return replace(self, classes={**self.classes, priority: limits})
        if name in _BOUNDS:
            return replace(self, bounds=replace(self.bounds, **{_BOUNDS[name]: int(value)}))
        if name == "workers":
            return replace(self, workers=int(_positive(value)))
        if name == "slots":
            return replace(self, slots=int(_positive(value)))
        known = "weight.ORG, workers, slots, lane_cap, org_cap, drain_cap_ms, CLASS.boost_ms, CLASS.max_wait_ms, ..."
        raise ValueError(f"{setting!r} is no setting; known are {known}")


def _positive(value: str) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{value} is not above 0")
    return number


@dataclass(slots=True)
class OrgResult:
    """What one organization got."""

    waits_ms: list[int] = field(default_factory=list)
    served_ms: float = 0.0
    refused: int = 0
    expired: int = 0

    def wait_ms(self, quantile: float) -> int:
        """Of the requests that started; 0 when none did."""
        ordered = sorted(self.waits_ms)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else 0


class Simulation:
    """One run. The order of equal times is fixed: completions, then the reaper, then arrivals."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.results: defaultdict[str, OrgResult] = defaultdict(OrgResult)
        self._scheduler = Scheduler()
        self._arrivals: dict[str, Arrival] = {}
        self._free = {f"worker-{i}": policy.slots for i in range(policy.workers)}
        self._ends: list[tuple[float, str, str]] = []
        self._lanes: dict[str, None] = {}  # in the order they were first seen
        self._reap_at = 0

    def run(self, trace: Iterable[Arrival]) -> dict[str, OrgResult]:
        for number, arrival in enumerate(trace):
            self._advance(arrival.at_ms)
            self._arrive(f"r{number}", arrival)
        self._advance(_FOREVER)
        return dict(sorted(self.results.items()))

    def _advance(self, until_ms: int) -> None:
        """Lets everything end that ends by then."""
        while self._ends and self._ends[0][0] <= until_ms:
            ended_ms, worker, request_id = heappop(self._ends)
            now = math.ceil(ended_ms)
            self._reap(now)
            self._scheduler.finish(request_id, generated=self._arrivals.pop(request_id).generated)
            self._free[worker] += 1
            self._fill(worker, now)
        if until_ms < _FOREVER:
            self._reap(until_ms)

    def _reap(self, now_ms: int) -> None:
        if now_ms < self._reap_at:
            return
        self._reap_at = now_ms + REAP_MS
        while late := [name for name in self._scheduler.overdue(now_ms) if self._scheduler.tickets[name].state == "waiting"]:
            for request_id in late:  # the simulated machines finish what they began
                self.results[self._arrivals.pop(request_id).org].expired += 1
                self._scheduler.finish(request_id, generated=0)

    def _arrive(self, request_id: str, arrival: Arrival) -> None:
        policy = self.policy
        admission = self._scheduler.enqueue(
            arrival.at_ms, request_id=request_id, lane=arrival.lane, org=arrival.org, priority=arrival.priority,
            choices=1, cost=arrival.cost, weight=policy.weights.get(arrival.org, arrival.weight),
            limits=policy.classes[arrival.priority], bounds=policy.bounds, pace=policy.workers,
        )  # fmt: skip
        if admission.verdict != "admitted":
            self.results[arrival.org].refused += 1
            return
        self._arrivals[request_id] = arrival
        self._lanes[arrival.lane] = None
        for worker, free in self._free.items():
            if free:
                self._fill(worker, arrival.at_ms)
                return

    def _fill(self, worker: str, now_ms: int) -> None:
        """The worker takes from each lane in turn until it is full."""
        for lane in self._lanes:
            free = self._free[worker]
            if not free:
                return
            if not self._scheduler.lanes[lane].waiting:
                continue
            leased = self._scheduler.lease(
                now_ms, lane=lane, worker=worker, max_sequences=self.policy.slots, limit=free, lease_ms=_FOREVER
            )
            for request_id, _ in leased:
                self._begin(worker, request_id, now_ms)

    def _begin(self, worker: str, request_id: str, now_ms: int) -> None:
        arrival = self._arrivals[request_id]
        true_ms = arrival.cost.of(arrival.generated)
        result = self.results[arrival.org]
        result.waits_ms.append(now_ms - arrival.at_ms)
        result.served_ms += true_ms
        self._free[worker] -= 1
        heappush(self._ends, (now_ms + true_ms * self.policy.slots, worker, request_id))


def arrivals_of(entries: Iterable[Mapping[str, Any]]) -> list[Arrival]:
    """The requests of a trace: an event log, or lines of {at_ms, org, model, tier, prompt_ms, token_ms, tokens, generated}.

    Raises ValueError for a line that is neither.
    """
    rows = list(entries)
    try:
        found = _from_log(rows) if rows and "op" in rows[0] else [_from_line(row) for row in rows]
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a trace: {error}") from None
    return sorted(found, key=lambda arrival: arrival.at_ms)


def _from_log(entries: list[Mapping[str, str]]) -> list[Arrival]:
    """Refused requests too: under another policy they may be served. They are given what was expected of them."""
    generated = {e["id"]: int(e["generated"]) for e in entries if e["op"] == "end"}
    return [
        Arrival(
            int(e["at"]), e["lane"], e["org"], Priority(int(e["priority"])), cost_of(e),
            generated.get(e["id"], int(e["tokens"])), float(e["weight"]), int(e["choices"]),
        )
        for e in entries if e["op"] == "enqueue"
    ]  # fmt: skip


def policy_of(entries: Iterable[Mapping[str, str]], policy: Policy) -> Policy:
    """The policy with the classes, bounds and pace that a log was recorded under; the latest of each."""
    for e in entries:
        if e.get("op") == "enqueue":
            bounds = Bounds(int(e["lane_cap"]), int(e["org_cap"]), int(e["drain_cap_ms"]))
            classes = {**policy.classes, Priority(int(e["priority"])): limits_of(e)}
            policy = replace(policy, classes=classes, bounds=bounds, workers=max(1, round(float(e["pace"]))))
    return policy


def _from_line(row: Mapping[str, Any]) -> Arrival:
    tokens = int(row.get("tokens", 0))
    return Arrival(
        at_ms=int(row["at_ms"]),
        lane=str(row.get("model", "model")),
        org=str(row["org"]),
        priority=Priority[str(row.get("tier", "default")).upper()],
        cost=Cost(float(row["prompt_ms"]), float(row.get("token_ms", 0)), tokens),
        generated=int(row.get("generated", tokens)),
        weight=float(row.get("weight", 1)),
    )
