"""Each transition on real Redis: nothing lost, nothing doubled, nothing written by who lost the lease."""

from __future__ import annotations

import asyncio
import json

import pytest
from redis.asyncio import Redis

from apps.core.types import ChoiceFinished, ClassLimits, FinishReason, Outcome, Priority, RequestFinished, TextDelta
from apps.scheduler import queue
from apps.scheduler.codec import decode_event, encode_event
from apps.scheduler.events import EventHub
from apps.scheduler.queue import Emission, Lease
from tests.apps.scheduler.factories import make_cost, make_request


async def enqueue(redis: Redis, **fields) -> str:
    request = make_request(**fields)
    assert isinstance(await queue.enqueue(redis, request, make_cost(), pace=1), queue.Place)
    return request.id


async def lease(redis: Redis, *, limit: int = 1, max_sequences: int = 100) -> list[Lease]:
    return await queue.lease(redis, lane="m", worker="w", max_sequences=max_sequences, limit=limit)


def token(request_id: str, attempt: int, index: int, text: str = "x") -> Emission:
    payload = encode_event(TextDelta(0, index, (5,), text))
    return Emission(request_id, attempt, 0, ((0, index, 1, payload),))


async def log(redis: Redis, request_id: str) -> list:
    return [decode_event(fields["e"]) for _, fields in await redis.xrange(f"events:{request_id}")]


async def test_a_request_runs_from_queue_to_ledger(redis: Redis) -> None:
    request_id = await enqueue(redis)
    (held,) = await lease(redis)
    assert (held.request.id, held.attempt) == (request_id, 1)
    assert await queue.emit(redis, [token(request_id, 1, 0), token(request_id, 1, 1)]) == []
    assert await queue.finish(redis, request_id, Outcome.SUCCEEDED, attempt=1)
    end = (await log(redis, request_id))[-1]
    assert isinstance(end, RequestFinished)
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (3, 2)
    ((_, fields),) = await redis.xrange("ledger")
    entry = json.loads(fields["entry"])
    assert (entry["outcome"], entry["completion_tokens"], entry["attempts"]) == ("succeeded", 2, 1)
    lanes, busy = await queue.depths(redis)
    assert (lanes["m"].waiting, lanes["m"].running, lanes["m"].work_ms, busy["w"]) == (0, 0, 0, 0)


async def test_the_end_takes_effect_once(redis: Redis) -> None:
    request_id = await enqueue(redis)
    await lease(redis)
    ends = await asyncio.gather(*(queue.finish(redis, request_id, Outcome.SUCCEEDED, attempt=1) for _ in range(20)))
    assert sum(ends) == 1
    assert await redis.xlen("ledger") == 1


async def test_a_token_and_the_end_it_brings_travel_together(redis: Redis) -> None:
    request_id = await enqueue(redis)
    await lease(redis)
    end = encode_event(ChoiceFinished(0, FinishReason.STOP))
    emission = token(request_id, 1, 0)
    both = Emission(request_id, 1, 0, (*emission.deltas, (0, 1, 0, end)))
    assert await queue.emit(redis, [both]) == []
    assert [type(event) for event in await log(redis, request_id)] == [TextDelta, ChoiceFinished]


@pytest.mark.parametrize(("attempt", "index"), [(2, 0), (1, 1), (0, 0)])
async def test_gaps_repeats_and_stale_attempts_are_refused(redis: Redis, attempt: int, index: int) -> None:
    request_id = await enqueue(redis)
    await lease(redis)
    assert await queue.emit(redis, [token(request_id, attempt, index)]) == [request_id]
    assert await log(redis, request_id) == []


async def test_a_lost_worker_s_request_waits_at_its_old_place_with_its_tokens(redis: Redis) -> None:
    first, second = await enqueue(redis), await enqueue(redis)
    (held,) = await lease(redis)
    await queue.emit(redis, [token(first, 1, 0)])
    assert await queue.requeue(redis, [(first, held.attempt)], blame=True) == 1
    (again,) = await lease(redis)
    assert (again.request.id, again.attempt) == (first, 2)
    assert await queue.emit(redis, [token(first, 1, 1)]) == [first]  # the old worker, back from the dead
    assert await queue.emit(redis, [token(first, 2, 1)]) == []
    assert [event.first_index for event in await log(redis, first)] == [0, 1]
    assert (await lease(redis))[0].request.id == second


