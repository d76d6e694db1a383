"""What a switch asks the daemons themselves, over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from django.conf import settings

from apps.core.errors import ServiceError
from apps.core.types import WorkerSnapshot
from apps.fleet.daemon_client import DaemonClient
from apps.fleet.selectors import Assignment

POLL_SECONDS = 0.05


@asynccontextmanager
async def _connected(worker: Assignment) -> AsyncIterator[DaemonClient]:
    client = DaemonClient(worker.address, settings.ENV.daemon_token.get_secret_value())
    try:
        yield client
    finally:
        await client.close()


def work_of(snapshot: WorkerSnapshot) -> int:
    """Sequences that run or wait there."""
    return sum(model.running + model.waiting for model in snapshot.models)


async def status(worker: Assignment) -> WorkerSnapshot:
    """Raises ServiceError."""
    async with _connected(worker) as client, aclosing(client.watch_status(1000)) as statuses:
        return await anext(statuses)


async def heard_as(worker: Assignment, mode: str, epoch: int) -> None:
    """Waits for a worker that does not answer yet, or does not know its device: it still imports what loading needs.

    Raises ServiceError for one that answers as another.
    """
    heard = None
    while heard is None or heard.device == "?":
        try:
            heard = await status(worker)
        except ServiceError:
            heard = None
        await asyncio.sleep(POLL_SECONDS)
    if (heard.worker_id, heard.mode, heard.epoch) != (worker.name, mode, epoch):
        raise ServiceError(f"{worker.name} calls itself {heard.worker_id}, {heard.mode}, epoch {heard.epoch}")


async def empty(worker: Assignment) -> None:
    """Returns when nothing runs on the worker. Raises ServiceError."""
    async with _connected(worker) as client, aclosing(client.watch_status(int(POLL_SECONDS * 1000))) as statuses:
        async for heard in statuses:
            if not work_of(heard):
                return


async def load(worker: Assignment, epoch: int) -> int:
    """Loads what is placed on the worker, one after the other. Returns how many models that is. Raises ServiceError."""
    async with _connected(worker) as client:
        for placed in worker.placements:
            async for _ in client.load_model(placed.folder, epoch, placed.engine):
                continue
    return len(worker.placements)
