"""Bounds on requests that must hold before an application sees them: Daphne reads a whole body first.

`install()` gives Daphne a request class that answers 413 while the body arrives, announced or counted.
"""

from __future__ import annotations

import json
from typing import Any

from daphne import http_protocol
from django.conf import settings

from apps.api.errors import error_body
from apps.core.errors import PayloadTooLarge


class BoundedRequest(http_protocol.WebRequest):  # type: ignore[misc]
    """A request whose body is at most `max_body_bytes`; more closes the connection."""

    _seen_bytes = 0
    _refused = False

    def gotLength(self, length: int | None) -> None:
        super().gotLength(length)
        if length is not None and length > settings.ENV.max_body_bytes:
            self._refuse()

    def handleContentChunk(self, data: bytes) -> None:
        self._seen_bytes += len(data)
        if self._refused:
            return
        if self._seen_bytes > settings.ENV.max_body_bytes:
            self._refuse()
        else:
            super().handleContentChunk(data)

    def process(self) -> Any:
        return None if self._refused else super().process()

    def _refuse(self) -> None:
        self._refused = True
        message = f"The body may be {settings.ENV.max_body_bytes} bytes at most."
        body = json.dumps(error_body(PayloadTooLarge(message), "")).encode()
        head = (
            b"HTTP/1.1 413 Payload Too Large\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        self.channel.transport.write(head + body)
        self.channel.loseConnection()


def install() -> None:
    """Makes every connection that Daphne accepts from now on use BoundedRequest."""
    http_protocol.WebRequest = BoundedRequest
