"""The one error tree. Each class carries what the edge needs to answer; the edge translates once (apps/api/errors.py).

Messages are for clients: they never hold a path, an address, SQL or another exception's text.
"""

from __future__ import annotations


class ServiceError(Exception):
    """Something a client must be told."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.retry_after_seconds = retry_after_seconds
        self.should_retry = should_retry


class InvalidRequest(ServiceError):
    """The request can never succeed as sent."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class Unauthenticated(ServiceError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(ServiceError):
    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFound(ServiceError):
    """Missing, or another organization's: the two are told apart nowhere."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class MethodNotAllowed(ServiceError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class Conflict(ServiceError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class PayloadTooLarge(ServiceError):
    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class UnsupportedMediaType(ServiceError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class QuotaExceeded(ServiceError):
    """Your quota: rate_limit_exceeded, concurrency_exceeded or quota_exceeded."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Unavailable(ServiceError):
    """Our capacity: no_capacity, queue_full, model_load_failed, model_not_loaded, shutting_down, dependency_unavailable."""

    status = 503
    type = "overloaded_error"
    code = "no_capacity"


class DeadlineExceeded(ServiceError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"
