"""What every WebSocket of the API has: credentials, an origin that is checked, and bounds on what it may send."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from channels.generic.websocket import AsyncWebsocketConsumer
from django.conf import settings
from django.contrib.auth import SESSION_KEY
from django.contrib.sessions.backends.db import SessionStore
from django.http import parse_cookie

from apps.accounts.auth import authenticate, session_principal
from apps.accounts.models import User
from apps.api.json import parse_object
from apps.core.database import in_database
from apps.core.errors import Conflict, InvalidRequest, PermissionDenied, ServiceError, Unauthenticated
from apps.core.types import Principal

AUTH_SECONDS = 10
RECHECK_SECONDS = 5
MAX_FRAMES_PER_SECOND = 50
MAX_SOCKETS_PER_KEY = 200
MAX_STRIKES = 3
UNAUTHENTICATED, FLOODED, POLICY, UNSUPPORTED = 4401, 4429, 1008, 1003

_sockets: Counter[str] = Counter()


class InvalidFrame(InvalidRequest):
    """A frame that no client of ours would send."""

    code = "invalid_message"


class ApiSocket(AsyncWebsocketConsumer):  # type: ignore[misc]
    """One socket. What it does with frames is its subclass's: `handle`, `report` and `hung_up`."""

    async def handle(self, frame: dict[str, Any]) -> None:
        """Raises ServiceError for a frame that cannot be served, InvalidFrame for nonsense."""
        raise NotImplementedError

    async def report(self, error: ServiceError, frame: dict[str, Any] | None) -> None:
        """Tells the client what was wrong with a frame; None for one that could not be read."""
        raise NotImplementedError

    def hung_up(self) -> None:
        """Ends what ran for the client."""

    async def connect(self) -> None:
        self.principal: Principal | None = None
        self.authorization = ""
        self.strikes = 0
        self.frames: list[float] = []
        self.watch: asyncio.Task[None] | None = None
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self.scope["headers"]}
        if not _origin_allowed(headers):
            await self.close()
            return
        try:
            if "authorization" in headers:
                await self.admit(headers["authorization"])
            elif (principal := await _from_session(headers)) is not None:
                self._enter(principal)
        except ServiceError:
            await self.close()
            return
        await self.accept()
        self.watch = asyncio.create_task(self._watch_credentials())

    async def admit(self, authorization: str) -> None:
        """Raises Unauthenticated, PermissionDenied or Conflict."""
        principal = await authenticate(authorization)
        if "inference" not in principal.scopes:
            raise PermissionDenied("This key may not be used for inference.")
        self.authorization = authorization
        self._enter(principal)

    def _enter(self, principal: Principal) -> None:
        if _sockets[principal.key_id] >= MAX_SOCKETS_PER_KEY:
            raise Conflict("This key has too many sockets open.", code="too_many_sockets")
        _sockets[principal.key_id] += 1
        self.principal = principal

    async def _watch_credentials(self) -> None:
        """Closes a socket that does not authenticate in time, or whose key was revoked."""
        await asyncio.sleep(AUTH_SECONDS)
        while self.principal is not None:
            if self.authorization:
                try:
                    await authenticate(self.authorization)
                except Unauthenticated:
                    break
            await asyncio.sleep(RECHECK_SECONDS)
        await self.close(code=UNAUTHENTICATED)

    async def disconnect(self, code: int) -> None:
        if self.watch is not None:
            self.watch.cancel()
            self.hung_up()
        if self.principal is not None:
            _sockets[self.principal.key_id] -= 1

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if text_data is None:
            await self.close(code=UNSUPPORTED)
            return
        if self._flooded():
            await self.report(Conflict("Too many frames a second.", code="rate_limit_exceeded"), None)
            await self.close(code=FLOODED)
            return
        frame = None
        try:
            frame = _parse_frame(text_data)
            await self.handle(frame)
        except InvalidFrame as error:
            await self._strike(error, frame)
        except ServiceError as error:
            await self.report(error, frame)

    def _flooded(self) -> bool:
        now = time.monotonic()
        self.frames = [at for at in self.frames if at > now - 1] + [now]
        return len(self.frames) > MAX_FRAMES_PER_SECOND

    async def _strike(self, error: ServiceError, frame: dict[str, Any] | None) -> None:
        self.strikes += 1
        await self.report(error, frame)
        if self.strikes >= MAX_STRIKES:
            await self.close(code=POLICY)

    async def send_frame(self, frame: dict[str, Any]) -> None:
        await self.send(text_data=json.dumps(frame, ensure_ascii=False))


def _parse_frame(text: str) -> dict[str, Any]:
    """Raises InvalidFrame."""
    try:
        return parse_object(text.encode("utf-8", "surrogatepass"))
    except InvalidRequest as error:
        raise InvalidFrame(error.message) from None


def _origin_allowed(headers: dict[str, str]) -> bool:
    """Browsers name where a page came from: ours, or one the operator allows. Other clients name nothing."""
    origin = headers.get("origin")
    if origin is None:
        return True
    allowed = {item.strip() for item in settings.ENV.allowed_origins.split(",") if item.strip()}
    parts = urlsplit(origin)
    own = parts.scheme in ("http", "https") and parts.netloc == headers.get("host")
    host_served = parts.hostname in settings.ALLOWED_HOSTS or "*" in settings.ALLOWED_HOSTS
    return origin in allowed or (own and host_served)


async def _from_session(headers: dict[str, str]) -> Principal | None:
    """The console's user. The Origin was checked, which is what CSRF tokens are for elsewhere."""
    session_key = parse_cookie(headers.get("cookie", "")).get(settings.SESSION_COOKIE_NAME)
    if session_key is None or "origin" not in headers:
        return None
    user_id = (await in_database(SessionStore(session_key).load)).get(SESSION_KEY)
    return None if user_id is None else await session_principal(User(pk=user_id))
