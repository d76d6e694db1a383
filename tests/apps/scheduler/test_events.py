"""Following requests: one subscription a process, whoever comes and goes."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import BlockingConnectionPool, Redis

from apps.core.types import Outcome, RequestFinished, Usage
from apps.scheduler.events import EventHub

HEALTH_SECONDS = 0.1
ENDED = 'f{"outcome": "succeeded", "usage": {}}'


@pytest.fixture
async def impatient(redis_url: str):
    """A client that thinks of its connections' health all the time."""
    pool = BlockingConnectionPool.from_url(
        redis_url, protocol=3, decode_responses=True, health_check_interval=HEALTH_SECONDS, max_connections=8
    )
    client = Redis.from_pool(pool)
    await client.flushdb()
    yield client
    await client.aclose()


async def test_followers_that_come_after_a_silence_do_not_read_over_each_other(impatient: Redis) -> None:
    hub = EventHub(impatient)

    async def follow(name: str) -> None:
        assert [event async for _, event in hub.follow(name, 0)] == [RequestFinished(Outcome.SUCCEEDED, Usage())]

    names = [f"r{number}" for number in range(8)]
    for name in names:
        await impatient.xadd(f"events:{name}", {"e": ENDED}, id="1-0")
    await follow("r0")
    await asyncio.wait_for(hub._reader, 5)  # nobody is left
    await asyncio.sleep(3 * HEALTH_SECONDS)
    await asyncio.gather(*map(follow, names))
    hub._reader.cancel()
    await asyncio.gather(hub._reader, return_exceptions=True)
    await hub._pubsub.aclose()
