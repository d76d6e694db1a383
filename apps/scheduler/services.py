"""The scheduler's door: what the edge, the console and the commands may ask of it."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from django.conf import settings
from redis.asyncio import Redis
from redis.exceptions import RedisError

from apps.accounts import quota
from apps.core import blobs
from apps.core.cache import TtlCache
from apps.core.errors import NotFound, QuotaExceeded, ServiceError, Unavailable
from apps.core.redis import server_time_ms, shared
from apps.core.tasks import end
from apps.core.types import Event, InferenceRequest, Outcome, Principal, RateLimitState, RequestFinished, WorkerSnapshot
from apps.fleet import registry
from apps.fleet.modes import demand
from apps.fleet.selectors import ModelCard, model_cards
from apps.scheduler import costs, forecast, queue, refusals
from apps.scheduler.admission import absence_refusal, queue_refusal, retry_after_seconds
from apps.scheduler.cost import price
from apps.scheduler.events import hub
from apps.scheduler.forecast import Estimate, Progress
from apps.scheduler.inflight import Held, Inflight
from apps.scheduler.queue import Refusal

QUEUE_EVENT_SECONDS = 0.5
_inflight = Inflight()


@contextmanager
def _redis_errors() -> Iterator[None]:
    """Redis down, full or restarting is our trouble: an honest 503 that says to come back."""
    try:
        yield
    except RedisError:
        raise Unavailable(
            "The queue cannot be reached. Try again shortly.", code="dependency_unavailable", retry_after_seconds=2
        ) from None


# --- Admission ---------------------------------------------------------------------------------------------------------


async def submit(
    request: InferenceRequest, principal: Principal, attachments: Mapping[str, bytes] | None = None
) -> RateLimitState:
    """Reserves quota and enqueues; `attachments` are the request's blobs by key. Raises QuotaExceeded or Unavailable, each
    already written to the ledger."""
    redis = shared()
    try:
        with _redis_errors():
            return await _submit(redis, request, principal, attachments or {})
    except ServiceError as error:
        await refusals.record(
            redis, error, request_id=request.id, org_id=request.org_id, key_id=request.key_id, model=request.model,
            priority=request.priority, stream=request.stream,
        )  # fmt: skip
        raise


async def _submit(
    redis: Redis, request: InferenceRequest, principal: Principal, attachments: Mapping[str, bytes]
) -> RateLimitState:
    workers = await _able_workers(redis, request.model)
    ttl_ms = settings.ENV.classes[request.priority].total_timeout_ms + settings.ENV.lease_ms
    pace = await queue.pace(redis, request.model, len(workers))
    state = await _reserve(redis, request, principal, ttl_ms, pace)
    try:
        await blobs.put(redis, attachments, ttl_ms)
        cost = price(request, await costs.to_price_by(redis, request.model, workers))
        held = not any(registry.is_ready(worker, request.model) for worker in workers)
        placed = await queue.enqueue(redis, request, cost, pace=pace, held=held)
        if isinstance(placed, Refusal):
            raise queue_refusal(placed.verdict, request.model, placed.retry_ms, random.random())
    except (ServiceError, RedisError):
        await quota.release(redis, request_id=request.id, org_id=request.org_id)
        raise
    _inflight.hold(Held(request, principal, placed, attachments, ttl_ms, time.monotonic() + ttl_ms / 1000))
    return state


async def _reserve(redis: Redis, request: InferenceRequest, principal: Principal, ttl_ms: int, pace: float) -> RateLimitState:
    """Too many at once is over when one of them ends, which the lane's load tells; the windows of the others are exact."""
    tokens = request.max_total_tokens
    try:
        return await quota.reserve(redis, request_id=request.id, principal=principal, tokens=tokens, ttl_ms=ttl_ms)
    except QuotaExceeded as error:
        if error.code == "concurrency_exceeded":
            lanes, _ = await queue.depths(redis)
            if (lane := lanes.get(request.model)) and lane.waiting + lane.running:
                each_ms = lane.work_ms / pace / (lane.waiting + lane.running)
                error.retry_after_seconds = retry_after_seconds(each_ms, random.random())
        raise


async def context_length(card: ModelCard) -> int:
    """Tokens that each worker which holds the model takes, and no more than the model does. Raises Unavailable."""
    with _redis_errors():
        return min(card.context_length, await _shortest.get(card.name))


async def _shortest_context(model: str) -> int:
    workers = await registry.workers(shared(), timeout_ms=settings.ENV.worker_timeout_ms)
    held = [r.max_model_len for w in workers if (r := w.resident(model)) and r.state == "ready" and r.max_model_len]
    return min(held, default=sys.maxsize)


_shortest: TtlCache[str, int] = TtlCache(_shortest_context, seconds=1.0, entries=100)


async def _able_workers(redis: Redis, model: str) -> list[WorkerSnapshot]:
    """The live workers that can run the model now; when there are none, those that are loading it or would, or will once
    their host's mode has changed. Raises Unavailable when there are none of those either."""
    workers = [w for w in await registry.workers(redis, timeout_ms=settings.ENV.worker_timeout_ms) if not w.draining]
    state, reason = registry.state_of(model, workers)
    if state == "ready":
        return [worker for worker in workers if registry.is_ready(worker, model)]
    if state in ("loading", "on_demand"):
        return [w for w in workers if w.resident(model) is not None or model in w.loadable]
    card = (await model_cards()).get(model)
    if card is not None:
        await demand.note(redis, model)
    if state == "not_loaded" and card is not None and not card.has_weights:
        state = "no_weights"
    raise absence_refusal(state, model, reason)


