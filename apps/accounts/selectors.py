"""What may be read of accounts by the rest of the site."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from django.db.models import F, Sum

from apps.accounts.models import ApiKey, Organization, UsageDay
from apps.core.database import in_database
from apps.core.types import Principal


@dataclass(frozen=True, slots=True)
class Credential:
    """What a principal showed to be let in. Times are seconds since the epoch; a console session has none, nor a prefix."""

    name: str
    organization: str
    prefix: str = ""
    created_at: int | None = None
    expires_at: int | None = None


async def credential(principal: Principal) -> Credential:
    """The principal's key, or its session."""

    def read() -> Credential:
        if principal.key_id == "session":
            return Credential("console session", Organization.objects.get(pk=principal.org_id).name)
        key = ApiKey.objects.select_related("organization").get(pk=principal.key_id)
        expires = None if key.expires_at is None else int(key.expires_at.timestamp())
        return Credential(key.name, key.organization.name, key.prefix, int(key.created_at.timestamp()), expires)

    return await in_database(read)


@dataclass(frozen=True, slots=True)
class DayUse:
    """What an organization used on one UTC day."""

    day: date
    requests: int
    tokens: int


def usage_by_day(organization: Organization, days: int) -> list[DayUse]:
    """The last `days`, the oldest first; also those without use."""
    today = datetime.now(UTC).date()
    rows = (
        UsageDay.objects.filter(organization=organization, day__gt=today - timedelta(days=days)).values("day").order_by("day")
    )
    used = {
        row["day"]: DayUse(row["day"], row["n"], row["tokens"])
        for row in rows.annotate(n=Sum("requests"), tokens=Sum(F("prompt_tokens") + F("completion_tokens")))
    }
    all_days = (today - timedelta(days=back) for back in reversed(range(days)))
    return [used.get(day, DayUse(day, 0, 0)) for day in all_days]
