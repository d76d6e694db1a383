"""What breaks, and what must not: each fault, then the whole history checked."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from apps.core.errors import ServiceError
from apps.core.types import Outcome, Priority, TextDelta
from apps.scheduler import queue, services
from apps.scheduler.forecast import Progress
from apps.scheduler.replay import pairs
from tests import history
from tests.apps.scheduler.factories import make_cost, make_request
from tests.apps.scheduler.site import site
from tests.services import ROOT


async def started(client: history.Client, tokens: int = 3) -> None:
    async with asyncio.timeout(10):
        while len(client.tokens()) < tokens:  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_nothing_breaks_and_every_wait_adds_up(redis: Redis, tmp_path: Path) -> None:
    async with site(redis, tmp_path / "log", max_running=2) as made:
        clients = await asyncio.gather(*(made.run(org="ab"[i % 2], seed=i) for i in range(20)))
        await made.check()
    for client in clients:
        end = client.end
        assert sum(end.wait.values()) == pytest.approx(end.timing["ttft_ms"], abs=1), end
        assert "prefill" in end.wait
    assert any(client.end.wait.get("capacity", 0) > 0 for client in clients)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_worker_that_dies_in_mid_stream_is_not_noticed_by_its_clients(redis: Redis, tmp_path: Path, n: int) -> None:
    async with site(redis, tmp_path / "log", workers=2, step_seconds=0.005) as made:
        for seed in range(5):
            client = await made.submit(seed=seed, max_tokens=40, n=n)
            following = asyncio.create_task(made.follow(client))
            await started(client, random.Random(seed).randrange(1, 20))
            victim = next(d for d in made.daemons if d._sequences)
            await made.kill(victim)
            await asyncio.wait_for(following, 8)
            assert client.end.outcome is Outcome.SUCCEEDED
            await made.revive(victim)
        await made.check()
    assert any(client.end.wait.get("prefill", 0) >= 0 for client in made.clients)


async def test_a_flush_loses_nothing_doubles_nothing_and_keeps_the_order(redis: Redis, tmp_path: Path) -> None:
    async with site(redis, tmp_path / "log", step_seconds=0.01, max_running=50) as made:
        running = [await made.submit(seed=i, max_tokens=60) for i in range(50)]
        waiting = [await made.submit(seed=i, org="abc"[i % 3], max_tokens=2) for i in range(100)]
        following = [asyncio.create_task(made.follow(client)) for client in (*running, *waiting)]
        for client in running[:3]:
            await started(client)
        before = [entry["id"] for entry in _queued(await _entries(redis))]
        await redis.flushall()
        since = asyncio.get_running_loop().time()
        await asyncio.wait_for(asyncio.gather(*following), 30)
        took = asyncio.get_running_loop().time() - since
        entries = await made.check()
    assert all(client.end.outcome is Outcome.SUCCEEDED for client in made.clients)
    after = [request_id for entry in entries if entry["op"] == "lease" for request_id, _ in _pairs(entry)]
    again = [request_id for request_id in after[::-1] if request_id in set(before)]
    assert len(again) >= len(set(before))
    assert took < 20


async def _entries(redis: Redis) -> list[dict[str, str]]:
    return [fields for _, fields in await redis.xrange("log")]


def _pairs(entry: dict[str, str]) -> list[tuple[str, int]]:
    return pairs(entry["leased"])


def _queued(entries: list[dict[str, str]]) -> list[dict[str, str]]:
    leased = {request_id for entry in entries if entry["op"] == "lease" for request_id, _ in _pairs(entry)}
    return [entry for entry in entries if entry["op"] == "enqueue" and entry["id"] not in leased]


async def test_the_order_of_what_waited_survives_a_flush(redis: Redis) -> None:
    """Restored in any order, leased in the one they had."""
    places = []
    for i in range(60):
        request = make_request(org_id="abc"[i % 3], weight=1 + i % 2, priority=Priority(i % 3))
        places.append(await queue.enqueue(redis, request, make_cost(7.5 * (i % 5 + 1)), pace=1))
    order = await redis.zrange("lane:m", 0, -1)
    await redis.flushall()
    random.Random(3).shuffle(places)
    for place in places:
        assert await queue.restore(redis, place, generation=1, payloads=[], seen={})
        assert not await queue.restore(redis, place, generation=1, payloads=[], seen={})
    assert await redis.zrange("lane:m", 0, -1) == order
    leases = await queue.lease(redis, lane="m", worker="w", max_sequences=100, limit=100)
    assert [member[17:] for member in order] == [lease.request.id for lease in leases]
    assert {lease.attempt for lease in leases} == {1001}


async def test_an_attempt_of_before_the_flush_writes_nothing(redis: Redis) -> None:
    place = await queue.enqueue(redis, make_request(), make_cost(), pace=1)
    (lease,) = await queue.lease(redis, lane="m", worker="w", max_sequences=8, limit=1)
    await redis.flushall()
    await queue.restore(redis, place, generation=1, payloads=[], seen={})
    stale = queue.Emission(lease.request.id, lease.attempt, 0, ((0, 0, 1, "t{}"),))
    assert await queue.emit(redis, [stale]) == [lease.request.id]
    await queue.lease(redis, lane="m", worker="w", max_sequences=8, limit=1)
    assert await queue.emit(redis, [stale]) == [lease.request.id]


@asynccontextmanager
async def dispatcher_process() -> AsyncIterator[asyncio.subprocess.Process]:
    """A dispatcher that can be killed as processes are."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "manage.py", "run_dispatcher", cwd=ROOT, env={**os.environ, "LEASE_MS": "600"}
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_two_dispatchers_share_and_one_is_killed(redis: Redis, tmp_path: Path) -> None:
    """kill -9 between any two of its steps: its leases lapse, the other goes on, nothing runs twice."""
    async with (
        site(redis, tmp_path / "log", workers=2, dispatchers=0, step_seconds=0.02) as made,
        dispatcher_process() as first,
        dispatcher_process() as second,
    ):
        async with asyncio.timeout(20):
            while await redis.zcard("dispatchers") < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        second.send_signal(signal.SIGSTOP)  # so that the first has taken what runs
        following = [asyncio.create_task(made.run(seed=i, org="ab"[i % 2], max_tokens=12)) for i in range(40)]
        while not made.clients:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        await started(made.clients[0])
        first.kill()
        second.send_signal(signal.SIGCONT)
        await asyncio.wait_for(asyncio.gather(*following), 15)
        second.terminate()
        await second.wait()
        entries = await made.check()
    assert all(client.end.outcome is Outcome.SUCCEEDED for client in made.clients)
    assert any(entry["op"] == "requeue" for entry in entries), "the killed one held leases"


