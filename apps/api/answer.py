"""From a request ready to submit to its answer: followed to its end, and rendered whole or step by step."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse

from apps.api import sessions, sse
from apps.api.errors import INTERNAL
from apps.api.headers import rate_limit_headers
from apps.api.prepare import Prepared
from apps.api.render import failure
from apps.core.errors import ServiceError
from apps.core.types import Event, InferenceRequest, Principal, RateLimitState, RequestFinished
from apps.scheduler import services
from apps.scheduler.forecast import Progress

_LOG = logging.getLogger(__name__)
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
Body = dict[str, Any]


class Renderer(Protocol):
    """How one API words an answer. `end` is what its streams end with."""

    end: bytes

    def opening(self) -> Iterable[Body]:
        """What goes out before the first token."""

    def step(self, event: Event | Progress) -> Iterable[Body]:
        """What one event adds. RequestFinished comes here only when the request succeeded."""

    def failed(self, error: ServiceError, http_id: str) -> Iterable[Body]:
        """The end of a stream whose request failed after it had begun."""

    def whole(self, events: Sequence[Event]) -> Body:
        """The body of an answer that is not streamed, from all its events."""

    def frame(self, body: Body) -> bytes:
        """A body as a server-sent event."""


async def _nothing(finished: RequestFinished) -> None:
    """For answers that leave nothing behind."""


@dataclass(slots=True)
class Answer:
    """One request on its way to its client. `ended` is awaited once its end is known, before the client learns of it.

    `session` is the client's name for the conversation, whose KV the request uses (apps/api/sessions.py).
    """

    prepared: Prepared
    renderer: Renderer
    session: str | None = None
    show_queue: bool = False
    ended: Callable[[RequestFinished], Awaitable[None]] = _nothing
    request: InferenceRequest = field(init=False)

    async def respond(self, request: HttpRequest, principal: Principal) -> HttpResponseBase:
        """Submits the request and answers over HTTP. Raises what `services.submit` raises, and how the request failed."""
        started = time.monotonic()
        headers = rate_limit_headers(await self.submit(principal))
        if self.prepared.request.stream:
            frames = sse.kept_alive(self._frames(request.request_id), settings.ENV.sse_keep_alive_ms)  # type: ignore[attr-defined]
            return StreamingHttpResponse(frames, content_type="text/event-stream", headers={**SSE_HEADERS, **headers})
        body = json.dumps(await self._whole(), ensure_ascii=False)
        headers["openai-processing-ms"] = str(round((time.monotonic() - started) * 1000))
        return HttpResponse(body, content_type="application/json", headers=headers)

    async def submit(self, principal: Principal) -> RateLimitState:
        """Raises what `services.submit` raises."""
        request = self.prepared.request
        self.request = request if self.session is None else await sessions.entered(request, self.session)
        return await services.submit(self.request, principal, self.prepared.attachments)

    async def finish(self, finished: RequestFinished) -> None:
        """What is to be kept of the request."""
        if self.session is not None:
            await sessions.used(self.request, self.session, finished.usage)
        await self.ended(finished)

    async def _whole(self) -> Body:
        events = [
            event async for event in followed(self.prepared.request.id, self.show_queue) if not isinstance(event, Progress)
        ]
        finished = events[-1]
        error = failure(finished) if isinstance(finished, RequestFinished) else None
        if error is not None:
            raise error
        body = self.renderer.whole(events)
        if isinstance(finished, RequestFinished):
            await self.finish(finished)
        return body

    async def _frames(self, http_id: str) -> AsyncIterator[bytes]:
        """The answer as server-sent events. A step's go out together, and something does at once."""
        silence = sse.KEEP_ALIVE
        async with aclosing(self.steps(http_id)) as steps:
            async for bodies in steps:
                if data := b"".join(map(self.renderer.frame, bodies)) or silence:
                    yield data
                silence = b""
        yield self.renderer.end

    async def steps(self, http_id: str) -> AsyncGenerator[list[Body], None]:
        """The bodies of a stream, step by step. A failure after the beginning is one of them, and the last."""
        yield list(self.renderer.opening())
        try:
            async with aclosing(followed(self.prepared.request.id, self.show_queue)) as events:
                async for event in events:
                    if not isinstance(event, RequestFinished):
                        yield list(self.renderer.step(event))
                        continue
                    error = failure(event)
                    last = list(self.renderer.step(event) if error is None else self.renderer.failed(error, http_id))
                    await self.finish(event)
                    yield last
        except ServiceError as error:
            yield list(self.renderer.failed(error, http_id))
        except Exception:  # noqa: BLE001  The last resort: the client's line would stay open without an end.
            _LOG.exception("request %s failed", http_id)
            yield list(self.renderer.failed(INTERNAL, http_id))


async def followed(request_id: str, show_queue: bool = False) -> AsyncGenerator[Event | Progress, None]:
    """The request's events. Whoever stops listening before the end has hung up: the request is cancelled."""
    ended = False
    try:
        async for item in services.progress(request_id) if show_queue else services.events(request_id):
            if isinstance(item, Progress):
                yield item
                continue
            ended = isinstance(item[1], RequestFinished)
            yield item[1]
    finally:
        if not ended:
            await asyncio.shield(services.cancel(request_id))