async def refuse(*, request_id: str, org_id: str, key_id: str, model: str, error: ServiceError) -> None:
    """Writes the ledger row of a request that was refused before it could be submitted. Never raises for Redis."""
    await refusals.record(shared(), error, request_id=request_id, org_id=org_id, key_id=key_id, model=model)


async def estimate(request: InferenceRequest) -> Estimate:
    """What the request would cost, and when it would start and end, were it sent now. Raises Unavailable."""
    redis = shared()
    with _redis_errors():
        workers = await _able_workers(redis, request.model)
        model = await costs.to_price_by(redis, request.model, workers)
        lanes, busy = await queue.depths(redis)
        pace = await queue.pace(redis, request.model, len(workers))
    free = any(busy.get(w.worker_id, 0) < r.max_running for w in workers if (r := w.resident(request.model)))
    return forecast.estimate(request, model, lanes.get(request.model), workers=len(workers), pace=pace, free=free)


# --- Following ---------------------------------------------------------------------------------------------------------


async def events(request_id: str, *, after: int = 0) -> AsyncIterator[tuple[int, Event]]:
    """(id, event) past `after`, live, ending after RequestFinished. Raises NotFound when they are no longer kept.

    A request of ours that Redis has lost is put back, and its events go on.
    """
    redis = shared()
    held = _inflight.get(request_id)
    while True:
        try:
            with _redis_errors():
                async for number, event in hub(redis).follow(request_id, after, held.payloads if held else None):
                    after = number
                    if isinstance(event, RequestFinished):
                        _inflight.release(request_id)
                    yield number, event
            return
        except NotFound:
            if held is None or _inflight.get(request_id) is None:
                raise
        except Unavailable:
            if held is None or time.monotonic() > held.until:
                raise
            await asyncio.sleep(QUEUE_EVENT_SECONDS)  # Redis restarts; the client's line is kept open meanwhile
            continue
        try:
            await held.restore(redis)
        except RedisError:
            await asyncio.sleep(QUEUE_EVENT_SECONDS)


async def progress(request_id: str, *, after: int = 0) -> AsyncIterator[tuple[int, Event] | Progress]:
    """As `events`, with where the request stands whenever that changed, until its first event."""
    stream = events(request_id, after=after)
    pending = asyncio.ensure_future(anext(stream))
    shown: Progress | None = None
    try:
        while not (await asyncio.wait({pending}, timeout=QUEUE_EVENT_SECONDS if shown else 0.02))[0]:
            now = await _progress(request_id)
            if now is not None and now != shown:
                shown = now
                yield now
        yield await pending
        async for numbered in stream:
            yield numbered
    finally:
        await end(pending)
        await stream.aclose()  # type: ignore[attr-defined]


async def _progress(request_id: str) -> Progress | None:
    """None unless it waits; also while Redis does not answer, which the stream itself will tell."""
    try:
        redis = shared()
        status = await queue.status(redis, request_id)
        if status is None or not status.lane:
            return None
        lane = status.fields["lane"]
        workers = await registry.workers(redis, timeout_ms=settings.ENV.worker_timeout_ms)
        pace = await queue.pace(redis, lane, sum(worker.resident(lane) is not None for worker in workers))
        return forecast.progress(status, pace=pace, load=forecast.load_of(lane, workers))
    except RedisError:
        return None


async def _pace(redis: Redis, model: str) -> float:
    workers = await registry.workers(redis, timeout_ms=settings.ENV.worker_timeout_ms)
    return await queue.pace(redis, model, sum(worker.resident(model) is not None for worker in workers))


async def describe(request_id: str, org_id: str) -> dict[str, Any]:
    """Where a request of the organization stands or how it went, and why it waited. Raises NotFound."""
    redis = shared()
    with _redis_errors():
        status = await queue.status(redis, request_id)
        if status is None or status.fields["org"] != org_id:
            raise NotFound("There is no such request, or it ended too long ago.")
        pace = await _pace(redis, status.fields["lane"])
    return forecast.description(request_id, status, pace=pace)


async def cancel(request_id: str) -> None:
    """Ends the request wherever it is; the engine drops it before its next step. Charges what was generated."""
    _inflight.release(request_id)
    with _redis_errors():
        await queue.finish(shared(), request_id, Outcome.CANCELLED, code="cancelled", message="The request was cancelled.")


async def owner(request_id: str) -> str | None:
    """The organization a request belongs to, or None when it is unknown or no longer kept."""
    with _redis_errors():
        org: str | None = await shared().hget(f"request:{request_id}", "org")
        return org


async def worker_of(request_id: str) -> str:
    """The worker that ran the request last; empty when that is no longer known."""
    with _redis_errors():
        worker: str | None = await shared().hget(f"request:{request_id}", "worker")
        return worker or ""


async def load() -> dict[str, Any]:
    """The queue now: each lane's waiting, running, predicted work in ms and why its head waits; and the live dispatchers."""
    redis = shared()
    with _redis_errors():
        lanes, _ = await queue.depths(redis)
        cutoff = (await server_time_ms(redis)) - 2 * settings.ENV.lease_ms
        dispatchers = await redis.zcount("dispatchers", cutoff, "+inf")
    return {
        "lanes": {
            name: {"waiting": lane.waiting, "running": lane.running, "work_ms": lane.work_ms, "cause": lane.cause}
            for name, lane in lanes.items()
        },
        "dispatchers": int(dispatchers),
        "at": time.time(),
    }