async def test_cancelling_races_with_the_end_and_one_of_them_wins(redis: Redis, tmp_path: Path) -> None:
    async with site(redis, tmp_path / "log", step_seconds=0.001) as made:

        async def race(seed: int) -> None:
            client = await made.submit(seed=seed, max_tokens=4)
            following = asyncio.create_task(made.follow(client))
            await asyncio.sleep(0.002 * (seed % 8))
            await services.cancel(client.request_id)
            await following

        await asyncio.gather(*(race(seed) for seed in range(60)))
        await made.check()
    assert {client.end.outcome for client in made.clients} <= {Outcome.CANCELLED, Outcome.SUCCEEDED}


async def test_a_flooding_organization_and_the_bounds_of_the_history(redis: Redis, tmp_path: Path) -> None:
    async with site(redis, tmp_path / "log", max_running=1, step_seconds=0.001) as made:
        flood = [asyncio.create_task(made.run(org="flood", seed=i, max_tokens=6)) for i in range(60)]
        await asyncio.sleep(0.03)
        light = [asyncio.create_task(made.run(org="light", seed=i, max_tokens=6)) for i in range(20)]
        await asyncio.gather(*flood, *light)
        entries = await made.check()
    difference, dearest = history.largest_service_difference(entries, "flood", "light")
    assert 0 < difference <= 2 * dearest
    assert history.longest_wait_ms(entries, Priority.DEFAULT) < 30_000
    assert max(client.end.wait.get("fairness", 0) for client in made.clients if client.org == "flood") > 0


async def test_a_full_queue_says_when_to_come_back(redis: Redis, tmp_path: Path, settings) -> None:
    settings.ENV = settings.ENV.model_copy(update={"queue_max_requests": 4})
    async with site(redis, tmp_path / "log", max_running=1, step_seconds=0.05) as made:
        following, refused = [], []
        for i in range(12):
            try:
                following.append(asyncio.create_task(made.follow(await made.submit(seed=i, max_tokens=4))))
            except ServiceError as error:
                refused.append(error)
            await asyncio.sleep(0.002)
        assert {error.code for error in refused} == {"queue_full"}
        assert [1 <= error.retry_after_seconds <= 60 for error in refused] == [True] * len(refused)
        await asyncio.gather(*following)
        await made.check()
        rows = [fields for _, fields in await redis.xrange("ledger") if '"refused"' in fields["entry"]]
    assert len(rows) == len(refused) >= 6


async def test_a_waiting_request_tells_its_place(redis: Redis, tmp_path: Path) -> None:
    async with site(redis, tmp_path / "log", max_running=1, step_seconds=0.01) as made:
        first = [asyncio.create_task(made.run(seed=i, max_tokens=60)) for i in range(3)]
        await asyncio.sleep(0.1)
        last = await made.submit(seed=9, max_tokens=2)
        seen = [item async for item in services.progress(last.request_id)]
        last.events = [item[1] for item in seen if not isinstance(item, Progress)]
        places = [item for item in seen if isinstance(item, Progress)]
        assert places
        assert places[0].position == 2
        assert places[0].starts_in_ms > 0
        assert [p.position for p in places] == sorted((p.position for p in places), reverse=True)
        assert any(isinstance(event, TextDelta) for event in last.events)
        told = await services.describe(last.request_id, "1")
        assert told["state"] == "finished"
        assert sum(told["wait"].values()) == pytest.approx(told["timeline"]["first_token_ms"], abs=1)
        await asyncio.gather(*first)
        await made.check()
