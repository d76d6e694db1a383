"""`/ws/chat`: several chats over one socket, each resumable. docs/api.md has the frames."""

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
from apps.api import intake
from apps.api.errors import error_body
from apps.api.json import parse_object
from apps.api.render import failure, said, usage_body
from apps.core.database import in_database
from apps.core.errors import Conflict, InvalidRequest, NotFound, PermissionDenied, ServiceError, Unauthenticated
from apps.core.types import ChoiceFinished, Event, Principal, RequestFinished, TextDelta
from apps.scheduler import services
from apps.scheduler.forecast import Progress

AUTH_SECONDS = 10
RECHECK_SECONDS = 5
GRACE_SECONDS = 15  # how long a request outlives its socket, waiting to be resumed
MAX_STREAMS = 16
MAX_FRAMES_PER_SECOND = 50
MAX_SOCKETS_PER_KEY = 200
MAX_STRIKES = 3
UNAUTHENTICATED, FLOODED, POLICY, UNSUPPORTED = 4401, 4429, 1008, 1003

_sockets: Counter[str] = Counter()
# Requests whose socket closed, by id: cancelled when the timer ends, unless another socket resumes them first.
_orphans: dict[str, asyncio.TimerHandle] = {}
_cancelling: set[asyncio.Task[None]] = set()


class ChatConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
    """One socket. `streams` holds the running requests by the id the client gave them."""

    async def connect(self) -> None:
        self.principal: Principal | None = None
        self.authorization = ""
        self.streams: dict[str, asyncio.Task[None]] = {}
        self.requests: dict[str, str] = {}
        self.strikes = 0
        self.frames: list[float] = []
        self.watch: asyncio.Task[None] | None = None
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self.scope["headers"]}
        if not _origin_allowed(headers):
            await self.close()
            return
        try:
            if "authorization" in headers:
                await self._admit(headers["authorization"])
            elif (principal := await _from_session(headers)) is not None:
                self._enter(principal)
        except ServiceError:
            await self.close()
            return
        await self.accept()
        self.watch = asyncio.create_task(self._watch_credentials())

    async def _admit(self, authorization: str) -> None:
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
        for task in self.streams.values():
            task.cancel()
        for request_id in self.requests.values():
            _orphan(request_id)
        if self.principal is not None:
            _sockets[self.principal.key_id] -= 1

    # --- Frames in ---

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if text_data is None:
            await self.close(code=UNSUPPORTED)
            return
        if self._flooded():
            await self._send_error(None, Conflict("Too many frames a second.", code="rate_limit_exceeded"))
            await self.close(code=FLOODED)
            return
        client_id = None
        try:
            frame = _parse_frame(text_data)
            client_id = frame.get("id") if isinstance(frame.get("id"), str) else None
            await self._handle(frame)
        except InvalidFrame as error:
            await self._strike(client_id, error)
        except ServiceError as error:
            await self._send_error(client_id, error)

    def _flooded(self) -> bool:
        now = time.monotonic()
        self.frames = [at for at in self.frames if at > now - 1] + [now]
        return len(self.frames) > MAX_FRAMES_PER_SECOND

    async def _strike(self, client_id: str | None, error: ServiceError) -> None:
        self.strikes += 1
        await self._send_error(client_id, error)
        if self.strikes >= MAX_STRIKES:
            await self.close(code=POLICY)

    async def _handle(self, frame: dict[str, Any]) -> None:
        kind = frame.get("type")
        if kind == "auth":
            await self._authenticate(frame)
        elif self.principal is None:
            raise Unauthenticated('Send {"type": "auth", "api_key": "sk-..."} first.', code="missing_api_key")
        elif kind == "start":
            await self._start(frame, self.principal)
        elif kind == "cancel":
            await services.cancel(self._request_of(frame))
        elif kind == "resume":
            await self._resume(frame, self.principal)
        else:
            raise InvalidFrame("type is one of auth, start, cancel, resume.")

    async def _authenticate(self, frame: dict[str, Any]) -> None:
        if self.principal is not None:
            raise InvalidFrame("This socket is authenticated already.")
        try:
            await self._admit(f"Bearer {frame.get('api_key', '')}")
        except ServiceError as error:
            await self._send_error(None, error)
            await self.close(code=UNAUTHENTICATED)
            return
        await self._send({"type": "authenticated"})

    async def _start(self, frame: dict[str, Any], principal: Principal) -> None:
        client_id = self._free_id(frame)
        body = frame.get("request")
        if not isinstance(body, dict):
            raise InvalidFrame("request is the body of a chat completion.")
        _, prepared = await intake.chat(lambda: body, principal)
        await services.submit(prepared.request, principal)
        await self._send({"type": "accepted", "id": client_id, "request_id": prepared.request.id})
        self._follow(client_id, prepared.request.id, after=0)

    async def _resume(self, frame: dict[str, Any], principal: Principal) -> None:
        client_id = self._free_id(frame)
        request_id, after = frame.get("request_id"), frame.get("after", 0)
        if not isinstance(after, int) or isinstance(after, bool) or after < 0:
            raise InvalidRequest("after is the last event_id you saw.", code="invalid_value", param="after")
        if not isinstance(request_id, str) or await services.owner(request_id) != principal.org_id:
            raise NotFound("There is no such request.")
        if (timer := _orphans.pop(request_id, None)) is not None:
            timer.cancel()
        await self._send({"type": "accepted", "id": client_id, "request_id": request_id})
        self._follow(client_id, request_id, after=after)

    def _free_id(self, frame: dict[str, Any]) -> str:
        client_id = frame.get("id")
        if not isinstance(client_id, str) or not 0 < len(client_id) <= 64:
            raise InvalidFrame("id is a string of 1 to 64 characters of your choice.")
        if client_id in self.streams:
            raise Conflict(f"{client_id} is still streaming.", code="stream_active", param="id")
        if len(self.streams) >= MAX_STREAMS:
            raise Conflict(f"A socket streams {MAX_STREAMS} requests at most.", code="too_many_streams")
        return client_id

    def _request_of(self, frame: dict[str, Any]) -> str:
        request_id = self.requests.get(str(frame.get("id")))
        if request_id is None:
            raise NotFound("There is no such request on this socket.")
        return request_id

    # --- Frames out ---

    def _follow(self, client_id: str, request_id: str, after: int) -> None:
        self.requests[client_id] = request_id
        self.streams[client_id] = asyncio.create_task(self._stream(client_id, request_id, after))

    async def _stream(self, client_id: str, request_id: str, after: int) -> None:
        try:
            async for item in services.progress(request_id, after=after):
                if isinstance(item, Progress):
                    await self._send({"type": "queue", "id": client_id, **item.body})
                else:
                    await self._send({"id": client_id, "event_id": item[0], **_frame(item[1])})
        except ServiceError as error:
            await self._send_error(client_id, error)
        self.streams.pop(client_id, None)
        self.requests.pop(client_id, None)

    async def _send_error(self, client_id: str | None, error: ServiceError) -> None:
        await self._send({"type": "error", "id": client_id, **error_body(error, "")})

    async def _send(self, frame: dict[str, Any]) -> None:
        await self.send(text_data=json.dumps(frame, ensure_ascii=False))


