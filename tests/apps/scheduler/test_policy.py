"""The order of service: the pure policy's laws, and the Lua deciding exactly what the pure policy decides."""

from __future__ import annotations

import asyncio
import os
import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from apps.core.redis import connect
from apps.core.types import ClassLimits, Outcome, Priority
from apps.scheduler import queue
from apps.scheduler.cost import Cost
from apps.scheduler.policy import Bounds, Scheduler
from apps.scheduler.replay import Replay
from inference_site.env import ENV
from tests.apps.scheduler.factories import make_request

NO_BOUNDS = Bounds(10**9, 10**9, 10**12)
CLASSES = ENV.classes
PICK = st.integers(0, 10**6)  # of a list whose length the clock decides


def add(scheduler: Scheduler, name: str, *, org: str, cost: float = 5, weight: float = 1, at: int = 0,
        priority: Priority = Priority.DEFAULT) -> None:  # fmt: skip
    scheduler.enqueue(
        at, request_id=name, lane="m", org=org, priority=priority, choices=1, cost=Cost(cost, 0, 0), weight=weight,
        limits=CLASSES[priority], bounds=NO_BOUNDS, pace=1,
    )  # fmt: skip


def serve_all(scheduler: Scheduler, now_ms: int = 0) -> list[str]:
    leased = scheduler.lease(now_ms, lane="m", worker="w", max_sequences=10**6, limit=10**6, lease_ms=5000)
    return [scheduler.tickets[name].org for name, _ in leased]


def test_two_backlogged_organizations_take_turns() -> None:
    scheduler = Scheduler()
    for number in range(20):
        add(scheduler, str(number), org="ab"[number >= 10])
    served = serve_all(scheduler)
    for length in range(2, 21):
        assert abs(served[:length].count("a") - served[:length].count("b")) <= 2


def test_weight_buys_a_proportional_share() -> None:
    scheduler = Scheduler()
    for number in range(60):
        org = "ab"[number % 2]
        add(scheduler, str(number), org=org, cost=6, weight={"a": 2, "b": 1}[org])
    assert 18 <= serve_all(scheduler)[:30].count("a") <= 22


def test_priority_goes_ahead_and_yet_starves_nobody() -> None:
    scheduler = Scheduler()
    add(scheduler, "low", org="low", cost=1000, priority=Priority.FLEX)
    for number in range(200):
        add(scheduler, str(number), org="high", cost=1000, priority=Priority.PRIORITY)
    served = serve_all(scheduler)
    assert served[0] == "high"
    assert served.index("low") <= CLASSES[Priority.PRIORITY].boost_ms / 1000 + 1


def test_who_waited_longer_than_promised_goes_first() -> None:
    late = CLASSES[Priority.FLEX].max_wait_ms
    for now, order in ((late - 1, ["high", "flex"]), (late, ["flex", "high"])):
        scheduler = Scheduler()
        add(scheduler, "f", org="flex", priority=Priority.FLEX)
        add(scheduler, "h", org="high", at=late - 1, priority=Priority.PRIORITY)
        assert serve_all(scheduler, now) == order


def test_the_difference_of_two_backlogged_organizations_keeps_the_bound() -> None:
    """VTC's and SFQ's theorem: at any time at most twice the dearest single request, whatever the sizes are."""
    rng = random.Random(11)
    scheduler = Scheduler()
    costs: dict[str, float] = {}
    for number in range(4000):
        org = "small" if number % 4 else "large"
        costs[str(number)] = rng.uniform(1, 10) if org == "small" else rng.uniform(1, 1000)
        add(scheduler, str(number), org=org, cost=costs[str(number)])
    served = {"small": 0.0, "large": 0.0}
    left = {"small": 3000, "large": 1000}
    while min(left.values()):
        ((name, _),) = scheduler.lease(0, lane="m", worker="w", max_sequences=10**6, limit=1, lease_ms=1)
        org = scheduler.tickets[name].org
        served[org] += costs[name]
        left[org] -= 1
        if min(left.values()):
            assert abs(served["small"] - served["large"]) <= 2 * 1000


