"""Quota: reserved at admission, settled at the exit, each in one atomic step.

The lua/ folder documents the keys. A minute is the last 60 s, exactly; days and months are UTC calendar ones, counted in
Redis and started again from Postgres when Redis has lost them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from django.db.models import F, Sum
from redis.asyncio import Redis

from apps.accounts.models import UsageDay
from apps.core.database import in_database
from apps.core.errors import QuotaExceeded
from apps.core.redis import LuaScript
from apps.core.types import Principal, QuotaLimits, RateLimitState

_LUA = Path(__file__).parent / "lua"
_WINDOW = _LUA / "window.lua"
SETTLE_LUA = _LUA / "settle.lua"  # a library: the scheduler's exit settles in its own transition
_RESERVE = LuaScript(_LUA / "reserve.lua", _WINDOW)
_RELEASE = LuaScript(_LUA / "release.lua", SETTLE_LUA)
_STATE = LuaScript(_LUA / "state.lua", _WINDOW)
_EPOCH = date(1970, 1, 1)

_RATE, _QUOTA = "rate_limit_exceeded", "quota_exceeded"
_REFUSALS = {
    "requests": (_RATE, "Your organization may send {0.requests_per_minute} requests a minute."),
    "tokens": (_RATE, "Your organization may use {0.tokens_per_minute} tokens a minute; this request may need {1}."),
    "concurrent": ("concurrency_exceeded", "Your organization may run {0.concurrent_requests} requests at once."),
    "day": (_QUOTA, "Of today's {0.tokens_per_day} tokens your organization has fewer left than the {1} this may need."),
    "month": (
        _QUOTA,
        "Of the month's {0.tokens_per_month} tokens your organization has fewer left than the {1} this may need.",
    ),
}


async def reserve(redis: Redis, *, request_id: str, principal: Principal, tokens: int, ttl_ms: int) -> RateLimitState:
    """Reserves one request of up to `tokens`. Without a settle it stops counting as concurrent after `ttl_ms`.

    Raises QuotaExceeded with code rate_limit_exceeded, concurrency_exceeded or quota_exceeded.
    """
    limits = principal.limits
    args: list[str | int] = [principal.org_id, request_id, tokens, ttl_ms, *_limit_args(limits)]
    reply = await _RESERVE(redis, keys=[], args=[*args, -1, 0, 0])
    while reply[0] == "seed":
        day = int(reply[5])
        reply = await _RESERVE(redis, keys=[], args=[*args, day, *await _used(principal.org_id, day)])
    verdict, count, empty_ms, total, retry_ms, _ = reply
    if verdict != "reserved":
        raise _refusal(str(verdict), limits, tokens, int(retry_ms))
    return _rate_limit_state(limits, int(count), int(empty_ms), int(total))


async def release(redis: Redis, *, request_id: str, org_id: str) -> None:
    """Takes a reservation back whole: the request was refused for another reason."""
    await _RELEASE(redis, keys=[], args=[org_id, request_id])


@dataclass(frozen=True, slots=True)
class QuotaUse:
    """What an organization uses now, beside its limits."""

    limits: QuotaLimits
    requests_per_minute: int
    tokens_per_minute: int
    concurrent_requests: int
    tokens_per_day: int
    tokens_per_month: int
    rate_limit: RateLimitState


async def use(redis: Redis, principal: Principal) -> QuotaUse:
    """The organization's use now. Days and months that Redis does not count come from Postgres."""
    count, empty_ms, tokens, running, day, month = (
        int(value) for value in await _STATE(redis, keys=[], args=[principal.org_id])
    )
    if day < 0 or month < 0:
        day, month = await _used(principal.org_id, (datetime.now(UTC).date() - _EPOCH).days)
    limits = principal.limits
    return QuotaUse(limits, count, tokens, running, day, month, _rate_limit_state(limits, count, empty_ms, tokens))


async def _used(org_id: str, day: int) -> tuple[int, int]:
    """Tokens that Postgres knows of, on the day (since 1970) and in its month."""
    today = _EPOCH + timedelta(days=day)
    rows = UsageDay.objects.filter(organization_id=org_id)
    total = Sum(F("prompt_tokens") + F("completion_tokens"), default=0)

    def read() -> tuple[int, int]:
        of_day = rows.filter(day=today).aggregate(total=total)
        of_month = rows.filter(day__year=today.year, day__month=today.month).aggregate(total=total)
        return of_day["total"], of_month["total"]

    return await in_database(read)


def _limit_args(limits: QuotaLimits) -> list[int]:
    ordered = (
        limits.requests_per_minute,
        limits.tokens_per_minute,
        limits.concurrent_requests,
        limits.tokens_per_day,
        limits.tokens_per_month,
    )
    return [-1 if limit is None else limit for limit in ordered]


def _refusal(verdict: str, limits: QuotaLimits, tokens: int, retry_ms: int) -> QuotaExceeded:
    code, message = _REFUSALS[verdict]
    hopeless = verdict in ("day", "month") or (verdict == "tokens" and tokens > (limits.tokens_per_minute or 0))
    seconds = min(60.0, max(1.0, retry_ms / 1000))
    hint = "" if hopeless else f" Try again in {seconds:.0f} s."
    return QuotaExceeded(
        message.format(limits, tokens) + hint,
        code=code,
        retry_after_seconds=seconds,
        should_retry=False if hopeless else None,
    )


def _rate_limit_state(limits: QuotaLimits, count: int, empty_ms: int, tokens: int) -> RateLimitState:
    def left(limit: int | None, used: int) -> int | None:
        return None if limit is None else max(0, limit - used)

    return RateLimitState(
        limit_requests=limits.requests_per_minute,
        remaining_requests=left(limits.requests_per_minute, count),
        reset_requests_ms=empty_ms,
        limit_tokens=limits.tokens_per_minute,
        remaining_tokens=left(limits.tokens_per_minute, tokens),
        reset_tokens_ms=empty_ms,
    )
