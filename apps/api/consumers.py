"""`/ws/chat`: several chats and pictures over one socket, each resumable. docs/api/websocket.md has the frames."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from apps.api import images, intake
from apps.api.answer import Answer
from apps.api.errors import error_body
from apps.api.render import ChatRenderer, failure, said, usage_body
from apps.api.socket import UNAUTHENTICATED, ApiSocket, InvalidFrame
from apps.core.errors import Conflict, InvalidRequest, NotFound, ServiceError, Unauthenticated
from apps.core.types import ChoiceFinished, Event, MediaDelta, Principal, RequestFinished, TextDelta
from apps.scheduler import services
from apps.scheduler.forecast import Progress

GRACE_SECONDS = 15  # how long a request outlives its socket, waiting to be resumed
MAX_STREAMS = 16
CHATS, IMAGES = "/v1/chat/completions", "/v1/images/generations"

Finish = Callable[[RequestFinished], Awaitable[None]]  # what is to be done once a request's end is known
# Requests whose socket closed, by id: cancelled when the timer ends, unless another socket resumes them first.
_orphans: dict[str, asyncio.TimerHandle] = {}
_cancelling: set[asyncio.Task[None]] = set()


class ChatConsumer(ApiSocket):
    """One socket. `streams` holds the running requests by the id the client gave them."""

    async def connect(self) -> None:
        self.streams: dict[str, asyncio.Task[None]] = {}
        self.requests: dict[str, str] = {}
        await super().connect()

    def hung_up(self) -> None:
        for task in self.streams.values():
            task.cancel()
        for request_id in self.requests.values():
            _orphan(request_id)

    # --- Frames in ---

    async def handle(self, frame: dict[str, Any]) -> None:
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
            await self.admit(f"Bearer {frame.get('api_key', '')}")
        except ServiceError as error:
            await self.report(error, None)
            await self.close(code=UNAUTHENTICATED)
            return
        await self.send_frame({"type": "authenticated"})

    async def _start(self, frame: dict[str, Any], principal: Principal) -> None:
        client_id = self._free_id(frame)
        raw, endpoint = frame.get("request"), frame.get("endpoint", CHATS)
        if not isinstance(raw, dict):
            raise InvalidFrame("request is the body of a chat completion, or of what endpoint names.")
        if endpoint == CHATS:
            request_id, finish = await _chat(raw, principal)
        elif endpoint == IMAGES:
            request_id, finish = await _image(raw, principal), None
        else:
            raise InvalidRequest(f"endpoint: is {CHATS} or {IMAGES}.", code="invalid_value", param="endpoint")
        await self.send_frame({"type": "accepted", "id": client_id, "request_id": request_id})
        self._follow(client_id, request_id, after=0, finish=finish)

    async def _resume(self, frame: dict[str, Any], principal: Principal) -> None:
        client_id = self._free_id(frame)
        request_id, after = frame.get("request_id"), frame.get("after", 0)
        if not isinstance(after, int) or isinstance(after, bool) or after < 0:
            raise InvalidRequest("after is the last event_id you saw.", code="invalid_value", param="after")
        if not isinstance(request_id, str) or await services.owner(request_id) != principal.org_id:
            raise NotFound("There is no such request.")
        if (timer := _orphans.pop(request_id, None)) is not None:
            timer.cancel()
        await self.send_frame({"type": "accepted", "id": client_id, "request_id": request_id})
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

    def _follow(self, client_id: str, request_id: str, after: int, finish: Finish | None = None) -> None:
        self.requests[client_id] = request_id
        self.streams[client_id] = asyncio.create_task(self._stream(client_id, request_id, after, finish))

    async def _stream(self, client_id: str, request_id: str, after: int, finish: Finish | None) -> None:
        try:
            async for item in services.progress(request_id, after=after):
                if isinstance(item, Progress):
                    await self.send_frame({"type": "queue", "id": client_id, **item.body})
                    continue
                if isinstance(item[1], RequestFinished) and finish is not None:
                    await finish(item[1])
                await self.send_frame({"id": client_id, "event_id": item[0], **_frame(item[1])})
        except ServiceError as error:
            await self.report(error, {"id": client_id})
        self.streams.pop(client_id, None)
        self.requests.pop(client_id, None)

    async def report(self, error: ServiceError, frame: dict[str, Any] | None) -> None:
        client_id = frame.get("id") if frame else None
        shown = client_id if isinstance(client_id, str) else None
        await self.send_frame({"type": "error", "id": shown, **error_body(error, "")})


async def _chat(raw: dict[str, Any], principal: Principal) -> tuple[str, Finish]:
    body, prepared = await intake.chat(lambda: raw, principal)
    answer = Answer(prepared, ChatRenderer(prepared, include_usage=False), session=body.session)
    await answer.submit(principal)
    return prepared.request.id, answer.finish


async def _image(raw: dict[str, Any], principal: Principal) -> str:
    _, made = await intake.counted(lambda: raw, images.SocketImageRequest, images.prepare, principal)
    await made.submit(principal)
    return made.request.id


def _frame(event: Event) -> dict[str, Any]:
    if isinstance(event, TextDelta):
        frame = {"type": "token", "choice": event.choice, "text": event.text, "tokens": len(event.token_ids)}
        return {**said(event), **frame} if event.reasoning or event.tool_calls else frame
    if isinstance(event, MediaDelta):
        media = {"mime": event.mime, "data": event.media, "preview": event.preview} if event.media else {}
        done = event.first_index + event.units
        return {"type": "progress", "choice": event.choice, "done": done, "total": event.total, **media}
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


def _orphan(request_id: str) -> None:
    """Gives the client of a closed socket some time to come back."""

    def end() -> None:
        _orphans.pop(request_id, None)
        task = asyncio.ensure_future(services.cancel(request_id))
        _cancelling.add(task)
        task.add_done_callback(_cancelling.discard)

    _orphans[request_id] = asyncio.get_running_loop().call_later(GRACE_SECONDS, end)
