"""Lists by cursor, as OpenAI pages them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apps.api.strict import invalid

MAX_PAGE = 100


def page(items: Sequence[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """A page of `items`, oldest first as given, by `limit`, `order` (desc unless asc) and `after`. Raises InvalidRequest."""
    order, limit = query.get("order", "desc"), query.get("limit", "20")
    if order not in ("asc", "desc"):
        raise invalid("order: is asc or desc.", "order")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_PAGE):
        raise invalid(f"limit: is from 1 to {MAX_PAGE}.", "limit")
    rows = list(items) if order == "asc" else list(reversed(items))
    rest = rows[_start(rows, query.get("after")) :]
    data = rest[: int(limit)]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(rest) > len(data),
    }


def _start(rows: Sequence[dict[str, Any]], after: str | None) -> int:
    if not after:
        return 0
    place = next((number for number, row in enumerate(rows) if row["id"] == after), None)
    if place is None:
        raise invalid("after: is the id of one of the list's.", "after")
    return place + 1
