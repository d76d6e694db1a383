"""Bounds on requests that must hold before an application sees them: Daphne reads a whole body, or message, first.

`install()` gives Daphne protocol classes that answer 413 while a body arrives, announced or counted, and close a socket
whose message is too long. Bodies wait on disk until they are whole; how much of large ones is in memory then is bounded too.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from daphne import http_protocol, ws_protocol
from django.conf import settings

from apps.api.errors import error_body, error_headers
from apps.api.routes import max_bytes
from apps.core.errors import PayloadTooLarge, ServiceError, Unavailable


class BoundedRequest(http_protocol.WebRequest):  # type: ignore[misc]
    """A request whose body is at most what its address takes; more closes the connection."""

    _large: dict[BoundedRequest, int] = {}  # bytes of each body beyond `max_body_bytes` that is being answered
    _seen_bytes = 0
    _max_bytes = 0
    _refused = False
    _content_type: list[bytes] | None = None

    def gotLength(self, length: int | None) -> None:
        super().gotLength(length)
        path = self.channel._path.partition(b"?")[0]  # Twisted tells the request itself only when the body is whole
        self._max_bytes = max_bytes(path.decode("latin-1"))
        if length is not None and length > self._max_bytes:
            self._refuse_size()

    def handleContentChunk(self, data: bytes) -> None:
        self._seen_bytes += len(data)
        if self._refused:
            return
        if self._seen_bytes > self._max_bytes:
            self._refuse_size()
        else:
            super().handleContentChunk(data)

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """Keeps Twisted from parsing forms: that is Django's to do, with Django's limits."""
        self._content_type = self.requestHeaders.getRawHeaders(b"content-type")
        self.requestHeaders.removeHeader(b"content-type")
        super().requestReceived(command, path, version)

    def process(self) -> Any:
        if self._content_type is not None:
            self.requestHeaders.setRawHeaders(b"content-type", self._content_type)
        if not self._refused and self._seen_bytes > settings.ENV.max_body_bytes:
            self._hold()
        return None if self._refused else super().process()

    def finish(self) -> None:
        self._large.pop(self, None)
        super().finish()

    def connectionLost(self, reason: Any) -> None:
        self._large.pop(self, None)
        super().connectionLost(reason)

    def _hold(self) -> None:
        if sum(self._large.values()) + self._seen_bytes > settings.ENV.max_media_bodies_bytes:
            self._refuse(
                Unavailable("Too many large bodies are here. Try again shortly.", code="overloaded", retry_after_seconds=2)
            )
        else:
            self._large[self] = self._seen_bytes

    def _refuse_size(self) -> None:
        self._refuse(PayloadTooLarge(f"The body may be {self._max_bytes} bytes at most."))

    def _refuse(self, error: ServiceError) -> None:
        """Answers by hand: Twisted would go on reading."""
        self._refused = True
        body = json.dumps(error_body(error, "")).encode()
        headers = {**error_headers(error), "Content-Type": "application/json", "Connection": "close"}
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.channel.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.channel.loseConnection()


class BoundedSocket(ws_protocol.WebSocketProtocol):  # type: ignore[misc]
    """A socket whose messages are at most `max_body_bytes`, and which may be closed with any code of RFC 6455."""

    def onConnect(self, request: Any) -> Any:
        self.maxMessagePayloadSize = self.maxFramePayloadSize = settings.ENV.max_body_bytes
        self.failByDrop = False  # say 1009 before hanging up
        return super().onConnect(request)

    def serverClose(self, code: int | None = None) -> None:
        """Autobahn lets applications send 1000 and 3000-4999 only; ours also say 1003 and 1008."""
        if code is None or code == 1000 or code >= 3000:
            super().serverClose(code)
        else:
            self.sendCloseFrame(code=code, isReply=False)


def install() -> None:
    """Makes every connection that Daphne accepts from now on use these classes."""
    http_protocol.WebRequest = BoundedRequest
    ws_protocol.WebSocketFactory.protocol = BoundedSocket
