"""`python -m tests.bench.switches`: a host goes over to tensor parallel and back again and again while requests stream.

Real all the way: sshd, hostctl, a daemon on one process or on two ranks under torchrun, a tiny Qwen3 in fp32, the controller,
two dispatchers. Requests arrive at 70% of what the slower mode was measured to bear. Prints how many failed, how many gave
other tokens than an undisturbed run, the longest pause that each stream saw which lived through a switch, and where a switch's
time goes.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.bench.fleet import on_stores, say

PROMPTS = 20
TOKENS = (16, 450)
CAPACITY_SECONDS = 10
CAPACITY_CLIENTS = 16
PATCH = pytest.MonkeyPatch()


@dataclass
class Stream:
    """What one client was given, and when: `at` are the times of its events."""

    prompt: int
    asked: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    outcome: str = ""
    error: str = ""

    def pause(self) -> float:
        """The longest after the first token."""
        return max((later - earlier for earlier, later in zip(self.at, self.at[1:], strict=False)), default=0.0)

    def first(self) -> float:
        """The wait for the first token."""
        return (self.at[0] if self.at else time.monotonic()) - self.asked


class Bench:
    def __init__(self, redis: Any, host: Any) -> None:
        self._redis, self._host = redis, host
        self._rng = random.Random(1)
        self._numbers = iter(range(10**9))
        self.asked: list[asyncio.Task[Stream]] = []

    async def ask(self, prompt: int, max_tokens: int) -> Stream:
        from apps.core.types import RequestFinished, TextDelta
        from apps.scheduler import services
        from tests.apps.fleet.modes.host import TINY
        from tests.apps.scheduler.factories import make_request
        from tests.apps.scheduler.site import principal

        ids = tuple(random.Random(prompt).choices(range(2, 250), k=24))
        sent = make_request(model=TINY, prompts=(ids,), max_tokens=max_tokens, id=f"b{next(self._numbers)}")
        seen = Stream(prompt)
        await services.submit(sent, principal("1"))
        async for _, event in services.events(sent.id):
            if isinstance(event, TextDelta):
                seen.tokens += event.token_ids
                seen.at.append(time.monotonic())
            elif isinstance(event, RequestFinished):
                seen.outcome, seen.error = str(event.outcome), event.error_message
        return seen

    async def capacity(self) -> float:
        """Requests a second that end while CAPACITY_CLIENTS ask without pause."""
        until, ended = time.monotonic() + CAPACITY_SECONDS, 0

        async def client() -> None:
            nonlocal ended
            while time.monotonic() < until:
                await self.ask(self._rng.randrange(PROMPTS), self._rng.randint(*TOKENS))
                ended += 1

        started = time.monotonic()
        await asyncio.gather(*(client() for _ in range(CAPACITY_CLIENTS)))
        return ended / (time.monotonic() - started)

    async def references(self) -> list[list[int]]:
        """What each prompt gives without any switch, as far as anybody will ask."""
        found = [await self.ask(prompt, TOKENS[1]) for prompt in range(PROMPTS)]
        if failed := [stream for stream in found if stream.outcome != "succeeded"]:
            raise SystemExit(f"the bench cannot begin: {failed[0].error}")
        say(f"{statistics.mean(len(stream.tokens) for stream in found):.0f} tokens a prompt at most")
        return [stream.tokens for stream in found]

    async def traffic(self, rate: float, stop: asyncio.Event) -> None:
        """Arrivals as of a Poisson process."""
        while not stop.is_set():
            work = self.ask(self._rng.randrange(PROMPTS), self._rng.randint(*TOKENS))
            self.asked.append(asyncio.create_task(work))
            await asyncio.sleep(self._rng.expovariate(rate))

    async def switch(self, record: Any, mode: str) -> tuple[float, float, Any]:
        """From when the old workers took nothing more to when the new ones did, and the record."""
        from tests.apps.fleet.modes.site import ended, request, serving, until

        started = time.monotonic()
        switch = await request(record, mode)
        await until(lambda: ended(switch))
        finished = time.monotonic()
        await until(lambda: serving(self._redis, self._host, mode))
        return started, finished, switch


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def report(bench: Bench, streams: list[Stream], references: list[list[int]], spans: list[tuple[float, float]]) -> None:
    failed = [stream for stream in streams if stream.outcome != "succeeded"]
    other = [s for s in streams if s.tokens != references[s.prompt][: len(s.tokens)]]
    firsts = [stream.first() for stream in streams]
    if firsts:
        say(f"first token after p50 {statistics.median(firsts):.2f} s, p99 {percentile(firsts, 0.99):.2f} s, "
            f"longest {max(firsts):.2f} s")  # fmt: skip
    moved = [stream.pause() for stream in streams if any(touched(stream, span) for span in spans)]
    say(f"{len(streams)} requests, {len(failed)} failed, {len(other)} with tokens of their own")
    for stream in failed[:5]:
        say(f"  {stream.outcome}: {stream.error}")
    if moved:
        say(f"{len(moved)} streams met a switch; longest pause of each: p50 {statistics.median(moved):.2f} s, "
            f"p99 {percentile(moved, 0.99):.2f} s, longest {max(moved):.2f} s")  # fmt: skip


def touched(stream: Stream, span: tuple[float, float]) -> bool:
    """Whether the stream had begun when the switch was asked for or during it, and ended after that."""
    return bool(stream.at) and stream.at[0] < span[1] and stream.at[-1] > span[0]


async def where_time_goes(switches: list[Any]) -> None:
    from apps.core.database import in_database

    spent: dict[str, list[float]] = {}
    for switch in switches:
        for step in await in_database(lambda: list(switch.steps.all())):  # noqa: B023
            spent.setdefault(step.step, []).append((step.ended_at - step.started_at).total_seconds())
    for name, seconds in spent.items():
        say(f"  {name:10} median {statistics.median(seconds):6.2f} s, longest {max(seconds):6.2f} s, {len(seconds)} times")


async def measure(redis: Any, folder: Path, count: int, load: float) -> None:
    from asgiref.sync import sync_to_async
    from django.conf import settings

    from apps.scheduler.dispatcher import Dispatcher
    from tests.apps.fleet.modes.host import SshHost, make_model
    from tests.apps.fleet.modes.site import controlling, serving, until

    (folder / "models").mkdir()
    make_model(folder / "models")
    host = SshHost(folder / "rack1", folder / "models", settings.ENV.daemon_token.get_secret_value())
    changes = {"fleet_ssh_key": host.client_key, "models_dir": folder / "models", "queue_max_requests": 10**6,
               "queue_max_requests_per_org": 10**6, "queue_max_drain_ms": 10**12}  # fmt: skip
    PATCH.setattr(settings, "ENV", settings.ENV.model_copy(update=changes))
    record = await sync_to_async(host.add)()
    host.start()
    stop, quiet = asyncio.Event(), asyncio.Event()
    dispatchers = [asyncio.create_task(Dispatcher(redis, name).run(stop)) for name in ("d1", "d2")]
    bench = Bench(redis, host)
    try:
        async with controlling(redis):
            await until(lambda: serving(redis, host, "individual", 1))
            references = await bench.references()
            alone = await bench.capacity()
            await bench.switch(record, "tensor_parallel")
            together = await bench.capacity()
            rate = load * min(alone, together)
            say(f"bears {alone:.1f} requests a second alone, {together:.1f} on two ranks; {rate:.1f} a second arrive")
            traffic = asyncio.create_task(bench.traffic(rate, quiet))
            spans, switches = [], []
            for number in range(count):
                mode = ("individual", "tensor_parallel")[number % 2]
                started, finished, switch = await bench.switch(record, mode)
                spans.append((started, finished))
                switches.append(switch)
                sys.stderr.write(f"\rswitch {number + 1} of {count}: {switch.state} after {finished - started:.1f} s  ")
                await asyncio.sleep(1)
            quiet.set()
            await traffic
            streams = await asyncio.gather(*bench.asked)
            sys.stderr.write("\n")
            say(f"{count} switches, {sum(switch.state == 'succeeded' for switch in switches)} succeeded")
            report(bench, streams, references, spans)
            await where_time_goes(switches)
    finally:
        stop.set()
        await asyncio.gather(*dispatchers)
        host.end()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.switches", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--count", type=int, default=100, help="switches (100)")
    parser.add_argument("--load", type=float, default=0.7, help="of what the slower mode bears (0.7)")
    args = parser.parse_args()

    async def work(redis: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            await measure(redis, Path(folder), args.count, args.load)

    try:
        on_stores(work)
    finally:
        PATCH.undo()


if __name__ == "__main__":
    main()
