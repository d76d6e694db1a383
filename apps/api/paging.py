"""Lists by a cursor: `after` an id, `limit` of them, newest first or oldest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from django.db.models import Model, Q, QuerySet
from django.http import HttpRequest

from apps.api.strict import invalid
from apps.core.database import in_database

MAX_LIMIT = 100
M = TypeVar("M", bound=Model)


async def page_of(request: HttpRequest, rows: QuerySet[M], body: Callable[[M], dict[str, Any]]) -> dict[str, Any]:
    """Rows have `created_at`, and a primary key that clients know. Raises InvalidRequest for a cursor that is none."""
    limit, order, after = _limit(request), request.GET.get("order", "desc"), request.GET.get("after")
    if order not in ("asc", "desc"):
        raise invalid("order: is asc or desc.", "order")

    def read() -> list[M]:
        sign, compare = ("", "gt") if order == "asc" else ("-", "lt")
        ordered = rows.order_by(f"{sign}created_at", f"{sign}pk")
        if after is not None:
            at = rows.filter(pk=after[:100]).values_list("created_at", flat=True).first()
            if at is None:
                raise invalid("after: is the id of none of these.", "after")
            later = Q(**{f"created_at__{compare}": at}) | Q(**{"created_at": at, f"pk__{compare}": after})
            ordered = ordered.filter(later)
        return list(ordered[: limit + 1])

    found = await in_database(read)
    data = [body(row) for row in found[:limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(found) > limit,
    }


def _limit(request: HttpRequest) -> int:
    given = request.GET.get("limit", "20")
    if not (given.isascii() and given.isdigit() and 1 <= int(given[:6]) <= MAX_LIMIT):
        raise invalid(f"limit: is 1 to {MAX_LIMIT}.", "limit")
    return int(given)