async def test_a_request_that_kills_workers_ends(redis: Redis, settings) -> None:
    request_id = await enqueue(redis)
    for attempt in range(1, settings.ENV.max_attempts + 1):
        await lease(redis)
        await queue.requeue(redis, [(request_id, attempt)], blame=True)
    end = (await log(redis, request_id))[-1]
    assert (end.outcome, end.error_code) == (Outcome.FAILED, "worker_lost")


async def test_handing_over_blames_nobody(redis: Redis) -> None:
    request_id = await enqueue(redis)
    for attempt in range(1, 6):
        await lease(redis)
        await queue.requeue(redis, [(request_id, attempt)], blame=False)
    assert (await lease(redis))[0].attempt == 6


async def test_lapsed_leases_come_back_and_deadlines_end(redis: Redis, settings) -> None:
    hurried = ClassLimits(boost_ms=0, max_wait_ms=1, queue_timeout_ms=1, total_timeout_ms=1000)
    settings.ENV = settings.ENV.model_copy(update={"class_flex": hurried})
    waiting = await enqueue(redis, priority=Priority.FLEX)
    await asyncio.sleep(0.005)
    assert await queue.reap(redis) == 1
    assert (await log(redis, waiting))[-1].error_code == "queue_timeout"
    running = await enqueue(redis)
    await lease(redis)
    await redis.zadd("leases", {running: 1})
    assert await queue.reap(redis) == 1
    assert (await lease(redis))[0].attempt == 2


async def test_cancelling_a_running_request_voids_its_engine_work(redis: Redis) -> None:
    request_id = await enqueue(redis)
    await lease(redis)
    async with redis.pubsub(ignore_subscribe_messages=True) as channel:
        await channel.subscribe("abort")
        await channel.get_message(timeout=1)
        assert await queue.finish(redis, request_id, Outcome.CANCELLED, code="cancelled")
        message = await channel.get_message(timeout=2)
    assert message["data"] == f"{request_id} 1"
    assert await queue.renew(redis, [(request_id, 1)]) == [request_id]


async def test_a_worker_is_given_no_more_than_it_can_run(redis: Redis) -> None:
    for _ in range(5):
        await enqueue(redis, n=2)
    assert len(await lease(redis, limit=10, max_sequences=6)) == 3
    assert await lease(redis, limit=10, max_sequences=6) == []


@pytest.mark.parametrize(
    ("bound", "verdict"),
    [("queue_max_requests", "lane_full"), ("queue_max_requests_per_org", "org_full"), ("queue_max_drain_ms", "drain")],
)
async def test_each_bound_of_the_queue_refuses(redis: Redis, settings, bound: str, verdict: str) -> None:
    settings.ENV = settings.ENV.model_copy(update={bound: 2 if bound != "queue_max_drain_ms" else 20})
    for _ in range(2):
        await enqueue(redis)
    refusal = await queue.enqueue(redis, make_request(), make_cost(), pace=1)
    assert isinstance(refusal, queue.Refusal)
    assert refusal.verdict == verdict


async def test_enqueuing_twice_admits_once(redis: Redis) -> None:
    request = make_request()
    for _ in range(2):
        await queue.enqueue(redis, request, make_cost(), pace=1)
    assert len(await lease(redis, limit=10)) == 1


async def test_garbage_in_a_lane_is_passed_over(redis: Redis) -> None:
    await redis.zadd("lane:m", {"0000000000000000:ghost": -1e9, "nonsense": -2e9})
    request_id = await enqueue(redis)
    assert [held.request.id for held in await lease(redis, limit=5)] == [request_id]
    assert int(await redis.get("quarantined")) == 2


async def test_a_damaged_record_fails_alone(redis: Redis) -> None:
    damaged, fine = await enqueue(redis), await enqueue(redis)
    await redis.hset(f"request:{damaged}", "payload", "\x80garbage")
    assert [held.request.id for held in await lease(redis, limit=5)] == [fine]
    assert (await log(redis, damaged))[-1].error_code == "damaged_record"


async def test_followers_see_every_event_once_and_resume_from_any(redis: Redis) -> None:
    request_id = await enqueue(redis)
    await lease(redis)
    hub = EventHub(redis)

    async def follow(after: int) -> list[int]:
        return [number async for number, _ in hub.follow(request_id, after)]

    early = asyncio.create_task(follow(0))
    for index in range(5):
        await queue.emit(redis, [token(request_id, 1, index)])
    late = asyncio.create_task(follow(3))
    await asyncio.sleep(0)
    await queue.finish(redis, request_id, Outcome.SUCCEEDED, attempt=1)
    assert await asyncio.wait_for(early, 5) == [1, 2, 3, 4, 5, 6]
    assert await asyncio.wait_for(late, 5) == [4, 5, 6]
