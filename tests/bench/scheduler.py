"""`python -m tests.bench.scheduler NAME`: the scheduler's own figures, on real Redis and daemons that compute by arithmetic.

throughput  enqueue, lease, finish per second, with 1,000 to 100,000 requests queued
flood       a light organization's p99 wait beside one that floods, against alone
starvation  one flex request against endless priority load, 200 times
overload    ten times more than can be served
kills       a worker killed in mid-stream
flush       FLUSHALL with 50 running and 500 queued
retry       what `Retry-After` said against when a retry was accepted
"""

# ruff: noqa: ASYNC110  What is waited for happens in objects that have no events.

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.services import _start_services, pytest_unconfigure


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def _with_env(**changes: Any) -> None:
    from django.conf import settings

    settings.ENV = settings.ENV.model_copy(update=changes)


NO_BOUNDS = {"queue_max_requests": 10**7, "queue_max_requests_per_org": 10**7, "queue_max_drain_ms": 10**12}


async def throughput(redis: Any, path: Path, count: int) -> None:
    from apps.core.types import Outcome
    from apps.scheduler import queue
    from tests.apps.scheduler.factories import make_cost, make_request

    _with_env(**NO_BOUNDS)
    cost = make_cost()

    async def fill(number: int) -> None:
        requests = [make_request(org_id=str(i % 50)) for i in range(number)]
        for start in range(0, number, 64):
            await asyncio.gather(*(queue.enqueue(redis, r, cost, pace=1) for r in requests[start : start + 64]))

    async def cycle(number: int) -> float:
        """Requests a second through enqueue, lease and finish, 32 at a time."""
        requests = [make_request(org_id=str(i % 50)) for i in range(number)]
        started = time.perf_counter()
        for start in range(0, number, 32):
            part = requests[start : start + 32]
            await asyncio.gather(*(queue.enqueue(redis, request, cost, pace=1) for request in part))
            leases = await queue.lease(redis, lane="m", worker="w", max_sequences=10**6, limit=len(part))
            ends = (queue.finish(redis, x.request.id, Outcome.SUCCEEDED, attempt=x.attempt) for x in leases)
            await asyncio.gather(*ends)
        return number / (time.perf_counter() - started)

    queued = 0
    for depth in (0, 1_000, 10_000, 100_000):
        await fill(depth - queued)
        queued = depth
        before = await redis.info("cpu")
        rate = await cycle(count)
        after = await redis.info("cpu")
        used = sum(after[k] - before[k] for k in ("used_cpu_user", "used_cpu_sys"))
        print(f"{depth:>7} queued: {rate:6.0f} requests/s through this client; Redis alone {count / used:6.0f} per core-second")


