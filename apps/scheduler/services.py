"""The scheduler's door: what the edge, the console and the commands may ask of it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from django.conf import settings
from redis.asyncio import Redis
from redis.exceptions import RedisError

from apps.accounts import quota
from apps.core.errors import ServiceError, Unavailable
from apps.core.redis import server_time_ms, shared
from apps.core.types import Event, InferenceRequest, Outcome, Principal, RateLimitState, ResidentModel
from apps.fleet import registry
from apps.fleet.selectors import model_cards
from apps.scheduler import queue
from apps.scheduler.admission import absence_refusal, queue_refusal
from apps.scheduler.cost import price
from apps.scheduler.events import hub

LEDGER_LENGTH = 1_000_000


@contextmanager
def _redis_errors() -> Iterator[None]:
    """Redis down, full or restarting is our trouble: an honest 503 that says to come back."""
    try:
        yield
    except RedisError:
        raise Unavailable(
            "The queue cannot be reached. Try again shortly.", code="dependency_unavailable", retry_after_seconds=2
        ) from None


async def submit(request: InferenceRequest, principal: Principal) -> RateLimitState:
    """Reserves quota and enqueues. Raises QuotaExceeded or Unavailable, each already written to the ledger."""
    redis = shared()
    with _redis_errors():
        try:
            return await _submit(redis, request, principal)
        except ServiceError as error:
            await _record_refusal(redis, request.id, request.org_id, request.key_id, request.model, error)
            raise


async def _submit(redis: Redis, request: InferenceRequest, principal: Principal) -> RateLimitState:
    residents = await _ready_residents(redis, request.model)
    state = await quota.reserve(
        redis,
        request_id=request.id,
        principal=principal,
        tokens=request.max_total_tokens,
        ttl_ms=settings.ENV.classes[request.priority].total_timeout_ms + settings.ENV.lease_ms,
    )
    try:
        verdict, drain_ms = await queue.enqueue(redis, request, price(request, residents), workers=len(residents))
        if verdict != "admitted":
            raise queue_refusal(verdict, request.model, drain_ms, random.random())
    except (ServiceError, RedisError):
        await quota.release(redis, request_id=request.id, org_id=request.org_id)
        raise
    return state


async def _ready_residents(redis: Redis, model: str) -> list[ResidentModel]:
    """The model as each live worker holds it. Raises Unavailable when none can run it."""
    workers = await registry.workers(redis, timeout_ms=settings.ENV.worker_timeout_ms)
    held = [resident for worker in workers if not worker.draining and (resident := worker.resident(model))]
    ready = [resident for resident in held if resident.state == "ready"]
    if not ready:
        cards = await model_cards()
        state = (
            await registry.availability(redis, cards[model], timeout_ms=settings.ENV.worker_timeout_ms)
            if model in cards
            else "not_loaded"
        )
        raise absence_refusal("not_loaded" if state == "ready" else state, model)
    return ready


async def refuse(*, request_id: str, org_id: str, key_id: str, model: str, error: ServiceError) -> None:
    """Writes the ledger row of a request that was refused before it could be submitted. Never raises for Redis."""
    try:
        await _record_refusal(shared(), request_id, org_id, key_id, model, error)
    except RedisError:
        return  # The client's answer matters more than our count of it.


async def _record_refusal(redis: Redis, request_id: str, org_id: str, key_id: str, model: str, error: ServiceError) -> None:
    now = await server_time_ms(redis)
    entry = {
        "request_id": request_id, "org_id": org_id, "key_id": key_id, "model": model,
        "outcome": Outcome.REFUSED.value, "code": error.code, "priority": 1, "stream": False,
        "prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0, "arrived_ms": now, "finished_ms": now,
        "queue_ms": 0, "ttft_ms": 0, "total_ms": 0, "attempts": 0, "worker_id": "",
    }  # fmt: skip
    await redis.xadd("ledger", {"entry": json.dumps(entry)}, maxlen=LEDGER_LENGTH, approximate=True)


async def events(request_id: str, *, after: int = 0) -> AsyncIterator[tuple[int, Event]]:
    """(id, event) past `after`, live, ending after RequestFinished. Raises NotFound when they are no longer kept."""
    with _redis_errors():
        async for numbered in hub(shared()).follow(request_id, after):
            yield numbered


async def cancel(request_id: str) -> None:
    """Ends the request wherever it is; the engine drops it before its next step. Charges what was generated."""
    with _redis_errors():
        await queue.finish(shared(), request_id, Outcome.CANCELLED, code="cancelled", message="The request was cancelled.")


async def owner(request_id: str) -> str | None:
    """The organization a request belongs to, or None when it is unknown or no longer kept."""
    with _redis_errors():
        org: str | None = await shared().hget(f"request:{request_id}", "org")
        return org


async def load() -> dict[str, Any]:
    """The queue now: each lane's waiting, running and predicted work in ms, and how many dispatchers are alive."""
    redis = shared()
    with _redis_errors():
        lanes, _ = await queue.depths(redis)
        cutoff = (await server_time_ms(redis)) - 2 * settings.ENV.lease_ms
        dispatchers = await redis.zcount("dispatchers", cutoff, "+inf")
    return {
        "lanes": {
            name: {"waiting": lane.waiting, "running": lane.running, "work_ms": lane.work_ms} for name, lane in lanes.items()
        },
        "dispatchers": int(dispatchers),
        "at": time.time(),
    }
