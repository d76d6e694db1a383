"""A site whose models come and go: real stores, the controller, dispatchers, and daemons that load and unload by arithmetic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from django.conf import settings
from redis.asyncio import Redis

from apps.core.database import in_database
from apps.core.redis import shared
from apps.fleet import controller as controller_module
from apps.fleet import registry, watch
from apps.fleet.controller import Controller
from apps.fleet.models import Modality, Model, Placement, Worker
from apps.fleet.services import host_add, worker_add
from apps.fleet.tokenizers import ModelTokenizer, tokenizer_for
from apps.scheduler import link, services
from apps.scheduler.dispatcher import Dispatcher
from tests.apps.fleet.fake_daemon import FakeDaemon
from tests.apps.scheduler.factories import make_request
from tests.apps.scheduler.site import principal
from tests.history import Client

GIB = 1 << 30


def borrowed_tokenizer(_: str) -> ModelTokenizer:
    """Whatever the model is called: daemons by arithmetic speak anybody's ids."""
    return tokenizer_for("smollm2-135m")


def set_env(monkeypatch, **values: object) -> None:
    """Settings for one test: the site's are frozen."""
    monkeypatch.setattr(settings, "ENV", settings.ENV.model_copy(update=values))


def quicken(monkeypatch) -> None:
    monkeypatch.setattr(controller_module, "RESCAN_SECONDS", 0.1)
    monkeypatch.setattr(controller_module, "PLAN_SECONDS", 0.02)
    monkeypatch.setattr(watch, "STATUS_INTERVAL_MS", 50)
    monkeypatch.setattr(link, "tokenizer_for", borrowed_tokenizer)


@dataclass
class FleetSite:
    redis: Redis
    daemons: list[FakeDaemon]
    clients: list[Client] = field(default_factory=list)

    async def submit(self, model: str, *, seed: int = 1, max_tokens: int = 4, **fields: object) -> Client:
        request = make_request(model=model, seed=seed, max_tokens=max_tokens, **fields)
        client = Client(request.id, request.org_id, {})
        await services.submit(request, principal(request.org_id))
        self.clients.append(client)
        return client

    async def follow(self, client: Client) -> Client:
        async for _, event in services.events(client.request_id):
            client.events.append(event)
        return client

    async def run(self, model: str, **fields: object) -> Client:
        return await self.follow(await self.submit(model, **fields))

    @property
    def loads(self) -> list[str]:
        return [model for daemon in self.daemons for model in daemon.loads]


def record(daemons: Iterable[FakeDaemon], models: Iterable[str], placed: Iterable[str]) -> None:
    host = host_add(name="h", address="127.0.0.1")
    for model in models:
        Model.objects.create(name=model, title=model, modality=Modality.TEXT, parameters=1, weight_bytes=1,
                             published_at="2026-01-01")  # fmt: skip
    for daemon in daemons:
        worker_add(name=daemon.worker_id, host=host, port=daemon.port, models=list(placed))


@asynccontextmanager
async def fleet_site(
    redis: Redis, daemons: list[FakeDaemon], *, models: Iterable[str], placed: Iterable[str] = (), dispatchers: int = 1
) -> AsyncIterator[FleetSite]:
    """Ready once the controller knows what every worker could load."""
    token = settings.ENV.daemon_token.get_secret_value()
    for daemon in daemons:
        daemon.token = token
        await daemon.start()
    await in_database(lambda: record(daemons, models, placed))
    stop = asyncio.Event()
    work = [Controller(redis, "c").run(stop), *(Dispatcher(redis, f"d{i}").run(stop) for i in range(dispatchers))]
    tasks = [asyncio.create_task(run) for run in work]
    try:
        await until(lambda: knows(redis, len(daemons)))
        yield FleetSite(redis, daemons)
    finally:
        stop.set()
        await asyncio.gather(*tasks)
        for daemon in daemons:
            await daemon.stop()
        await shared().aclose()
        await in_database(lambda: [rows.objects.all().delete() for rows in (Placement, Worker, Model)])


async def knows(redis: Redis, count: int) -> bool:
    found = await registry.workers(redis, timeout_ms=5000)
    return len(found) == count and all(worker.loadable or worker.refused for worker in found)


async def until(holds: Callable[[], Awaitable[object]], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110  It is in Redis or Postgres, which raise no event here.
            await asyncio.sleep(0.01)


def disk(*models: str, size: int = GIB) -> dict[str, int]:
    return dict.fromkeys(models, size)
