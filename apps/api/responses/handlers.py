"""`/v1/responses`: create, read, cancel, delete, count and compact."""

from __future__ import annotations

import asyncio
from functools import partial

from django.http import HttpRequest, HttpResponseBase, JsonResponse

from apps.api import intake
from apps.api.answer import Answer
from apps.api.json import parse_object
from apps.api.paging import page
from apps.api.responses import compaction, store
from apps.api.responses.schemas import CompactRequest, CreateResponse
from apps.api.responses.turn import prepare_turn
from apps.api.schemas import parse
from apps.api.strict import invalid, unsupported
from apps.core.types import Principal
from apps.scheduler import services

CANCEL_TRIES, CANCEL_SECONDS = 40, 0.05


async def create(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    body, turn = await intake.counted(partial(parse_object, request.body), CreateResponse, prepare_turn, principal)
    answer = Answer(turn.prepared, turn.renderer, session=body.session, ended=turn.ended)
    return await answer.respond(request, principal)


async def retrieve(request: HttpRequest, principal: Principal, response_id: str) -> HttpResponseBase:
    if request.GET.get("stream", "false") != "false":
        raise invalid("stream: a stored response is read whole.", "stream")
    if unknown := set(request.GET) - {"stream", "include_obfuscation"}:
        raise unsupported(min(unknown))
    return JsonResponse(await store.response(principal.org_id, response_id))


async def delete(request: HttpRequest, principal: Principal, response_id: str) -> HttpResponseBase:
    await store.delete(principal.org_id, response_id)
    return JsonResponse({"id": response_id, "object": "response", "deleted": True})


async def cancel(request: HttpRequest, principal: Principal, response_id: str) -> HttpResponseBase:
    """Ends a response that another connection is waiting for. One that ended is shown as it is."""
    if response_id.startswith("resp_") and await services.owner(response_id) == principal.org_id:
        await services.cancel(response_id)
        for _ in range(CANCEL_TRIES):  # whoever holds the client stores it
            if body := await store.find(principal.org_id, response_id):
                return JsonResponse(body)
            await asyncio.sleep(CANCEL_SECONDS)
    return JsonResponse(await store.response(principal.org_id, response_id))


async def input_items(request: HttpRequest, principal: Principal, response_id: str) -> HttpResponseBase:
    return JsonResponse(page(await store.items(principal.org_id, response_id), request.GET))


async def input_tokens(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    """How long the prompt would be."""
    turn = await prepare_turn(parse(CreateResponse, parse_object(request.body)), principal)
    return JsonResponse({"object": "response.input_tokens", "input_tokens": turn.prepared.request.num_prompt_tokens})


async def compact(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    read = partial(parse_object, request.body)
    body, renderer = await intake.counted(read, CompactRequest, compaction.prepare_compaction, principal)
    return await Answer(renderer.prepared, renderer, session=body.session).respond(request, principal)
