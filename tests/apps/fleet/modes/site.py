"""The site's side of the tests of mode switches: a controller, and questions to the record and to the registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis

from apps.core.database import in_database
from apps.fleet import registry
from apps.fleet.controller import Controller
from apps.fleet.models import Host, ModeSwitch
from apps.fleet.modes.services import switch_request
from tests.apps.fleet.modes.host import TINY, SshHost

VALID_SECONDS = 60  # within which a host is back in exactly one mode, whatever happens
PATIENCE_SECONDS = 150  # of a test, for daemons that import torch on a machine that does other things too


@asynccontextmanager
async def controlling(redis: Redis, name: str = "one") -> AsyncIterator[asyncio.Task[None]]:
    stop = asyncio.Event()
    task = asyncio.create_task(Controller(redis, name).run(stop))
    try:
        yield task
    finally:
        stop.set()
        await asyncio.wait([task], timeout=10)


async def until(holds, seconds: float = PATIENCE_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110  It is in Redis or Postgres, which raise no event here.
            await asyncio.sleep(0.05)


async def serving(redis: Redis, host: SshHost, mode: str, epoch: int | None = None) -> bool:
    """Whether exactly this mode's workers are routed to, with the model ready, and no other process lives on the host."""
    names = {host.together} if mode == "tensor_parallel" else {host.name(place) for place in range(host.workers)}
    shown = await registry.workers(redis, timeout_ms=5000)
    ready = {w.worker_id for w in shown if not w.cordoned and (held := w.resident(TINY)) and held.state == "ready"}
    epochs = {w.epoch for w in shown if w.worker_id in ready}
    living = await asyncio.to_thread(host.living)
    return ready == names and living == {(mode, found) for found in epochs} and (epoch is None or epochs == {epoch})


async def ended(switch: ModeSwitch) -> bool:
    await in_database(switch.refresh_from_db)
    return switch.ended_at is not None


async def steps(switch: ModeSwitch) -> list[tuple[str, bool | None]]:
    return await in_database(lambda: list(switch.steps.values_list("step", "succeeded")))


async def request(record: Host, mode: str) -> ModeSwitch:
    return await in_database(lambda: switch_request(host=record, mode=mode, actor="test"))
