"""`GET /v1/key`: what a key is, what its organization may use, and what it uses now."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from django.http import HttpRequest, HttpResponseBase, JsonResponse

from apps.accounts import quota, selectors
from apps.core.redis import shared
from apps.core.types import Principal


async def describe(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    known = await selectors.credential(principal)
    use = await quota.use(shared(), principal)
    return JsonResponse({
        "object": "key",
        "name": known.name,
        "prefix": known.prefix,
        "organization": known.organization,
        "scopes": sorted(principal.scopes),
        "service_tier": principal.priority.name.lower(),
        "max_service_tier": principal.max_priority.name.lower(),
        "models": None if principal.allowed_models is None else sorted(principal.allowed_models),
        "created_at": known.created_at,
        "expires_at": known.expires_at,
        "limits": {name: _limit(limit, getattr(use, name)) for name, limit in asdict(use.limits).items()},
    })  # fmt: skip


def _limit(limit: int | None, used: int) -> dict[str, Any]:
    return {"limit": limit, "used": used, "remaining": None if limit is None else max(0, limit - used)}