class InvalidFrame(InvalidRequest):
    """A frame that no client of ours would send."""

    code = "invalid_message"


def _parse_frame(text: str) -> dict[str, Any]:
    """Raises InvalidFrame."""
    try:
        return parse_object(text.encode("utf-8", "surrogatepass"))
    except InvalidRequest as error:
        raise InvalidFrame(error.message) from None


def _frame(event: Event) -> dict[str, Any]:
    if isinstance(event, TextDelta):
        frame = {"type": "token", "choice": event.choice, "text": event.text, "tokens": len(event.token_ids)}
        return {**said(event), **frame} if event.reasoning or event.tool_calls else frame
    if isinstance(event, ChoiceFinished):
        return {"type": "choice_finished", "choice": event.choice, "finish_reason": event.reason.value}
    return _finished_frame(event)


def _finished_frame(event: RequestFinished) -> dict[str, Any]:
    frame = {
        "type": "finished",
        "outcome": event.outcome.value,
        "usage": usage_body(event.usage),
        "timing": event.timing,
        "wait": event.wait,
    }
    error = failure(event)
    return frame if error is None else {**frame, **error_body(error, "")}


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


def _orphan(request_id: str) -> None:
    """Gives the client of a closed socket some time to come back."""

    def end() -> None:
        _orphans.pop(request_id, None)
        task = asyncio.ensure_future(services.cancel(request_id))
        _cancelling.add(task)
        task.add_done_callback(_cancelling.discard)

    _orphans[request_id] = asyncio.get_running_loop().call_later(GRACE_SECONDS, end)
