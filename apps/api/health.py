"""Alive, and able to serve. Neither waits for anything longer than a second."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from django.conf import settings
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from redis.exceptions import RedisError

from apps.core.errors import PermissionDenied, ServiceError, Unauthenticated
from apps.core.redis import shared
from apps.core.types import Principal
from apps.fleet import registry
from apps.fleet.selectors import model_cards
from apps.metrics import prometheus
from apps.scheduler import services

CHECK_SECONDS = 1.0
_ready: tuple[float, dict[str, Any]] = (0.0, {})


async def alive(request: HttpRequest) -> HttpResponseBase:
    return JsonResponse({"status": "alive"})


async def ready(request: HttpRequest) -> HttpResponseBase:
    """200 when a request could be answered now; 503 with what stands against it."""
    global _ready
    until, report = _ready
    if time.monotonic() >= until:
        report = await _check()
        _ready = (time.monotonic() + CHECK_SECONDS, report)
    return JsonResponse(report, status=200 if report["status"] == "ready" else 503)


async def _check() -> dict[str, Any]:
    problems = [problem for problem in await asyncio.gather(_postgres(), _queue(), _workers()) if problem]
    return {"status": "not ready" if problems else "ready", "problems": problems}


async def _postgres() -> str | None:
    try:
        await asyncio.wait_for(model_cards(), CHECK_SECONDS)
    except (DatabaseError, TimeoutError):
        return "Postgres does not answer"
    return None


async def _queue() -> str | None:
    try:
        load = await asyncio.wait_for(services.load(), CHECK_SECONDS)
    except (ServiceError, TimeoutError):
        return "Redis does not answer"
    return None if load["dispatchers"] else "no dispatcher is running"


async def _workers() -> str | None:
    try:
        workers = await asyncio.wait_for(registry.workers(shared(), timeout_ms=settings.ENV.worker_timeout_ms), CHECK_SECONDS)
    except (RedisError, TimeoutError):
        return None  # said by _queue
    if not workers:
        return "no worker is alive"
    states = {resident.model: resident.state for worker in workers for resident in worker.models}
    if "ready" in states.values() or (not states and any(worker.loadable for worker in workers)):
        return None  # what is unloaded comes when it is asked for
    return "no model is ready" + "".join(f"; {name} is {state}" for name, state in sorted(states.items()))


async def metrics(request: HttpRequest, principal: Principal | None) -> HttpResponseBase:
    """Prometheus' text. For the scrape token, or a key with the scope `metrics`."""
    if principal is None:
        raise Unauthenticated("Send METRICS_TOKEN, or a key with the scope `metrics`.", code="missing_api_key")
    if "metrics" not in principal.scopes:
        raise PermissionDenied("This needs a key with the scope `metrics`.")
    workers = await registry.workers(shared(), timeout_ms=settings.ENV.worker_timeout_ms)
    text = await prometheus.render(shared(), await services.load(), workers)
    return HttpResponse(text, content_type=prometheus.CONTENT_TYPE)
