"""The edge: an async middleware that answers /v1, health and /metrics itself.

It stands first, so an API request meets no session, no CSRF cookie and no thread hop on its way. Everything else goes
on to Django's own stack.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from django.conf import settings
from django.contrib.auth import SESSION_KEY
from django.contrib.sessions.backends.db import SessionStore
from django.core.exceptions import DisallowedHost, RequestDataTooBig
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponse, HttpResponseBase, UnreadablePostError
from django.middleware.csrf import CsrfViewMiddleware
from django.utils.decorators import sync_and_async_middleware
from redis.exceptions import RedisError

from apps.accounts.auth import authenticate, session_principal
from apps.accounts.models import User
from apps.api import idempotency, routes
from apps.api.errors import INTERNAL, STORE_UNAVAILABLE, error_response, is_anthropic
from apps.api.headers import request_id
from apps.core.database import in_database
from apps.core.errors import (
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    PermissionDenied,
    ServiceError,
    Unauthenticated,
    UnsupportedMediaType,
)
from apps.core.types import Principal, QuotaLimits

_LOG = logging.getLogger("apps.api.access")
_ERRORS = logging.getLogger(__name__)
_PREFIXES = ("/v1/", "/v1", "/health", "/healthz", "/ready", "/readyz", "/metrics")
_CORS = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
    "Access-Control-Max-Age": "600",
    "Vary": "Origin",
}
_EXPOSED = (
    "x-request-id, retry-after, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, "
    "x-ratelimit-reset-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)


@sync_and_async_middleware
def api_edge(get_response: Any) -> Any:
    """Async under ASGI, which is how the gateway runs; the test client's synchronous calls are bridged."""
    if not asyncio.iscoroutinefunction(get_response):
        raise RuntimeError("the gateway is an ASGI application: start it with daphne")

    async def middleware(request: HttpRequest) -> HttpResponseBase:
        request.request_id = request_id(request.headers.get("x-request-id"))  # type: ignore[attr-defined]
        if _is_ours(request.path):
            response = await _serve(request)
        else:
            response = await get_response(request)
        response["x-request-id"] = request.request_id  # type: ignore[attr-defined]
        if is_anthropic(request.path):
            response["request-id"] = request.request_id  # type: ignore[attr-defined]
        return response

    return middleware


def _is_ours(path: str) -> bool:
    return path in _PREFIXES or path.startswith("/v1/")


async def _serve(request: HttpRequest) -> HttpResponseBase:
    """One request, one answer, one access line. The query string is not logged: people put keys there."""
    started = time.monotonic()
    try:
        response = await _dispatch(request)
    except ServiceError as error:
        response = _refusal(request, error)
    except (RedisError, DatabaseError) as error:
        _ERRORS.warning("a store is unavailable: %s", type(error).__name__)
        response = _refusal(request, STORE_UNAVAILABLE)
    except Exception:  # noqa: BLE001  The last resort: a bug is logged here, once, and never shown.
        _ERRORS.exception("request %s failed", request.request_id)  # type: ignore[attr-defined]
        response = _refusal(request, INTERNAL)
    _add_cors(request, response)
    if isinstance(response, HttpResponse):
        response["Content-Length"] = str(len(response.content))
    response["openai-version"] = "2020-10-01"
    took_ms = round((time.monotonic() - started) * 1000)
    level = logging.INFO if request.path.startswith("/v1") else logging.DEBUG  # probes would drown the rest
    _LOG.log(level, "%s %s %s %s ms", request.method, request.path[:200], response.status_code, took_ms)
    return response


def _refusal(request: HttpRequest, error: ServiceError, headers: Mapping[str, str] | None = None) -> HttpResponse:
    return error_response(error, request.request_id, headers, path=request.path)  # type: ignore[attr-defined]


