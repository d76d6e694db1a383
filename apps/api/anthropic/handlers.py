"""`/v1/messages`: Anthropic's Messages API, served as a chat."""

from __future__ import annotations

from functools import partial

from django.http import HttpRequest, HttpResponseBase, JsonResponse

from apps.api import intake, prepare
from apps.api.answer import Answer
from apps.api.anthropic.render import MessageRenderer
from apps.api.anthropic.schemas import NAMES, CountTokens, CreateMessage
from apps.api.json import parse_object
from apps.api.prepare import Prepared
from apps.api.schemas import parse
from apps.api.translate import naming
from apps.core.types import Principal


async def create(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    body, prepared = await intake.counted(partial(parse_object, request.body), CreateMessage, _prepare, principal)
    return await Answer(prepared, MessageRenderer(prepared), session=body.session_id).respond(request, principal)


async def count_tokens(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    prepared = await _prepare(parse(CountTokens, parse_object(request.body)), principal)
    return JsonResponse({"input_tokens": prepared.request.num_prompt_tokens})


async def _prepare(body: CountTokens, principal: Principal) -> Prepared:
    """Raises NotFound, InvalidRequest, PermissionDenied or Unavailable, in Anthropic's terms."""
    with naming(NAMES):
        chat, places = body.chat()
    with naming(NAMES, places):
        return await prepare.chat(chat, principal, "msg_")
