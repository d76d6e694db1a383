"""Every address that the edge answers itself: who answers which method, and what a body may be."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from django.conf import settings
from django.http import HttpResponseBase

from apps.api import (
    catalogue,
    chat,
    embeddings,
    files,
    health,
    images,
    key,
    sessions,
    speech,
    transcriptions,
    videos,
)
from apps.api.anthropic import handlers as messages
from apps.api.responses import handlers as responses
from apps.core.errors import MethodNotAllowed

Handler = Callable[..., Awaitable[HttpResponseBase]]
FORM = ("multipart/form-data",)
MEDIA = settings.ENV.max_media_body_bytes
_PARAMETER = re.compile(r"\{(\w+)(:path)?\}")


@dataclass(frozen=True, slots=True)
class Route:
    pattern: re.Pattern[str]
    handlers: Mapping[str, Handler]  # by method
    open: bool = False  # needs no credentials
    scope: str | None = "inference"  # that a key must have; None: the handler looks for itself
    takes: tuple[str, ...] = ("application/json",)  # content types of bodies; empty: bodies are not read
    max_bytes: int = settings.ENV.max_body_bytes

    @property
    def methods(self) -> str:
        return ", ".join(self.handlers)

    def handler(self, method: str | None) -> Handler:
        """Raises MethodNotAllowed. HEAD is answered as GET is."""
        found = self.handlers.get("GET" if method == "HEAD" else method or "")
        if found is None:
            raise MethodNotAllowed(f"Use {self.methods} here.")
        return found


def route(
    path: str,
    *,
    open: bool = False,
    scope: str | None = "inference",
    takes: tuple[str, ...] = ("application/json",),
    max_bytes: int = settings.ENV.max_body_bytes,
    **handlers: Handler,
) -> Route:
    """`{name}` in the path stands for anything without a slash, `{name:path}` for anything; a NUL, which no store takes, is
    in no name."""

    def group(found: re.Match[str]) -> str:
        stands_for = r"[^\0]+" if found[2] else r"[^/\0]+"
        return f"(?P<{found[1]}>{stands_for})"

    return Route(re.compile(_PARAMETER.sub(group, path)), handlers, open, scope, takes, max_bytes)


ROUTES = (
    route("/v1/chat/completions", POST=chat.chat_completions, max_bytes=MEDIA),
    route("/v1/completions", POST=chat.completions),
    route("/v1/estimate", POST=chat.estimate, max_bytes=MEDIA),
    route("/v1/responses", POST=responses.create, max_bytes=MEDIA),
    route("/v1/responses/input_tokens", POST=responses.input_tokens, max_bytes=MEDIA),
    route("/v1/responses/compact", POST=responses.compact, max_bytes=MEDIA),
    route("/v1/responses/{response_id}", GET=responses.retrieve, DELETE=responses.delete),
    route("/v1/responses/{response_id}/cancel", POST=responses.cancel, takes=()),
    route("/v1/responses/{response_id}/input_items", GET=responses.input_items),
    route("/v1/messages", POST=messages.create, max_bytes=MEDIA),
    route("/v1/messages/count_tokens", POST=messages.count_tokens, max_bytes=MEDIA),
    route("/v1/key", GET=key.describe, scope=None),
    route("/v1/sessions", GET=sessions.list_all),
    route("/v1/sessions/{name:path}", GET=sessions.retrieve, DELETE=sessions.delete),
    route("/v1/requests/{name}", GET=chat.request_status),
    route("/v1/embeddings", POST=embeddings.embeddings, max_bytes=MEDIA),
    route("/v1/audio/speech", POST=speech.speech),
    route("/v1/audio/transcriptions", POST=transcriptions.transcriptions, takes=FORM, max_bytes=MEDIA),
    route("/v1/audio/voices", GET=speech.voices),
    route("/v1/audio/models", GET=speech.models),
    route("/v1/images/generations", POST=images.generations),
    route("/v1/videos", POST=videos.create, GET=videos.index, takes=(*FORM, "application/json")),
    route("/v1/videos/{name}", GET=videos.show, DELETE=videos.delete),
    route("/v1/videos/{name}/cancel", POST=videos.cancel, takes=()),
    route("/v1/videos/{name}/content", GET=videos.content),
    route("/v1/files", POST=files.upload, GET=files.files, takes=FORM, max_bytes=settings.ENV.max_file_bytes),
    route("/v1/files/{name}", GET=files.file, DELETE=files.file_delete),
    route("/v1/files/{name}/content", GET=files.file_content),
    route("/v1/batches", POST=files.batch_create, GET=files.batches),
    route("/v1/batches/{name}", GET=files.batch),
    route("/v1/batches/{name}/cancel", POST=files.batch_cancel, takes=()),
    route("/v1/media/{token}", GET=images.linked, open=True),
    route("/v1/models", GET=catalogue.models),
    route("/v1/models/{name:path}", GET=catalogue.model),
    route("/healthz?", GET=health.alive, open=True),
    route("/readyz?", GET=health.ready, open=True),
    route("/metrics", GET=health.metrics, scope=None),
)


def find(path: str) -> tuple[Route, dict[str, str]] | None:
    """The route of an address, and what stands for its parameters."""
    for candidate in ROUTES:
        if match := candidate.pattern.fullmatch(path):
            return candidate, match.groupdict()
    return None


def max_bytes(path: str) -> int:
    """Of a body sent to an address."""
    found = find(path)
    return found[0].max_bytes if found else settings.ENV.max_body_bytes
