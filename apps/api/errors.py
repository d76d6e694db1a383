"""The one place where errors become answers: `{"error": {message, type, param, code}}`, with the headers clients act on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from django.core.exceptions import PermissionDenied as DjangoPermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseForbidden
from rest_framework import exceptions
from rest_framework.response import Response

from apps.core.errors import (
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PermissionDenied,
    ServiceError,
    Unauthenticated,
    Unavailable,
    UnsupportedMediaType,
)

ANTHROPIC = "/v1/messages"
OVERLOADED = 529
_ANTHROPIC_TYPES = {413: "request_too_large", 503: "overloaded_error", 504: "timeout_error"}
STORE_UNAVAILABLE = Unavailable(
    "A part of the service is unavailable. Try again shortly.", code="dependency_unavailable", retry_after_seconds=2
)
INTERNAL = ServiceError("Something went wrong on our side. Please report the request id.")


def is_anthropic(path: str) -> bool:
    return path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/")


def error_body(error: ServiceError, request_id: str) -> dict[str, Any]:
    """The body of every failure."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
            "request_id": request_id,
        }
    }


def anthropic_body(error: ServiceError, request_id: str) -> dict[str, Any]:
    """The same under /v1/messages, where clients know no codes: the message says what `param` and `code` say elsewhere."""
    kind = _ANTHROPIC_TYPES.get(error.status, error.type if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


def error_headers(error: ServiceError) -> dict[str, str]:
    """When, and whether, to try again. Retry-After is whole seconds from 1 to 60: some clients ignore the rest."""
    headers = {}
    if error.status in (429, 503) or error.retry_after_seconds is not None:
        headers["Retry-After"] = str(min(60, max(1, math.ceil(error.retry_after_seconds or 1))))
    if error.should_retry is not None:
        headers["x-should-retry"] = str(error.should_retry).lower()
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def error_response(
    error: ServiceError, request_id: str, headers: Mapping[str, str] | None = None, *, path: str = ""
) -> HttpResponse:
    """`path` is where it happened: Anthropic's clients know other words and one more status."""
    anthropic = is_anthropic(path)
    body = json.dumps(anthropic_body(error, request_id) if anthropic else error_body(error, request_id))
    merged = {**error_headers(error), **(headers or {})}
    status = OVERLOADED if anthropic and error.status == 503 else error.status
    return HttpResponse(body, status=status, content_type="application/json", headers=merged)


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    """Django's CSRF refusal: JSON for programs, a short page for people."""
    message = "The CSRF token is missing or does not match. Reload the page and try again."
    if request.path.startswith(("/v1/", "/api/")):
        return error_response(PermissionDenied(message, code="csrf_failed"), getattr(request, "request_id", ""))
    return HttpResponseForbidden(message, content_type="text/plain")


def drf_exception_handler(error: Exception, context: dict[str, Any]) -> Response | None:
    """The management API's failures, in the same shape. None lets a bug through to the log and a 500."""
    translated = _from_drf(error)
    if translated is None:
        return None
    request_id = getattr(context["request"]._request, "request_id", "")
    return Response(error_body(translated, request_id), status=translated.status, headers=error_headers(translated))


def _from_drf(error: Exception) -> ServiceError | None:
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, Http404 | exceptions.NotFound):
        return NotFound("There is no such object.")
    if isinstance(error, exceptions.NotAuthenticated):
        return Unauthenticated("Sign in, or send an API key with the scope `admin`.", code="missing_api_key")
    if isinstance(error, exceptions.AuthenticationFailed):
        return Unauthenticated(str(error.detail))
    if isinstance(error, DjangoPermissionDenied | exceptions.PermissionDenied):
        code = "csrf_failed" if "CSRF" in str(error) else None
        return PermissionDenied(str(error) or "You may not do this.", code=code)
    if isinstance(error, exceptions.MethodNotAllowed):
        return MethodNotAllowed(str(error.detail))
    if isinstance(error, exceptions.UnsupportedMediaType):
        return UnsupportedMediaType("Send JSON, with `Content-Type: application/json`.")
    if isinstance(error, exceptions.ValidationError):
        param, message = _first_problem(error.detail)
        return InvalidRequest(message, code="invalid_value", param=param)
    if isinstance(error, exceptions.APIException):
        return _of_status(error)
    return None


def _of_status(error: exceptions.APIException) -> ServiceError:
    translated = InvalidRequest(str(error.detail), code=str(error.default_code))
    translated.status = HTTPStatus(error.status_code)
    return translated


def _first_problem(detail: Any) -> tuple[str | None, str]:
    if isinstance(detail, dict):
        name, inner = next(iter(detail.items()))
        return None if name == "non_field_errors" else str(name), _first_problem(inner)[1]
    if isinstance(detail, list):
        return _first_problem(detail[0])
    return None, str(detail)
