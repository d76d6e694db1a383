"""`/v1/models`: the models that a key may use."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.http import HttpRequest, HttpResponseBase, JsonResponse

from apps.core.errors import NotFound
from apps.core.redis import shared
from apps.core.types import Principal
from apps.fleet import registry
from apps.fleet.selectors import ModelCard, model_cards


async def models(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    cards = await visible_cards(principal)
    return JsonResponse({"object": "list", "data": [await model_body(card) for card in cards]})


async def visible_cards(principal: Principal, modality: str | None = None) -> list[ModelCard]:
    """The models that a key may use, of one modality or of all."""
    cards = (await model_cards()).values()
    return [card for card in cards if _visible(card, principal) and modality in (None, card.modality)]


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
        "thinking": card.thinking,
        "state": state,
        "tiny": card.tiny,
    }
