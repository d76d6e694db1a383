"""Sessions: conversations that a client names, each with KV of its own, and what that KV saved.

A session's KV is salted by a secret that the record holds. Without the record nothing can reach that KV again, so deleting
the record is deleting the session: what is left in memory ages out. Turns may run side by side: blocks of KV are never
changed once they are written.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from django.http import HttpRequest, HttpResponseBase, JsonResponse
from redis.asyncio import Redis
from redis.exceptions import RedisError

from apps.core.errors import NotFound, Unavailable
from apps.core.redis import LuaScript, shared
from apps.core.types import InferenceRequest, Principal, Usage
from apps.scheduler import services

KEPT_MS = 24 * 3600 * 1000  # since the last turn
_USED = LuaScript(Path(__file__).parent / "lua" / "session.lua")


async def entered(request: InferenceRequest, name: str) -> InferenceRequest:
    """The request, with the KV of the organization's session of that name."""
    key = _key(request.org_id, name)
    async with shared().pipeline() as pipe:
        pipe.hsetnx(key, "salt", secrets.token_hex(16))
        pipe.pexpire(key, KEPT_MS)
        pipe.hget(key, "salt")
        *_, salt = await pipe.execute()
    return replace(request, salt=salt)


async def used(request: InferenceRequest, name: str, usage: Usage) -> None:
    """Counts a turn that ended. Its answer does not fail because Redis does."""
    keys = [_key(request.org_id, name), _index(request.org_id)]
    with suppress(RedisError, Unavailable):
        worker = await services.worker_of(request.id)
        args: list[str | int] = [name, request.salt, request.model, worker, usage.total_tokens, usage.cached_tokens, KEPT_MS]
        await _USED(shared(), keys=keys, args=args)


async def list_all(request: HttpRequest, principal: Principal) -> HttpResponseBase:
    redis = shared()
    names = await redis.zrevrange(_index(principal.org_id), 0, -1)
    found = [await _body(redis, principal, name) for name in names]
    return JsonResponse({"object": "list", "data": [body for body in found if body is not None]})


async def retrieve(request: HttpRequest, principal: Principal, name: str) -> HttpResponseBase:
    body = await _body(shared(), principal, name)
    if body is None:
        raise _missing(name)
    return JsonResponse(body)


async def delete(request: HttpRequest, principal: Principal, name: str) -> HttpResponseBase:
    async with shared().pipeline() as pipe:
        pipe.delete(_key(principal.org_id, name))
        pipe.zrem(_index(principal.org_id), name)
        deleted, _ = await pipe.execute()
    if not deleted:
        raise _missing(name)
    return JsonResponse({"id": name, "object": "session", "deleted": True})


async def _body(redis: Redis, principal: Principal, name: str) -> dict[str, Any] | None:
    """None for a session that has had no turn, or lapsed."""
    record = await redis.hgetall(_key(principal.org_id, name))
    if "used_ms" not in record:
        return None
    return {
        "id": name,
        "object": "session",
        "model": record["model"],
        "worker": record["worker"],
        "turns": int(record["turns"]),
        "cached_tokens": int(record["tokens"]),
        "saved_tokens": int(record["saved"]),
        "created_at": int(record["created_ms"]) // 1000,
        "last_used_at": int(record["used_ms"]) // 1000,
        "expires_at": (int(record["used_ms"]) + KEPT_MS) // 1000,
    }


def _missing(name: str) -> NotFound:
    return NotFound(f"There is no session {name[:100]!r}.")


def _key(org_id: str, name: str) -> str:
    return f"session:{org_id}:{name}"


def _index(org_id: str) -> str:
    return f"sessions:{org_id}"