class LuaAgainstPolicy(RuleBasedStateMachine):
    """Random transitions on real Redis. At the end the pure policy replays the log: every decision must be the same."""

    classes = {
        "class_flex": ClassLimits(0.0, 3, 40, 60),
        "class_default": ClassLimits(15.5, 2, 60, 80),
        "class_priority": ClassLimits(60.25, 1, 20, 70),
    }
    bounds = {"queue_max_requests": 12, "queue_max_requests_per_org": 6, "queue_max_drain_ms": 700, "lease_ms": 12}

    @initialize()
    def start(self) -> None:
        from django.conf import settings as django_settings

        self.settings, self.before = django_settings, django_settings.ENV
        django_settings.ENV = self.before.model_copy(update={**self.classes, **self.bounds})
        self.runner = asyncio.Runner()
        self.redis = connect(os.environ["REDIS_URL"])
        self.run(self.redis.flushdb())
        self.held: list[tuple[str, int]] = []
        self.known: list[str] = []

    def run(self, work):
        return self.runner.run(work)

    @rule(org=st.sampled_from("abc"), cost=st.floats(0.01, 300), token=st.floats(0, 3), tokens=st.integers(0, 50),
          weight=st.sampled_from([0.3, 1.0, 7.0]), priority=st.sampled_from(list(Priority)), n=st.integers(1, 3),
          model=st.sampled_from(["m", "k"]))  # fmt: skip
    def enqueue(self, org, cost, token, tokens, weight, priority, n, model) -> None:
        request = make_request(org_id=org, weight=weight, priority=priority, n=n, model=model)
        self.known.append(request.id)
        self.run(queue.enqueue(self.redis, request, Cost(cost, token, tokens), pace=2))

    @rule(model=st.sampled_from(["m", "k"]), worker=st.sampled_from(["v", "w"]), limit=st.integers(1, 4))
    def lease(self, model, worker, limit) -> None:
        leases = self.run(queue.lease(self.redis, lane=model, worker=worker, max_sequences=5, limit=limit))
        self.held += [(lease.request.id, lease.attempt) for lease in leases]

    @rule(model=st.sampled_from(["m", "k"]), worker=st.sampled_from(["v", "w"]), stale=st.integers(0, 4))
    def lease_chosen(self, model, worker, stale) -> None:
        """By name, as after a peek; another dispatcher may have taken some of them since."""
        peeked = self.run(queue.peek(self.redis, model, 4))
        if stale < len(peeked):
            others = self.run(queue.lease(self.redis, lane=model, worker="v", max_sequences=5, limit=stale))
            self.held += [(lease.request.id, lease.attempt) for lease in others]
        chosen = [(request.id, "{}") for request in peeked]
        if chosen:
            leases = self.run(
                queue.lease(self.redis, lane=model, worker=worker, max_sequences=5, limit=len(chosen), chosen=chosen)
            )
            assert [lease.request.id for lease in leases] == [name for name, _ in chosen][: len(leases)]
            self.held += [(lease.request.id, lease.attempt) for lease in leases]

    @rule(pick=PICK, index=st.integers(0, 2))
    def emit(self, pick, index) -> None:
        if self.held:
            request_id, attempt = self.held[pick % len(self.held)]
            emission = queue.Emission(request_id, attempt, 0, ((0, index, 1, "t{}"),))
            self.run(queue.emit(self.redis, [emission]))

    @rule(pick=PICK, any_attempt=st.booleans())
    def finish(self, pick, any_attempt) -> None:
        pool = [(name, -1) for name in self.known] if any_attempt else self.held
        if pool:
            request_id, attempt = pool[pick % len(pool)]
            self.run(queue.finish(self.redis, request_id, Outcome.SUCCEEDED, attempt=attempt))

    @rule(pick=PICK, blame=st.booleans())
    def requeue(self, pick, blame) -> None:
        if self.held:
            self.run(queue.requeue(self.redis, [self.held[pick % len(self.held)]], blame=blame))

    @rule(pick=PICK)
    def renew(self, pick) -> None:
        if self.held:
            self.run(queue.renew(self.redis, [self.held[pick % len(self.held)]]))

    @rule(pause=st.sampled_from([0, 0, 0.003, 0.02]))
    def reap(self, pause) -> None:
        self.run(asyncio.sleep(pause))
        self.run(queue.reap(self.redis))

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        try:
            self.compare()
        finally:
            self.run(self.redis.aclose())
            self.runner.close()
            self.settings.ENV = self.before

    def compare(self) -> None:
        log = [fields for _, fields in self.run(self.redis.xrange("log"))]
        replay = Replay()
        report = replay.run(log)
        assert report.differences == []
        assert report.entries == len(log)
        lanes, busy = self.run(queue.depths(self.redis))
        for name, depth in lanes.items():
            lane = replay.scheduler.lanes[name]
            assert (depth.waiting, depth.running, depth.work_ms) == (lane.waiting, lane.running, max(0.0, lane.work_ms))
            assert float(self.run(self.redis.hget(f"fair:{name}", "V")) or 0) == lane.virtual
        assert busy == {worker: replay.scheduler.busy[worker] for worker in busy}


TestLuaAgainstPolicy = LuaAgainstPolicy.TestCase
TestLuaAgainstPolicy.settings = settings(
    max_examples=int(os.environ.get("SCHEDULER_EXAMPLES", "25")),
    stateful_step_count=int(os.environ.get("SCHEDULER_STEPS", "60")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
