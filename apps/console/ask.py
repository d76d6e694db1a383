"""What several pages ask for: Redis from a synchronous view, and quota use as bars."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from django.conf import settings
from redis.asyncio import Redis

from apps.accounts.models import Limits
from apps.accounts.quota import QuotaUse
from apps.core.redis import connect

NEAR = 80  # percent of a limit


async def with_redis(ask: Callable[[Redis], Awaitable[Any]]) -> Any:
    """A client of this call's own: synchronous views run each on a loop that ends with them."""
    async with connect(settings.ENV.redis_url) as redis:
        return await ask(redis)


def bars(use: QuotaUse) -> list[dict[str, Any]]:
    """Use beside limit, for each of the five."""
    return [_bar(name, getattr(use, name), getattr(use.limits, name)) for name in Limits.FIELDS]


def _bar(name: str, used: int, limit: int | None) -> dict[str, Any]:
    """A limit of 0 is used up."""
    percent = 0 if limit is None else round(100 * used / limit) if limit else 100
    level = "full" if percent >= 100 else "near" if percent >= NEAR else "fine"
    return {"field": name, "name": name.replace("_", " "), "used": used, "limit": limit, "percent": min(100, percent),
            "level": level}  # fmt: skip
