"""From what a client sent to a request ready to submit, over HTTP and WebSocket alike. Every refusal is a ledger row."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from apps.api import prepare
from apps.api.prepare import Prepared
from apps.api.schemas import ChatRequest, CompletionRequest, parse
from apps.api.strict import Strict
from apps.core.errors import ServiceError
from apps.core.types import Principal
from apps.fleet.selectors import model_cards
from apps.scheduler import services

_Body = TypeVar("_Body", bound=Strict)
_Made = TypeVar("_Made")
Read = Callable[[], dict[str, Any]]


async def chat(read: Read, principal: Principal) -> tuple[ChatRequest, Prepared]:
    """Raises what `read` raises, and NotFound, InvalidRequest, PermissionDenied or Unavailable."""
    return await counted(read, ChatRequest, prepare.chat, principal)


async def completion(read: Read, principal: Principal) -> tuple[CompletionRequest, Prepared]:
    """Raises what `read` raises, and NotFound, InvalidRequest, PermissionDenied or Unavailable."""
    return await counted(read, CompletionRequest, prepare.completion, principal)


async def counted(
    read: Read, schema: type[_Body], make: Callable[[_Body, Principal], Awaitable[_Made]], principal: Principal
) -> tuple[_Body, _Made]:
    """The body that `read` gives, as `schema`, and what `make` makes of it. Raises what they raise."""
    named = ""
    try:
        raw = read()
        named = str(raw.get("model"))
        body = parse(schema, raw)
        return body, await make(body, principal)
    except ServiceError as error:
        model = named if named in await model_cards() else "unknown"  # a name of the client's invention is no label
        await services.refuse(request_id="", org_id=principal.org_id, key_id=principal.key_id, model=model, error=error)
        raise
