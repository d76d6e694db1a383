"""The endpoints under /v1: parse, prepare, submit, answer."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse

from apps.api import intake, prepare, sse
from apps.api.errors import error_body
from apps.api.headers import rate_limit_headers
from apps.api.json import parse_object
from apps.api.prepare import Prepared
from apps.api.render import ChatRenderer, CompletionRenderer, Renderer, failure
from apps.api.schemas import ChatRequest, CompletionRequest, parse
from apps.core.errors import NotFound, ServiceError
from apps.core.redis import shared
from apps.core.types import ChoiceFinished, Event, Principal, RequestFinished, TextDelta
from apps.fleet import registry
from apps.fleet.selectors import ModelCard, model_cards
from apps.scheduler import services
from apps.scheduler.forecast import Progress

SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def chat_completions(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    body, prepared = await intake.chat(lambda: parse_object(request.body), principal)
    return await _answer(request, principal, prepared, ChatRenderer(prepared, body.include_usage), body.include_queue)


async def completions(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    body, prepared = await intake.completion(lambda: parse_object(request.body), principal)
    return await _answer(request, principal, prepared, CompletionRenderer(prepared, body.include_usage), body.include_queue)


async def estimate(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    """What the body of a chat completion, or of a completion, would cost and when it would be done, were it sent now."""
    raw = parse_object(request.body)
    if "prompt" in raw:
        prepared = await prepare.completion(parse(CompletionRequest, raw), principal)
    else:
        prepared = await prepare.chat(parse(ChatRequest, raw), principal)
    found = await services.estimate(prepared.request)
    return JsonResponse({
        "object": "estimate",
        "model": prepared.card.name,
        "service_tier": prepared.tier,
        "prompt_tokens": prepared.request.num_prompt_tokens,
        "completion_tokens": found.tokens,
        **{name: dataclasses.asdict(getattr(found, name)) for name in ("cost", "wait", "first_token", "finish")},
        "interval": 0.8,
    })  # fmt: skip


async def request_status(request: HttpRequest, principal: Principal, name: str) -> HttpResponseBase:
    return JsonResponse(await services.describe(name, principal.org_id))


async def _answer(
    request: HttpRequest, principal: Principal, prepared: Prepared, renderer: Renderer, show_queue: bool
) -> HttpResponseBase:
    started = time.monotonic()
    limits = await services.submit(prepared.request, principal)
    headers = rate_limit_headers(limits)
    request_id = request.request_id  # type: ignore[attr-defined]
    if prepared.request.stream:
        frames = sse.kept_alive(_frames(prepared.request.id, renderer, request_id, show_queue), settings.ENV.sse_keep_alive_ms)
        return StreamingHttpResponse(frames, content_type="text/event-stream", headers={**SSE_HEADERS, **headers})
    events = [event async for event in _events(prepared.request.id) if not isinstance(event, Progress)]
    finished = events[-1]
    error = failure(finished) if isinstance(finished, RequestFinished) else None
    if error is not None:
        raise error
    headers["openai-processing-ms"] = str(round((time.monotonic() - started) * 1000))
    body = json.dumps(renderer.whole(events), ensure_ascii=False)
    return HttpResponse(body, content_type="application/json", headers=headers)


async def _frames(request_id: str, renderer: Renderer, http_id: str, show_queue: bool) -> AsyncIterator[bytes]:
    """The SSE frames of one request. A failure after the first byte is a frame too."""
    yield b"".join(map(sse.frame, renderer.opening())) or sse.KEEP_ALIVE
    try:
        async for event in _events(request_id, show_queue):
            if isinstance(event, Progress):
                yield sse.frame(renderer.queue_chunk(event))
                continue
            if isinstance(event, TextDelta | ChoiceFinished):
                yield sse.frame(renderer.chunk(event))
            if not isinstance(event, RequestFinished):
                continue
            if (error := failure(event)) is not None:
                raise error
            usage = renderer.usage_chunk(event.usage)
            yield (sse.frame(usage) if usage else b"") + sse.DONE
    except ServiceError as error:
        yield sse.frame(error_body(error, http_id)) + sse.DONE


async def _events(request_id: str, show_queue: bool = False) -> AsyncIterator[Event | Progress]:
    """The request's events. Whoever stops listening before the end has hung up: the request is cancelled."""
    ended = False
    try:
        async for item in services.progress(request_id) if show_queue else services.events(request_id):
            if isinstance(item, Progress):
                yield item
                continue
            ended = isinstance(item[1], RequestFinished)
            yield item[1]
    finally:
        if not ended:
            await asyncio.shield(services.cancel(request_id))


async def models(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    cards = [card for card in (await model_cards()).values() if _visible(card, principal)]
    return JsonResponse({"object": "list", "data": [await model_body(card) for card in cards]})


async def model(request: HttpRequest, principal: Principal, name: str) -> HttpResponseBase:
    card = (await model_cards()).get(name)
    if card is None or not _visible(card, principal):
        raise NotFound(f"The model {name[:100]!r} does not exist.", code="model_not_found", param="model")
    return JsonResponse(await model_body(card))


def _visible(card: ModelCard, principal: Principal) -> bool:
    return principal.allowed_models is None or card.name in principal.allowed_models


async def model_body(card: ModelCard) -> dict[str, Any]:
    """OpenAI's four fields, and what clients look for beside them."""
    state = await registry.availability(shared(), card, timeout_ms=settings.ENV.worker_timeout_ms)
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": card.owned_by,
        "name": card.title + (" (tiny test checkpoint)" if card.tiny else ""),
        "modality": card.modality,
        "max_model_len": card.context_length,
        "context_length": card.context_length,
        "parameters": card.parameters,
        "state": state,
        "tiny": card.tiny,
    }


Endpoint = Callable[..., Awaitable[HttpResponseBase]]
