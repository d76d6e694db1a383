"""Every address that the edge answers itself: who answers which method, and what a body may be."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from django.http import HttpResponseBase

from apps.api import catalogue, chat, health, key, sessions
from apps.api.anthropic import handlers as messages
from apps.api.responses import handlers as responses
from apps.core.errors import MethodNotAllowed

Handler = Callable[..., Awaitable[HttpResponseBase]]
_PARAMETER = re.compile(r"\{(\w+)(:path)?\}")


@dataclass(frozen=True, slots=True)
class Route:
    pattern: re.Pattern[str]
    handlers: Mapping[str, Handler]  # by method
    open: bool = False  # needs no credentials
    scope: str | None = "inference"  # that a key must have; None: the handler looks for itself
    takes: tuple[str, ...] = ("application/json",)  # content types of bodies; empty: bodies are not read

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
    **handlers: Handler,
) -> Route:
    """`{name}` in the path stands for anything without a slash, `{name:path}` for anything."""

    def group(found: re.Match[str]) -> str:
        return f"(?P<{found[1]}>{'.+' if found[2] else '[^/]+'})"

    return Route(re.compile(_PARAMETER.sub(group, path)), handlers, open, scope, takes)


ROUTES = (
    route("/v1/chat/completions", POST=chat.chat_completions),
    route("/v1/completions", POST=chat.completions),
    route("/v1/estimate", POST=chat.estimate),
    route("/v1/responses", POST=responses.create),
    route("/v1/responses/input_tokens", POST=responses.input_tokens),
    route("/v1/responses/compact", POST=responses.compact),
    route("/v1/responses/{response_id}", GET=responses.retrieve, DELETE=responses.delete),
    route("/v1/responses/{response_id}/cancel", POST=responses.cancel, takes=()),
    route("/v1/responses/{response_id}/input_items", GET=responses.input_items),
    route("/v1/messages", POST=messages.create),
    route("/v1/messages/count_tokens", POST=messages.count_tokens),
    route("/v1/key", GET=key.describe, scope=None),
    route("/v1/sessions", GET=sessions.list_all),
    route("/v1/sessions/{name:path}", GET=sessions.retrieve, DELETE=sessions.delete),
    route("/v1/requests/{name}", GET=chat.request_status),
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
