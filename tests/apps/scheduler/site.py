"""A site without HTTP: real Redis, dispatchers, and daemons that compute by arithmetic over the real wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from django.conf import settings
from redis.asyncio import Redis
from redis.exceptions import RedisError

from apps.core.blobs import keyed
from apps.core.redis import shared
from apps.core.types import InferenceRequest, Principal, QuotaLimits, ResidentModel, WorkerSnapshot
from apps.fleet import registry
from apps.scheduler import log, services
from apps.scheduler.dispatcher import Dispatcher
from tests.apps.fleet.fake_daemon import FakeDaemon, tokens
from tests.apps.scheduler.factories import make_request
from tests.history import Client, check

MODEL = "smollm2-135m"
MODELS = (MODEL,)


def principal(org: str = "1", **limits: int) -> Principal:
    return Principal(org, "1", frozenset({"inference"}), QuotaLimits(**limits))


@dataclass
class Site:
    redis: Redis
    daemons: list[FakeDaemon]
    path: Path
    dispatchers: dict[asyncio.Task[None], asyncio.Event] = field(default_factory=dict)
    clients: list[Client] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    restarts: int = 0
    _tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    # --- Processes ---

    def start_dispatcher(self) -> asyncio.Task[None]:
        stop = asyncio.Event()
        task = asyncio.create_task(Dispatcher(self.redis, f"d{len(self.dispatchers)}").run(stop))
        self.dispatchers[task] = stop
        return task

    async def kill(self, daemon: FakeDaemon) -> None:
        """kill -9, and what the controller then does."""
        self.dead.add(daemon.worker_id)
        await daemon.stop()
        await registry.forget(self.redis, daemon.worker_id)

    async def revive(self, daemon: FakeDaemon) -> None:
        """The same worker again, as a new process: its steps and its epoch are new."""
        daemon.epoch += 1
        daemon.die_at_step = 0
        await daemon.start()
        self.dead.discard(daemon.worker_id)
        await self.publish_once()

    async def publish(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            with suppress(RedisError):
                await self.publish_once()
            await asyncio.sleep(0.1)

    async def publish_once(self) -> None:
        for daemon in self.daemons:
            if daemon.worker_id not in self.dead:
                await registry.publish(self.redis, snapshot(daemon))

    # --- Clients ---

    async def submit(
        self, *, org: str = "1", max_tokens: int = 8, seed: int = 1, attachments: Iterable[bytes] = (), **fields: Any
    ) -> Client:
        kept = keyed(attachments)
        request = make_request(model=MODEL, org_id=org, max_tokens=max_tokens, seed=seed, blobs=tuple(kept), **fields)
        client = Client(request.id, org, expected(request))
        await services.submit(request, principal(org), kept)
        self.clients.append(client)
        return client

    async def follow(self, client: Client) -> Client:
        async for _, event in services.events(client.request_id):
            client.events.append(event)
        return client

    async def run(self, **fields: Any) -> Client:
        return await self.follow(await self.submit(**fields))

    # --- The verdict ---

    async def _latest(self) -> str:
        """The number of the log's last entry."""
        ((_, fields),) = await self.redis.xrevrange("log", count=1)
        return str(fields["n"])

    async def check(self) -> list[dict[str, str]]:
        """Every invariant, once all is quiet. Returns the log."""
        async with asyncio.timeout(20):
            while (entries := list(log.read(self.path)))[-1]["n"] != await self._latest():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        rows = [json.loads(fields["entry"]) for _, fields in await self.redis.xrange("ledger")]
        check(entries, rows, self.clients)
        return entries


def expected(request: InferenceRequest) -> dict[int, list[int]]:
    count, seed = request.sampling.max_tokens, request.sampling.seed
    if request.work is not None:
        return {i: list(range(count)) for i in range(request.num_choices)}
    return {i: tokens(len(request.prompts[i // request.n]), seed, count, i) for i in range(request.num_choices)}


def snapshot(daemon: FakeDaemon) -> WorkerSnapshot:
    status = daemon.status()
    models = tuple(
        ResidentModel(m.model, "ready", running=m.running, max_running=m.max_running,
                      prefill_ms_per_token=m.prefill_ms_per_token, decode_ms_per_token=m.decode_ms_per_token)
        for m in status.models
    )  # fmt: skip
    return WorkerSnapshot(daemon.worker_id, daemon.address, daemon.epoch, daemon.step, "cpu", "individual", daemon.draining,
                          1, 1, models)  # fmt: skip


@asynccontextmanager
async def site(
    redis: Redis, path: Path, *, workers: int = 1, dispatchers: int = 1, step_seconds: float = 0.002, max_running: int = 8
) -> AsyncIterator[Site]:
    token = settings.ENV.daemon_token.get_secret_value()
    daemons = [
        FakeDaemon(f"w{i}", models=MODELS, token=token, step_seconds=step_seconds, max_running=max_running)
        for i in range(workers)
    ]
    path.touch()  # noqa: ASYNC240
    made = Site(redis, daemons, path)
    stop = asyncio.Event()
    exporter = asyncio.create_task(log.export(redis, path, stop))
    publisher = asyncio.create_task(made.publish(stop))
    for daemon in daemons:
        await daemon.start()
    await made.publish_once()
    for _ in range(dispatchers):
        made.start_dispatcher()
    try:
        yield made
    finally:
        for end in (*made.dispatchers.values(), stop):
            end.set()
        await asyncio.gather(*made.dispatchers, exporter, publisher, return_exceptions=True)
        for daemon in daemons:
            if daemon.worker_id not in made.dead:
                await daemon.stop()
        await shared().aclose()