async def flood(redis: Any, path: Path, count: int) -> None:
    """The light organization's wait, from arrival to lease."""
    from tests.apps.scheduler.site import site

    async def light(made: Any) -> list[float]:
        found = []
        for seed in range(count):
            client = await made.run(org="light", seed=seed, max_tokens=5)
            found.append(client.end.timing["queue_ms"])
            await asyncio.sleep(0.1)
        return found

    _with_env(**NO_BOUNDS)
    async with site(redis, path, max_running=1, step_seconds=0.01) as made:
        alone = await light(made)
        heavy = [asyncio.create_task(made.run(org="flood", seed=i, max_tokens=5)) for i in range(100 * count // 10)]
        await asyncio.sleep(3)  # this one process is the flood too: its sending is over before the other is timed
        beside = await light(made)
        ended = [c.end.timing for c in made.clients if c.org == "light"]
        service = statistics.mean(timing["total_ms"] - timing["queue_ms"] for timing in ended)
        for task in heavy:
            task.cancel()
        await asyncio.gather(*heavy, return_exceptions=True)
    print(f"p99 wait alone {quantile(alone, 0.99):.0f} ms, beside a flood {quantile(beside, 0.99):.0f} ms; "
          f"one service time is {service:.0f} ms (n={count})")  # fmt: skip


async def starvation(redis: Any, path: Path, count: int) -> None:
    from apps.core.types import ClassLimits, Outcome, Priority
    from apps.scheduler import queue
    from tests.apps.scheduler.factories import make_cost, make_request

    bound = 150
    _with_env(**NO_BOUNDS, class_flex=ClassLimits(0.0, bound, 60_000, 60_000))
    late = 0
    waits: list[float] = []
    for _ in range(count):
        await redis.flushdb()
        flex = make_request(org_id="flex", priority=Priority.FLEX)
        for _ in range(20):
            await queue.enqueue(redis, make_request(org_id="high", priority=Priority.PRIORITY), make_cost(100), pace=1)
        await queue.enqueue(redis, flex, make_cost(100), pace=1)
        started = time.perf_counter()
        while True:
            high = make_request(org_id=f"high{random.random()}", priority=Priority.PRIORITY)
            await queue.enqueue(redis, high, make_cost(100), pace=1)
            (lease,) = await queue.lease(redis, lane="m", worker="w", max_sequences=1, limit=1)
            if lease.request.id == flex.id:
                break
            await asyncio.sleep(0.01)
            await queue.finish(redis, lease.request.id, Outcome.SUCCEEDED)
        waits.append((time.perf_counter() - started) * 1000)
        late += waits[-1] > bound + 30
    print(
        f"{count - late} of {count} flex requests started within {bound} ms and one service time; "
        f"p99 {quantile(waits, 0.99):.0f} ms"
    )


async def overload(redis: Any, path: Path, count: int) -> None:
    """`count` seconds at ten times the capacity, after as many at nearly the capacity."""
    from apps.core.errors import ServiceError
    from apps.scheduler import queue
    from tests.apps.scheduler.site import MODEL, site

    _with_env(queue_max_requests=100, queue_max_requests_per_org=60)
    async with site(redis, path, max_running=4, step_seconds=0.02) as made:
        capacity = 4 / (5 * 0.022)
        refused: list[float] = []
        longest = 0

        async def one(seed: int) -> None:
            started = time.perf_counter()
            try:
                client = await made.submit(org=str(seed % 7), seed=seed, max_tokens=5)
            except ServiceError:
                refused.append((time.perf_counter() - started) * 1000)
                return
            await made.follow(client)

        async def load(rate: float, seconds: float) -> float:
            nonlocal longest
            tasks, until = [], time.perf_counter() + seconds
            done = len([c for c in made.clients if c.events])
            started = time.perf_counter()
            seed = 0
            while time.perf_counter() < until:
                tasks.append(asyncio.create_task(one(seed := seed + 1)))
                if seed % 20 == 0:
                    lanes, _ = await queue.depths(redis)
                    longest = max(longest, lanes[MODEL].waiting if MODEL in lanes else 0)
                await asyncio.sleep(max(0.0, started + seed / rate - time.perf_counter()))
            finished = (
                len([c for c in made.clients if c.events and c.events[-1].__class__.__name__ == "RequestFinished"]) - done
            )
            rate_done = finished / (time.perf_counter() - started)
            await asyncio.gather(*tasks)
            return rate_done

        calm = await load(0.9 * capacity, count)
        refused.clear()
        busy = await load(10 * capacity, count)
        await made.check()
    print(f"goodput {calm:.1f}/s at 90% of capacity, {busy:.1f}/s at ten times; longest queue {longest} of 100; "
          f"{len(refused)} refused, p99 of the answer {quantile(refused, 0.99):.0f} ms")  # fmt: skip


async def kills(redis: Any, path: Path, count: int) -> None:
    from tests.apps.scheduler.site import site

    gaps: list[float] = []
    async with site(redis, path, workers=2, step_seconds=0.005) as made:
        for seed in range(count):
            client = await made.submit(seed=seed, max_tokens=40)
            following = asyncio.create_task(made.follow(client))
            while len(client.tokens()) < 1 + seed % 30:
                await asyncio.sleep(0.002)
            victim = next(daemon for daemon in made.daemons if daemon._sequences)
            await made.kill(victim)
            had, since = len(client.tokens()), time.perf_counter()
            while len(client.tokens()) == had and not following.done():
                await asyncio.sleep(0.002)
            gaps.append(time.perf_counter() - since)
            await following
            await made.revive(victim)
        await made.check()
    print(f"{count} of {count} token-exact; resumed after p95 {quantile(gaps, 0.95):.2f} s, max {max(gaps):.2f} s")


async def flush(redis: Any, path: Path, count: int) -> None:
    from tests.apps.scheduler.site import site

    async with site(redis, path, step_seconds=0.02, max_running=50) as made:
        running = [await made.submit(seed=i, max_tokens=100) for i in range(50)]
        queued = [await made.submit(seed=i, org=str(i % 5), max_tokens=2) for i in range(count)]
        following = [asyncio.create_task(made.follow(client)) for client in (*running, *queued)]
        while not all(client.tokens() for client in running):
            await asyncio.sleep(0.01)
        await redis.flushall()
        had, since, served = sum(len(c.tokens()) for c in running), time.perf_counter(), 0.0
        while sum(len(c.tokens()) for c in running) <= had + 50:
            await asyncio.sleep(0.01)
        served = time.perf_counter() - since
        await asyncio.gather(*following)
        await made.check()
    succeeded = sum(client.end.outcome == "succeeded" for client in made.clients)
    print(f"{succeeded} of {50 + count} succeeded, none doubled; serving again after {served:.1f} s")


async def retry(redis: Any, path: Path, count: int) -> None:
    """A full queue refuses `count` at once. They come back one by one in the order of what each was told, and the first
    moment at which the next of them is let in is what it should have been told."""
    from apps.core.errors import ServiceError
    from tests.apps.scheduler.site import site

    _with_env(queue_max_requests=100, queue_max_requests_per_org=10**6)
    errors: list[float] = []
    async with site(redis, path, max_running=4, step_seconds=0.02) as made:

        async def told(org: str, seed: int) -> float | None:
            """Seconds until a retry, or None when it was let in."""
            try:
                following.append(asyncio.create_task(made.follow(await made.submit(org=org, seed=seed, max_tokens=20))))
            except ServiceError as error:
                return error.retry_after_seconds
            return None

        following: list[asyncio.Task[Any]] = []
        # So that costs and pace are measured: by one at a time, and by more than can run.
        for seed in range(15):
            await made.run(seed=seed, max_tokens=20)
        for _ in range(3):
            await asyncio.gather(*(made.run(seed=seed, max_tokens=20) for seed in range(60)))
        while await told("full", len(following)) is None:
            pass
        started = time.perf_counter()
        promised = sorted([await told(f"late{i}", i) or 0.0 for i in range(count)])
        for i, promise in enumerate(promised):
            while await told("again", i) is not None:
                await asyncio.sleep(0.02)
            happened = time.perf_counter() - started
            errors.append(abs(promise - happened) / max(1.0, happened))  # nobody can be told less than a second
        await asyncio.gather(*following)
        await made.check()
    print(f"{count} refused, told {promised[0]:.1f} to {promised[-1]:.1f} s; let in after {happened:.1f} s at last; "
          f"median error {statistics.median(errors):.0%}, p90 {quantile(errors, 0.9):.0%}")  # fmt: skip


BENCHES: dict[str, tuple[Callable[[Any, Path, int], Awaitable[None]], int]] = {
    "throughput": (throughput, 3000), "flood": (flood, 50), "starvation": (starvation, 200), "overload": (overload, 20),
    "kills": (kills, 300), "flush": (flush, 500), "retry": (retry, 60),
}  # fmt: skip


async def _main(name: str, count: int | None) -> None:
    from apps.core.redis import connect

    bench, usual = BENCHES[name]
    redis = connect(os.environ["REDIS_URL"])
    await redis.flushdb()
    with tempfile.TemporaryDirectory() as folder:
        await bench(redis, Path(folder) / "log", count or usual)
    await redis.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scheduler", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--count", type=int, help="how many, or how many seconds")
    args = parser.parse_args()
    os.environ["DJANGO_SETTINGS_MODULE"] = "inference_site.settings"
    _start_services()
    try:
        import django

        django.setup()
        asyncio.run(_main(args.name, args.count))
    finally:
        pytest_unconfigure()


if __name__ == "__main__":
    main()
