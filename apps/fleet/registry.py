"""The live picture of the workers, in Redis: written by the controller from each daemon's status, read by everyone else.

Key: `workers`, a hash of worker id -> WorkerSnapshot as JSON. A snapshot older than the timeout, by Redis TIME, is dead.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError
from redis.asyncio import Redis

from apps.core.redis import server_time_ms
from apps.core.types import WorkerSnapshot

if TYPE_CHECKING:
    from apps.fleet.selectors import ModelCard

KEY = "workers"
_SNAPSHOT = TypeAdapter(WorkerSnapshot)
_LOG = logging.getLogger(__name__)


async def publish(redis: Redis, snapshot: WorkerSnapshot) -> None:
    """Makes the worker known as of now."""
    seen = dataclasses.replace(snapshot, seen_ms=await server_time_ms(redis))
    await redis.hset(KEY, snapshot.worker_id, _SNAPSHOT.dump_json(seen).decode())


async def forget(redis: Redis, worker_id: str) -> None:
    """Takes a worker out of routing at once."""
    await redis.hdel(KEY, worker_id)


async def workers(redis: Redis, *, timeout_ms: int) -> list[WorkerSnapshot]:
    """The workers heard of within `timeout_ms`, by id. What is not a snapshot is skipped and logged."""
    async with redis.pipeline(transaction=False) as pipe:
        (seconds, micros), rows = await pipe.time().hgetall(KEY).execute()
    oldest = int(seconds) * 1000 + int(micros) // 1000 - timeout_ms
    alive = [snapshot for row in rows.values() if (snapshot := _parse(row)) and snapshot.seen_ms >= oldest]
    return sorted(alive, key=lambda snapshot: snapshot.worker_id)


def _parse(row: str) -> WorkerSnapshot | None:
    try:
        return _SNAPSHOT.validate_json(row)
    except ValidationError:
        _LOG.error("an entry of %s is not a worker's snapshot; skipped", KEY)
        return None


async def availability(redis: Redis, card: ModelCard, *, timeout_ms: int) -> str:
    """Whether the model can serve: ready, loading, not_loaded, no_weights or no_worker."""
    alive = [worker for worker in await workers(redis, timeout_ms=timeout_ms) if not worker.draining]
    states = {resident.state for worker in alive if (resident := worker.resident(card.name))}
    for state in ("ready", "loading"):
        if state in states:
            return state
    if not card.has_weights:
        return "no_weights"
    return "not_loaded" if alive else "no_worker"
