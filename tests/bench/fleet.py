"""`python -m tests.bench.fleet NAME`: the fleet's own figures, on real stores, the real controller and real dispatchers.

join        fifty requests at once for a model that is not loaded: how many loads
thrash      1,000 requests for three models of which two fit: loads against the fewest possible, failures, memory
wake        a real SmolLM2-135M on this CPU: loading it cold against waking it from host memory
affinity    conversations over three workers: the share of prompt tokens a worker had already, by gateways and dispatchers
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import pytest

from tests.services import ROOT, _start_services, free_port, pytest_unconfigure

NO_BOUNDS = {"queue_max_requests": 10**7, "queue_max_requests_per_org": 10**7, "queue_max_drain_ms": 10**12}
PATCH = pytest.MonkeyPatch()


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


async def join(redis: Any, count: int) -> None:
    from tests.apps.fleet.fake_daemon import FakeDaemon
    from tests.apps.scheduler.fleet_site import disk, fleet_site

    daemon = FakeDaemon(models=[], folders=disk("m"), load_seconds=1.0, max_running=64)
    async with fleet_site(redis, [daemon], models=["m"]) as made:
        clients = await asyncio.gather(*(made.run("m", seed=i) for i in range(count)))
        failed = sum(client.end.outcome != "succeeded" for client in clients)
        say(f"{count} requests at once: {len(made.loads)} load(s), {failed} failed")


async def thrash(redis: Any, count: int) -> None:
    from tests.apps.fleet.fake_daemon import FakeDaemon
    from tests.apps.scheduler.fleet_site import GIB, disk, fleet_site, set_env

    set_env(PATCH, **NO_BOUNDS)
    for seconds in (0.0, 60.0):
        await redis.flushdb()
        daemon = FakeDaemon(models=[], folders=disk("a", "b", "c"), budget_bytes=2 * GIB, load_seconds=0.5,
                            max_running=16, step_seconds=0.01)  # fmt: skip
        async with fleet_site(redis, [daemon], models=["a", "b", "c"]) as made:
            rng, gate = random.Random(1), asyncio.Semaphore(500)  # clients that one process can hold

            async def one(number: int) -> Any:
                await asyncio.sleep(seconds * number / count)  # noqa: B023
                async with gate:  # noqa: B023
                    return await made.run(rng.choice("abc"), seed=number, max_tokens=8)  # noqa: B023

            clients = await asyncio.gather(*(one(number) for number in range(count)))
            waits = sorted(client.end.timing["queue_ms"] for client in clients)
            failed = sum(client.end.outcome != "succeeded" for client in clients)
            say(f"{count} requests over {seconds:.0f} s: {len(made.loads)} loads ({''.join(made.loads)}), {failed} failed, "
                f"at most {daemon.peak_bytes / GIB:.0f} of {daemon.budget_bytes / GIB:.0f} GiB, "
                f"wait p50 {waits[len(waits) // 2]:.0f} ms, longest {waits[-1]:.0f} ms")  # fmt: skip


async def wake(redis: Any, count: int) -> None:
    from apps.fleet.daemon_client import DaemonClient, DaemonError
    from apps.fleet.weights import pull
    from inference_site.env import ENV

    pull("smollm2-135m", ENV.models_dir, lambda *_: None)
    figures: dict[str, list[float]] = {}
    for name, cap in (("cold", "-1"), ("wake", "0")):
        port = free_port()
        command = [sys.executable, "-m", "gpu_daemon", "--worker-id", "w", "--port", str(port), "--models-dir",
                   str(ENV.models_dir), "--device", "cpu", "--host-weights-bytes", cap]  # fmt: skip
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)  # noqa: ASYNC220
        client = DaemonClient(f"127.0.0.1:{port}", os.environ["DAEMON_TOKEN"])
        while True:
            try:
                await load(client)  # the first brings torch in too, and counts for nothing
                break
            except DaemonError:
                await asyncio.sleep(0.2)
        for _ in range(count):
            await client.unload_model("smollm2-135m", 1, 1000)
            started = time.perf_counter()
            await load(client)
            figures.setdefault(name, []).append(time.perf_counter() - started)
        await client.close()
        process.kill()
        process.wait()
    cold, woken = statistics.median(figures["cold"]), statistics.median(figures["wake"])
    say(f"cold {cold:.2f} s, woken {woken * 1000:.0f} ms (medians of {count}): {cold / woken:.0f} times sooner")


async def load(client: Any) -> None:
    async for _ in client.load_model("smollm2-135m", 1):
        pass


# --- Affinity ---


class Gateway(threading.Thread):
    """An event loop of its own, with connections of its own."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.loop = asyncio.new_event_loop()
        self.start()

    def run(self) -> None:
        self.loop.run_forever()

    async def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return await asyncio.wrap_future(future)


