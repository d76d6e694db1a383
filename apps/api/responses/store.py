"""Stored responses: kept for 30 days, and known to their organization alone."""

from __future__ import annotations

import json

from django.db import DatabaseError
from django.utils import timezone

from apps.api.models import StoredResponse
from apps.api.responses.items import Body, response_of
from apps.core.database import in_database
from apps.core.errors import NotFound, Unavailable

PURGED_AT_ONCE = 1_000


async def save(org_id: str, response: Body, items: list[Body]) -> None:
    """Raises Unavailable: a client must not be told of a response that it could not go on from."""
    row = StoredResponse(id=response["id"], organization_id=int(org_id), input=json.dumps(items), body=json.dumps(response))
    try:
        await in_database(lambda: row.save(force_insert=True))
    except DatabaseError:
        raise Unavailable(
            "The response could not be stored. Try again shortly.", code="dependency_unavailable", retry_after_seconds=2
        ) from None


async def response(org_id: str, response_id: str) -> Body:
    """Raises NotFound."""
    body: Body = json.loads((await _read(org_id, response_id)).body)
    return body


async def find(org_id: str, response_id: str) -> Body | None:
    """The response, if it is stored by now."""
    row = await _find(org_id, response_id)
    return None if row is None else json.loads(row.body)


async def items(org_id: str, response_id: str) -> list[Body]:
    """What the response answered. Raises NotFound."""
    found: list[Body] = json.loads((await _read(org_id, response_id)).input)
    return found


async def conversation(org_id: str, response_id: str) -> list[Body]:
    """What the response answered, and its answer. Raises NotFound with the code previous_response_not_found."""
    row = await _find(org_id, response_id)
    if row is None:
        raise previous_not_found(response_id)
    return [*json.loads(row.input), *json.loads(row.body)["output"]]


def previous_not_found(response_id: str) -> NotFound:
    return NotFound(
        f"The response {response_id[:100]!r} does not exist, or is not stored.",
        code="previous_response_not_found",
        param="previous_response_id",
    )


async def item(org_id: str, item_id: str) -> Body | None:
    """An item of a stored response, by the id that it was given here."""
    try:
        known = await conversation(org_id, response_of(item_id))
    except NotFound:
        return None
    return next((found for found in known if found["id"] == item_id), None)


async def delete(org_id: str, response_id: str) -> None:
    """Raises NotFound. Later responses keep their own copy of the conversation."""
    row = await _read(org_id, response_id)
    await in_database(row.delete)


async def _read(org_id: str, response_id: str) -> StoredResponse:
    found = await _find(org_id, response_id)
    if found is None:
        raise NotFound(f"The response {response_id[:100]!r} does not exist, or is not stored.")
    return found


async def _find(org_id: str, response_id: str) -> StoredResponse | None:
    rows = StoredResponse.objects.filter(pk=response_id, organization_id=int(org_id), expires_at__gt=timezone.now())
    return await in_database(rows.first)


def purge() -> int:
    """Deletes what has lapsed; how many rows that were."""
    lapsed = StoredResponse.objects.filter(expires_at__lte=timezone.now()).values_list("pk", flat=True)
    total = 0
    while keys := list(lapsed[:PURGED_AT_ONCE]):
        total += StoredResponse.objects.filter(pk__in=keys).delete()[0]
    return total
