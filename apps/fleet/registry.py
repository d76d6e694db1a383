"""The live picture of the workers, in Redis: written by the controller from each daemon's status, read by everyone else.

Keys: `workers`, a hash of worker id -> WorkerSnapshot as JSON; a snapshot older than the timeout, by Redis TIME, is dead.
`wanted`, a hash of model -> "how many requests wait, when that was so": written by the scheduler, read by the controller.
`workers:quarantine`, a hash of entries that were none, and `quarantined`, the count of all that was put aside anywhere.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from django.conf import settings
from pydantic import TypeAdapter, ValidationError
from redis.asyncio import Redis

from apps.core.redis import LuaScript, server_time_ms
from apps.core.types import WorkerSnapshot

if TYPE_CHECKING:
    from apps.fleet.selectors import ModelCard

KEY = "workers"
WANTED = "wanted"
DEMAND_MS = 3_000
_QUARANTINE = LuaScript(Path(__file__).parent / "lua/quarantine.lua")
_PUBLISH = LuaScript(Path(__file__).parent / "lua/publish.lua")
_SNAPSHOT = TypeAdapter(WorkerSnapshot)
_LOG = logging.getLogger(__name__)


async def publish(redis: Redis, snapshot: WorkerSnapshot) -> bool:
    """Makes the worker known as of now. False when a daemon of a later epoch spoke under its name a moment ago."""
    seen = dataclasses.replace(snapshot, seen_ms=await server_time_ms(redis))
    row = _SNAPSHOT.dump_json(seen).decode()
    args: list[str | int] = [seen.worker_id, row, seen.seen_ms, seen.epoch, settings.ENV.worker_timeout_ms]
    return bool(await _PUBLISH(redis, keys=[KEY], args=args))


async def forget(redis: Redis, worker_id: str) -> None:
    """Takes a worker out of routing at once."""
    await redis.hdel(KEY, worker_id)


async def workers(redis: Redis, *, timeout_ms: int) -> list[WorkerSnapshot]:
    """The workers heard of within `timeout_ms`, by id. What is not a snapshot is put into quarantine."""
    async with redis.pipeline(transaction=False) as pipe:
        (seconds, micros), rows = await pipe.time().hgetall(KEY).execute()
    now = int(seconds) * 1000 + int(micros) // 1000
    alive = []
    for worker_id, row in rows.items():
        snapshot = _parse(worker_id, row)
        if snapshot is None:
            await _quarantine(redis, worker_id, row)
        elif abs(now - snapshot.seen_ms) <= timeout_ms:
            alive.append(snapshot)
    return sorted(alive, key=lambda snapshot: snapshot.worker_id)


async def report_demand(redis: Redis, waiting: Mapping[str, int]) -> None:
    """Says how many requests wait for each model. What is not said again within DEMAND_MS is over."""
    now = await server_time_ms(redis)
    if waiting:
        await redis.hset(WANTED, mapping={model: f"{count} {now}" for model, count in waiting.items()})


async def demand(redis: Redis) -> dict[str, int]:
    """How many requests wait for each model."""
    async with redis.pipeline(transaction=False) as pipe:
        (seconds, micros), rows = await pipe.time().hgetall(WANTED).execute()
    now = int(seconds) * 1000 + int(micros) // 1000
    found = {}
    for model, row in rows.items():
        count, _, at = row.partition(" ")
        if count.isdigit() and at.isdigit() and int(count) and abs(now - int(at)) <= DEMAND_MS:
            found[model] = int(count)
        else:
            await redis.hdel(WANTED, model)
    return found


def _parse(worker_id: str, row: str) -> WorkerSnapshot | None:
    try:
        snapshot = _SNAPSHOT.validate_json(row)
    except ValidationError:
        return None
    return snapshot if snapshot.worker_id == worker_id else None


async def _quarantine(redis: Redis, worker_id: str, row: str) -> None:
    if await _QUARANTINE(redis, keys=[KEY, f"{KEY}:quarantine", "quarantined"], args=[worker_id, row]):
        _LOG.error("an entry of %s was not a worker's snapshot; it is in %s:quarantine", KEY, KEY)


async def availability(redis: Redis, card: ModelCard, *, timeout_ms: int) -> str:
    """Whether the model can serve: ready, loading, on_demand, load_failed, not_loaded, no_weights or no_worker."""
    state, _ = state_of(card.name, await workers(redis, timeout_ms=timeout_ms))
    return "no_weights" if state == "not_loaded" and not card.has_weights else state


def is_ready(worker: WorkerSnapshot, model: str) -> bool:
    """Whether it can run the model now."""
    held = worker.resident(model)
    return held is not None and held.state == "ready" and not (worker.draining or worker.cordoned)


def state_of(model: str, alive: Iterable[WorkerSnapshot]) -> tuple[str, str]:
    """ready, loading, on_demand, load_failed (and why), not_loaded or no_worker; what a cordoned worker holds is on its way.
    Pure."""
    usable = [worker for worker in alive if not worker.draining]
    held = [(worker, resident) for worker in usable for resident in worker.models if resident.model == model]
    states = {"loading" if worker.cordoned else resident.state for worker, resident in held}
    for state in ("ready", "loading"):
        if state in states:
            return state, ""
    if any(model in worker.loadable for worker in usable):
        return "on_demand", ""
    if reasons := [worker.refused[model] for worker in usable if model in worker.refused]:
        return "load_failed", reasons[0]
    return ("not_loaded" if usable else "no_worker"), ""
