"""The order of service: the pure policy's laws, and the Lua doing exactly what the pure policy does."""

from __future__ import annotations

import random

from redis.asyncio import Redis

from apps.core.redis import server_time_ms
from apps.core.types import Outcome, Priority
from apps.scheduler import queue
from apps.scheduler.policy import BOOST_MS, MAX_WAIT_MS, Lane
from tests.apps.scheduler.factories import make_cost, make_request


def serve_all(lane: Lane, now_ms: int = 0) -> list[str]:
    return [ticket.org for _ in range(len(lane.waiting)) if (ticket := lane.lease(now_ms))]


def test_two_backlogged_organizations_take_turns() -> None:
    lane = Lane()
    for arrival in range(20):
        lane.enqueue(org="ab"[arrival >= 10], arrival=arrival, cost_ms=5, weight=1, priority=Priority.DEFAULT, now_ms=0)
    served = serve_all(lane)
    for length in range(2, 21):
        assert abs(served[:length].count("a") - served[:length].count("b")) <= 2


def test_weight_buys_a_proportional_share() -> None:
    lane = Lane()
    for arrival in range(60):
        org = "ab"[arrival % 2]
        lane.enqueue(org=org, arrival=arrival, cost_ms=6, weight={"a": 2, "b": 1}[org], priority=Priority.DEFAULT, now_ms=0)
    assert 18 <= serve_all(lane)[:30].count("a") <= 22


def test_priority_goes_ahead_and_yet_starves_nobody() -> None:
    lane = Lane()
    lane.enqueue(org="low", arrival=0, cost_ms=1000, weight=1, priority=Priority.FLEX, now_ms=0)
    for arrival in range(1, 200):
        lane.enqueue(org="high", arrival=arrival, cost_ms=1000, weight=1, priority=Priority.PRIORITY, now_ms=0)
    served = serve_all(lane)
    assert served[0] == "high"
    assert served.index("low") <= BOOST_MS[Priority.PRIORITY] / 1000 + 1


def test_who_waited_longer_than_promised_goes_first() -> None:
    lane = Lane()
    lane.enqueue(org="flex", arrival=0, cost_ms=1, weight=1, priority=Priority.FLEX, now_ms=0)
    lane.enqueue(org="high", arrival=1, cost_ms=1, weight=1, priority=Priority.PRIORITY, now_ms=MAX_WAIT_MS[Priority.FLEX])
    assert serve_all(lane, MAX_WAIT_MS[Priority.FLEX]) == ["flex", "high"]


async def test_lua_and_the_pure_policy_decide_alike(redis: Redis, settings) -> None:
    """3,000 random enqueues, leases and finishes; the same request is chosen every time."""
    no_bounds = {"queue_max_requests": 10**6, "queue_max_requests_per_org": 10**6, "queue_max_drain_ms": 10**9}
    settings.ENV = settings.ENV.model_copy(update=no_bounds)
    rng = random.Random(7)
    lane, running, arrivals = Lane(), {}, {}
    for _ in range(3000):
        if rng.random() < 0.55 or not lane.waiting:
            org, cost, weight = rng.choice("abc"), rng.randint(1, 1000), rng.choice([0.5, 1.0, 3.0])
            priority = rng.choice(list(Priority))
            request = make_request(org_id=org, weight=weight, priority=priority)
            assert (await queue.enqueue(redis, request, make_cost(cost), workers=1))[0] == "admitted"
            number = len(arrivals) + 1
            now = await server_time_ms(redis)
            arrivals[number] = request.id
            lane.enqueue(org=org, arrival=number, cost_ms=cost, weight=weight, priority=priority, now_ms=now)
        else:
            expected = lane.lease(now_ms=0)
            (leased,) = await queue.lease(redis, lane="m", worker="w", max_sequences=10**6, limit=1)
            assert leased.request.id == arrivals[expected.arrival]
            running[leased.request.id] = expected
        if running and rng.random() < 0.3:
            request_id, _ = running.popitem()
            assert await queue.finish(redis, request_id, Outcome.SUCCEEDED)
    assert float(await redis.hget("fair:m", "V")) == lane.virtual
