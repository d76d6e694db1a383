"""`Idempotency-Key`: a POST that is sent again is executed once, and its answer is given again. docs/api/ has the rules.

lua/idempotency.lua documents the keys. A gateway that dies gives its keys back when their lease ends.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from redis.exceptions import RedisError

from apps.api.strict import invalid
from apps.core.errors import Conflict, ServiceError
from apps.core.redis import LuaScript, shared
from apps.core.tasks import end
from apps.core.types import Principal

HEADER = "Idempotency-Key"
MAX_KEY = 255
LEASE_MS = 30_000
KEPT_MS = 24 * 3600 * 1000
MAX_KEPT_BYTES = 4 << 20
_STEP = LuaScript(Path(__file__).parent / "lua" / "idempotency.lua")


class IdempotencyMismatch(ServiceError):
    status = 422
    type = "invalid_request_error"
    code = "idempotency_mismatch"


@dataclass(frozen=True, slots=True)
class Claim:
    """One execution's hold on a key."""

    key: str
    token: str

    async def step(self, verb: str, *args: str | int) -> list[Any]:
        reply: list[Any] = await _STEP(shared(), keys=[self.key], args=[verb, *args])
        return reply

    async def keep(self) -> None:
        """Renews the lease until it is cancelled."""
        while True:
            await asyncio.sleep(LEASE_MS / 3000)
            try:
                await self.step("renew", self.token, LEASE_MS)
            except RedisError:
                continue  # the lease outlives two renewals that fail

    async def answered(self, response: HttpResponse) -> None:
        """What is no success, or too large to be kept, is not given again: the same key may try anew."""
        if not 200 <= response.status_code < 300 or len(response.content) > MAX_KEPT_BYTES:
            await self.step("release", self.token)
            return
        kept = {
            "status": response.status_code,
            "type": response["Content-Type"],
            "content": b64encode(response.content).decode(),
        }
        await self.step("end", self.token, "answered", KEPT_MS, json.dumps(kept))


async def once(request: HttpRequest, principal: Principal, run: Callable[[], Awaitable[HttpResponseBase]]) -> HttpResponseBase:
    """Runs `run`, unless the request's key says that it was run. Raises InvalidRequest, Conflict or IdempotencyMismatch."""
    name = request.headers[HEADER]
    if not (1 <= len(name) <= MAX_KEY and name.isascii() and name.isprintable()):
        raise invalid(f"{HEADER}: is 1 to {MAX_KEY} printable ASCII characters.", HEADER)
    scope = sha256("\n".join((principal.org_id, request.path, name)).encode()).hexdigest()
    claim = Claim(f"idempotency:{scope}", secrets.token_hex(8))
    state, *rest = await claim.step("begin", sha256(request.body).hexdigest(), claim.token, LEASE_MS)
    if state == "begun":
        return await _run(claim, run)
    if state == "answered":
        return _again(json.loads(rest[0]))
    raise _refusal(state)


async def _run(claim: Claim, run: Callable[[], Awaitable[HttpResponseBase]]) -> HttpResponseBase:
    keeper = asyncio.create_task(claim.keep())
    streams = False
    try:
        response = await run()
        if isinstance(response, StreamingHttpResponse) and isinstance(response.streaming_content, AsyncIterator):
            streams = True
            response.streaming_content = _streamed(claim, keeper, response.streaming_content)
        elif isinstance(response, HttpResponse):
            await claim.answered(response)
        return response
    except BaseException:
        await asyncio.shield(claim.step("release", claim.token))
        raise
    finally:
        if not streams:
            await end(keeper)


async def _streamed(claim: Claim, keeper: asyncio.Task[None], frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The frames. A stream that reached its end is over for good; one that broke off may be asked for again."""
    whole = False
    try:
        async for frame in frames:
            yield frame
        whole = True
    finally:
        await end(keeper)
        last = ("end", claim.token, "streamed", KEPT_MS, "") if whole else ("release", claim.token)
        await asyncio.shield(claim.step(*last))


def _again(kept: dict[str, Any]) -> HttpResponse:
    headers = {"idempotent-replayed": "true"}
    return HttpResponse(b64decode(kept["content"]), status=kept["status"], content_type=kept["type"], headers=headers)


def _refusal(state: str) -> ServiceError:
    if state == "mismatch":
        return IdempotencyMismatch(f"This {HEADER} was used with another body.", param=HEADER)
    if state == "running":
        return Conflict(f"The request with this {HEADER} is still running.", code="in_progress", retry_after_seconds=1)
    return Conflict(f"The stream of this {HEADER} was sent, and is not kept.", code="already_streamed", should_retry=False)
