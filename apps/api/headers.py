"""Headers that clients read: rate limits and request ids."""

from __future__ import annotations

import re
import secrets

from apps.core.types import RateLimitState

_REQUEST_ID = re.compile(r"^[A-Za-z0-9_-]{8,64}$")


def request_id(incoming: str | None) -> str:
    """The client's own id when it is a plain one, else a new one."""
    return incoming if incoming and _REQUEST_ID.match(incoming) else f"req_{secrets.token_hex(12)}"


def rate_limit_headers(state: RateLimitState) -> dict[str, str]:
    """The six x-ratelimit headers; those of a limit that does not exist are left out."""
    headers = {}
    for name, limit, remaining, reset_ms in (
        ("requests", state.limit_requests, state.remaining_requests, state.reset_requests_ms),
        ("tokens", state.limit_tokens, state.remaining_tokens, state.reset_tokens_ms),
    ):
        if limit is not None:
            headers[f"x-ratelimit-limit-{name}"] = str(limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(remaining)
            headers[f"x-ratelimit-reset-{name}"] = duration(reset_ms)
    return headers


def duration(ms: int) -> str:
    """OpenAI's spelling: 250ms, 12s, 6m0s."""
    if ms < 1000:
        return f"{ms}ms"
    minutes, seconds = divmod(-(-ms // 1000), 60)
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