def caching_daemon(name: str) -> Any:
    """One that knows which blocks it has computed, as the real bookkeeping would."""
    from tests.apps.fleet.fake_daemon import FakeDaemon
    from tests.apps.scheduler.fleet_site import disk

    class Caching(FakeDaemon):
        def _submit(self, submit: Any, outputs: Any) -> None:
            ids = list(submit.choices[0].prompt_ids)
            blocks = [(submit.cache_salt, tuple(ids[: end + 16])) for end in range(0, len(ids) - 16, 16)]
            found = next((i for i, block in enumerate(blocks) if block not in self.known), len(blocks))
            self.prompt_tokens += len(ids)
            self.cached_tokens += found * 16
            self.known.update(blocks)
            super()._submit(submit, outputs)

    daemon = Caching(name, models=["m"], folders=disk("m"), step_seconds=0.005, max_running=16)
    daemon.known, daemon.prompt_tokens, daemon.cached_tokens = set(), 0, 0
    return daemon


async def affinity(redis: Any, count: int) -> None:
    from tests.apps.scheduler.fleet_site import fleet_site, set_env

    for gateways, dispatchers, memory_ms in ((1, 1, 300_000), (3, 2, 300_000), (3, 2, 1)):
        set_env(PATCH, **NO_BOUNDS, affinity_ms=memory_ms)
        await redis.flushdb()
        daemons = [caching_daemon(f"w{i}") for i in range(3)]
        fronts = [Gateway() for _ in range(gateways)]
        async with fleet_site(redis, daemons, models=["m"], placed=["m"], dispatchers=dispatchers) as made:
            rng = random.Random(1)
            gate = asyncio.Semaphore(16)
            seeds = [rng.random() for _ in range(count)]
            await asyncio.gather(*(converse(made, fronts, gate, seed) for seed in seeds))
        for front in fronts:
            front.loop.call_soon_threadsafe(front.loop.stop)
        prompt, cached = sum(d.prompt_tokens for d in daemons), sum(d.cached_tokens for d in daemons)
        shares = " ".join(f"{daemon.prompt_tokens / prompt:.0%}" for daemon in daemons)
        memory = "" if memory_ms > 1 else ", workers chosen by load alone"
        say(f"{gateways} gateway(s), {dispatchers} dispatcher(s){memory}: {cached / prompt:.1%} of {prompt} prompt tokens "
            f"were there; shares of the workers {shares}")  # fmt: skip


async def converse(made: Any, fronts: list[Gateway], gate: asyncio.Semaphore, seed: float) -> None:
    """Six turns through whichever gateway, after one of three system prompts."""
    rng = random.Random(seed)
    org = rng.randrange(3)
    prompt = [random.Random(org).randrange(2, 40_000) for _ in range(200)]
    for _ in range(6):
        async with gate:
            prompt += [rng.randrange(2, 40_000) for _ in range(rng.randint(20, 80))]
            turn = made.run("m", org_id=str(org), prompts=(tuple(prompt),), max_tokens=16, seed=rng.randrange(1000))
            prompt += (await rng.choice(fronts).do(turn)).tokens()
        await asyncio.sleep(rng.random() * 0.1)


BENCHES = {"join": (join, 50), "thrash": (thrash, 1000), "wake": (wake, 5), "affinity": (affinity, 120)}


def on_stores(work: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Runs it on fresh stores of its own, with a client of an empty Redis."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "inference_site.settings"
    _start_services()
    try:
        import django
        from django.core.management import call_command

        django.setup()
        call_command("migrate", verbosity=0)
        asyncio.run(_with_redis(work))
    finally:
        pytest_unconfigure()


async def _with_redis(work: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    from apps.core.redis import connect

    redis = connect(os.environ["REDIS_URL"])
    await redis.flushdb()
    await work(redis)
    await redis.aclose()


async def _run(redis: Any, name: str, count: int | None) -> None:
    from tests.apps.scheduler.fleet_site import quicken

    quicken(PATCH)
    bench, usual = BENCHES[name]
    await bench(redis, count or usual)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fleet", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--count", type=int, help="requests, loads or conversations")
    args = parser.parse_args()
    try:
        on_stores(lambda redis: _run(redis, args.name, args.count))
    finally:
        PATCH.undo()


if __name__ == "__main__":
    main()
