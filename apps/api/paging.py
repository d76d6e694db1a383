"""Lists by a cursor: `after` an id, `limit` of them, newest first unless `order` is asc."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from django.db.models import Model, Q, QuerySet
from django.http import HttpRequest

from apps.api.strict import invalid, unsupported
from apps.core.database import in_database

MAX_LIMIT = 100
M = TypeVar("M", bound=Model)


@dataclass(frozen=True, slots=True)
class Cursor:
    """What a client asks a list for."""

    limit: int
    ascending: bool
    after: str | None

    @classmethod
    def of(cls, query: Mapping[str, str], also: Sequence[str] = ()) -> Cursor:
        """`also` names what else the list can be asked for. Raises InvalidRequest."""
        if unknown := set(query) - {"limit", "order", "after", *also}:
            raise unsupported(min(unknown))
        limit, order = query.get("limit", "20"), query.get("order", "desc")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= MAX_LIMIT):
            raise invalid(f"limit: is from 1 to {MAX_LIMIT}.", "limit")
        if order not in ("asc", "desc"):
            raise invalid("order: is asc or desc.", "order")
        if "\0" in query.get("after", ""):
            raise _no_such_cursor()
        return cls(int(limit), order == "asc", query.get("after") or None)

    def page(self, data: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The body, of one item more than the limit when there is one."""
        shown = list(data[: self.limit])
        return {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(data) > self.limit,
        }


def page(items: Sequence[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """A page of `items`, which are given oldest first. Raises InvalidRequest."""
    cursor = Cursor.of(query)
    rows = list(items) if cursor.ascending else list(reversed(items))
    start = 0
    if cursor.after is not None:
        place = next((number for number, row in enumerate(rows) if row["id"] == cursor.after), None)
        if place is None:
            raise _no_such_cursor()
        start = place + 1
    return cursor.page(rows[start : start + cursor.limit + 1])


async def page_of(
    request: HttpRequest, rows: QuerySet[M], body: Callable[[M], dict[str, Any]], also: Sequence[str] = ()
) -> dict[str, Any]:
    """Of rows that have `created_at`, and a primary key that clients know. Raises InvalidRequest."""
    cursor = Cursor.of(request.GET, also)
    found = await in_database(lambda: _read(cursor, rows))
    return cursor.page([body(row) for row in found])


def _read(cursor: Cursor, rows: QuerySet[M]) -> list[M]:
    sign, compare = ("", "gt") if cursor.ascending else ("-", "lt")
    ordered = rows.order_by(f"{sign}created_at", f"{sign}pk")
    if cursor.after is not None:
        at = rows.filter(pk=cursor.after[:100]).values_list("created_at", flat=True).first()
        if at is None:
            raise _no_such_cursor()
        ordered = ordered.filter(Q(**{f"created_at__{compare}": at}) | Q(**{"created_at": at, f"pk__{compare}": cursor.after}))
    return list(ordered[: cursor.limit + 1])


def _no_such_cursor() -> Exception:
    return invalid("after: is the id of one of the list's.", "after")
