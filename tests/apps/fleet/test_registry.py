"""The live picture: the living, by Redis' clock, and nothing that is not a snapshot."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from redis.asyncio import Redis

from apps.core.types import ResidentModel, WorkerSnapshot
from apps.fleet import registry
from apps.fleet.watch import UNIT_SECONDS, StuckDetector


def snapshot(name: str, *, step: int = 0, running: int = 0, blocks: int = 9) -> WorkerSnapshot:
    model = ResidentModel("m", "ready", running=running, kv_blocks_total=blocks)
    return WorkerSnapshot(name, "a:1", 1, step, "cpu", "individual", False, 10, 5, (model,))


async def test_the_living_are_seen_and_the_silent_are_not(redis: Redis) -> None:
    await registry.publish(redis, snapshot("a"))
    assert [w.worker_id for w in await registry.workers(redis, timeout_ms=1000)] == ["a"]
    await asyncio.sleep(0.02)
    assert await registry.workers(redis, timeout_ms=10) == []


@pytest.mark.parametrize(
    "garbage",
    ["", "\x80pickle", "{}", "[1]", '{"worker_id": "x", "address": 5}'],
    ids=["empty", "pickle", "nothing", "a list", "a wrong type"],
)
async def test_garbage_is_put_aside_once_and_counted(redis: Redis, garbage: str) -> None:
    await redis.hset(registry.KEY, "x", garbage)
    await registry.publish(redis, snapshot("a"))
    for _ in range(2):
        assert [w.worker_id for w in await registry.workers(redis, timeout_ms=1000)] == ["a"]
    assert await redis.hgetall("workers:quarantine") == {"x": garbage}
    assert await redis.get("quarantined") == "1"


async def test_a_worker_cannot_stand_under_another_s_name(redis: Redis) -> None:
    await registry.publish(redis, snapshot("a"))
    await redis.hset(registry.KEY, "b", await redis.hget(registry.KEY, "a"))
    assert [w.worker_id for w in await registry.workers(redis, timeout_ms=1000)] == ["a"]


async def test_an_entry_from_the_future_is_not_alive(redis: Redis) -> None:
    forged = dataclasses.replace(snapshot("a"), seen_ms=2**53)
    await redis.hset(registry.KEY, "a", registry._SNAPSHOT.dump_json(forged).decode())
    assert await registry.workers(redis, timeout_ms=1000) == []


async def test_a_daemon_of_an_old_epoch_does_not_speak_over_the_new_one(redis: Redis) -> None:
    old, new = snapshot("a", step=1), dataclasses.replace(snapshot("a", step=2), epoch=2)
    assert await registry.publish(redis, new)
    assert not await registry.publish(redis, old)
    assert [w.epoch for w in await registry.workers(redis, timeout_ms=1000)] == [2]
    for row in ("nonsense", '{"epoch": 9}', '{"epoch": 9, "seen_ms": 9007199254740992}'):
        await redis.hset(registry.KEY, "a", row)
        assert await registry.publish(redis, old), "what is no daemon's, or was said long ago, fences nobody"


async def test_a_forgotten_worker_is_out_at_once(redis: Redis) -> None:
    await registry.publish(redis, snapshot("a"))
    await registry.forget(redis, "a")
    assert await registry.workers(redis, timeout_ms=1000) == []


def test_a_step_that_stands_still_while_work_runs_is_stuck() -> None:
    detector = StuckDetector(timeout_seconds=5)
    start = detector._moved
    assert not detector.stuck(snapshot("a", step=1, running=1), start)
    assert not detector.stuck(snapshot("a", step=1, running=1), start + 4)
    assert detector.stuck(snapshot("a", step=1, running=1), start + 6)
    assert not detector.stuck(snapshot("a", step=2, running=1), start + 7)
    assert not detector.stuck(snapshot("a", step=2, running=0), start + 20), "idle is not stuck"


def test_a_long_step_of_media_is_waited_for() -> None:
    detector = StuckDetector(timeout_seconds=5)
    decoding = snapshot("a", step=1, running=1, blocks=0)
    assert not detector.stuck(decoding, detector._moved)
    assert not detector.stuck(decoding, detector._moved + UNIT_SECONDS - 1)
    assert detector.stuck(decoding, detector._moved + UNIT_SECONDS + 1)
