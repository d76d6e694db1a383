"""Chat completions, completions, and what is known of a request: its estimate before, its story after."""

from __future__ import annotations

import dataclasses

from django.http import HttpRequest, HttpResponseBase, JsonResponse

from apps.api import intake, prepare
from apps.api.answer import Answer
from apps.api.json import parse_object
from apps.api.render import ChatRenderer, CompletionRenderer
from apps.api.schemas import ChatRequest, CompletionRequest, parse
from apps.core.types import Principal
from apps.scheduler import services


async def chat_completions(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    body, prepared = await intake.chat(lambda: parse_object(request.body), principal)
    renderer = ChatRenderer(prepared, body.include_usage)
    answer = Answer(prepared, renderer, session=body.session, show_queue=body.include_queue)
    return await answer.respond(request, principal)


async def completions(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    body, prepared = await intake.completion(lambda: parse_object(request.body), principal)
    answer = Answer(prepared, CompletionRenderer(prepared, body.include_usage), show_queue=body.include_queue)
    return await answer.respond(request, principal)


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