async def _dispatch(request: HttpRequest) -> HttpResponseBase:
    try:
        request.get_host()
    except DisallowedHost:
        raise InvalidRequest("This host name is not served here.", code="invalid_host") from None
    if request.method == "OPTIONS" and "Origin" in request.headers:
        return HttpResponse(status=204)
    found = routes.find(request.path)
    if found is None:
        await _authenticate(request)  # strangers do not learn what is where
        raise NotFound("There is nothing at this address.")
    route, parameters = found
    principal = None if route.open else await _authenticate(request)
    try:
        handler = route.handler(request.method)
    except MethodNotAllowed as refusal:
        return _refusal(request, refusal, {"Allow": route.methods})
    if principal is None:
        return await handler(request, **parameters)
    if route.scope is not None and route.scope not in principal.scopes:
        raise PermissionDenied("This key may not be used for inference.")
    if request.method == "POST" and route.takes:
        _check_body(request, route)
    run = partial(handler, request, principal, **parameters)
    keyed = request.method == "POST" and idempotency.HEADER in request.headers
    return await (idempotency.once(request, principal, run) if keyed else run())


async def _authenticate(request: HttpRequest) -> Principal:
    """By key; on /metrics also by its own token; or by the console's session, which must carry a CSRF token."""
    header = request.META.get("HTTP_AUTHORIZATION")
    if header is None and (key := request.META.get("HTTP_X_API_KEY")) is not None:  # as Anthropic's clients send it
        header = f"Bearer {key}"
    if request.path == "/metrics" and (principal := _scraper(header)) is not None:
        return principal
    if header is None and settings.SESSION_COOKIE_NAME in request.COOKIES:
        return await _session(request)
    return await authenticate(header)


def _scraper(header: str | None) -> Principal | None:
    token = settings.ENV.metrics_token.get_secret_value()
    if not token or not hmac.compare_digest((header or "").encode(), f"Bearer {token}".encode()):
        return None
    return Principal("", "metrics-token", frozenset({"metrics"}), QuotaLimits())


async def _session(request: HttpRequest) -> Principal:
    store = SessionStore(request.COOKIES[settings.SESSION_COOKIE_NAME])
    user_id = (await in_database(store.load)).get(SESSION_KEY)
    if user_id is None:
        raise Unauthenticated("Your session is over. Sign in again, or send an API key.", code="missing_api_key")
    if request.method != "GET":
        _check_csrf(request)
    return await session_principal(User(pk=user_id))


def _check_csrf(request: HttpRequest) -> None:
    check = CsrfViewMiddleware(lambda _: HttpResponse())
    check.process_request(request)
    if check.process_view(request, lambda _: HttpResponse(), (), {}) is not None:
        raise PermissionDenied("The CSRF token is missing or does not match.", code="csrf_failed")


def _check_body(request: HttpRequest, route: routes.Route) -> None:
    """Of a type the address takes, plain, and no larger than it takes. The protocol has counted it already."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise UnsupportedMediaType("Send the body without Content-Encoding.", code="unsupported_encoding")
    if request.content_type not in route.takes:
        raise UnsupportedMediaType(f"Send the body with `Content-Type: {' or '.join(route.takes)}`.")
    if request.content_type == "multipart/form-data":
        return
    try:
        size = len(request.body)
    except (RequestDataTooBig, UnreadablePostError):
        size = route.max_bytes + 1
    if size > route.max_bytes:
        raise PayloadTooLarge(f"The body may be {route.max_bytes} bytes at most.")


def _add_cors(request: HttpRequest, response: HttpResponseBase) -> None:
    """Browsers of allowed origins may call us, with whatever headers their SDK sends."""
    origin = request.headers.get("Origin")
    allowed = [item.strip() for item in settings.ENV.allowed_origins.split(",") if item.strip()]
    if origin is None or origin not in allowed:
        return
    response["Access-Control-Allow-Origin"] = origin
    response["Access-Control-Expose-Headers"] = _EXPOSED
    if asked := request.headers.get("Access-Control-Request-Headers"):
        response["Access-Control-Allow-Headers"] = asked
    for name, value in _CORS.items():
        response[name] = value
