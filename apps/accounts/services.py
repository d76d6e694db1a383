"""Everything that changes accounts. Each function is one transaction and leaves one audit row."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from apps.accounts.auth import digest
from apps.accounts.models import SCOPES, ApiKey, AuditLog, LedgerCursor, Limits, Organization, Plan, UsageDay, User
from apps.core.errors import InvalidRequest
from apps.core.types import Priority, QuotaLimits

PREFIX_LENGTH = 10
DEFAULT_PLAN = "standard"


def audit(actor: str, action: str, target: object) -> None:
    """Records who changed what."""
    AuditLog.objects.create(actor=actor, action=action, target=str(target)[:200])


@transaction.atomic
def organization_create(*, name: str, actor: str, plan: Plan | None = None) -> Organization:
    """A new organization on `plan`, or on the default one. Raises ValidationError for a bad or taken name."""
    plan = plan or Plan.objects.get_or_create(name=DEFAULT_PLAN)[0]
    organization = Organization(name=name, plan=plan)
    organization.full_clean()
    organization.save()
    audit(actor, "organization created", organization)
    return organization


@transaction.atomic
def organization_limit(*, organization: Organization, plan: Plan, limits: QuotaLimits, actor: str) -> None:
    """Gives it another plan, and limits of its own; None is the plan's. The audit row says what was and is. Raises
    ValidationError."""
    row = Organization.objects.select_for_update().select_related("plan").get(pk=organization.pk)
    before = {"plan": row.plan, **{name: getattr(row, name) for name in Limits.FIELDS}}
    after = {"plan": plan, **{name: getattr(limits, name) for name in Limits.FIELDS}}
    changed = [f"{name} {_word(before[name])} -> {_word(after[name])}" for name in after if before[name] != after[name]]
    if not changed:
        return
    for name, value in after.items():
        setattr(row, name, value)
    row.full_clean()
    row.save()
    audit(actor, "organization limited", f"{row}: {', '.join(changed)}")


def _word(value: object) -> str:
    return "plan's" if value is None else str(value)


@transaction.atomic
def api_key_create(
    *,
    organization: Organization,
    name: str,
    actor: str,
    scopes: Sequence[str] = ("inference",),
    priority: Priority = Priority.DEFAULT,
    expires_in: timedelta | None = None,
    secret: str | None = None,
) -> tuple[ApiKey, str]:
    """A new key and its secret, which is shown this once and never stored. Raises InvalidRequest for unknown scopes."""
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise InvalidRequest(f"Scopes are {', '.join(SCOPES)}; not {', '.join(unknown) or 'none'}.", param="scopes")
    secret = secret or f"sk-{secrets.token_urlsafe(32)}"
    key = ApiKey.objects.create(
        organization=organization,
        name=name,
        prefix=secret[:PREFIX_LENGTH],
        digest=digest(secret),
        scopes=sorted(scopes),
        priority=priority,
        expires_at=timezone.now() + expires_in if expires_in else None,
    )
    audit(actor, "key created", f"{organization}/{key}")
    return key, secret


@transaction.atomic
def api_key_revoke(*, key: ApiKey, actor: str) -> None:
    """Ends a key for good; every gateway refuses it within 5 s. Revoking twice changes nothing."""
    if ApiKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=timezone.now()):
        audit(actor, "key revoked", f"{key.organization}/{key}")


@transaction.atomic
def usage_record(entries: Sequence[tuple[str, Any]]) -> None:
    """Counts ledger entries, (stream id, entry) in the stream's order, into UsageDay. Each counts once, ever."""
    cursor, _ = LedgerCursor.objects.select_for_update().get_or_create(stream="ledger")
    known = (cursor.milliseconds, cursor.sequence)
    fresh = [(position, entry) for stream_id, entry in entries if (position := _position(stream_id)) > known]
    if not fresh:
        return
    organizations = set(Organization.objects.values_list("pk", flat=True))
    totals: dict[tuple[int, str, str, Any], Counter[str]] = {}
    for _, entry in fresh:
        if entry.outcome == "refused" or int(entry.org_id) not in organizations:
            continue
        day = datetime.fromtimestamp(entry.finished_ms / 1000, UTC).date()
        counter = totals.setdefault((int(entry.org_id), entry.key_id, entry.model, day), Counter())
        counter.update(requests=1, prompt=entry.prompt_tokens, completion=entry.completion_tokens)
    for (org, key, model, day), counter in totals.items():
        row, _ = UsageDay.objects.get_or_create(organization_id=org, key_id=key, model=model, day=day)
        UsageDay.objects.filter(pk=row.pk).update(
            requests=F("requests") + counter["requests"],
            prompt_tokens=F("prompt_tokens") + counter["prompt"],
            completion_tokens=F("completion_tokens") + counter["completion"],
        )
    cursor.milliseconds, cursor.sequence = max(position for position, _ in fresh)
    cursor.save()


def _position(stream_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = stream_id.partition("-")
    return int(milliseconds), int(sequence)


@transaction.atomic
def bootstrap(*, admin_password: str, api_key: str, organization_name: str = "demo") -> None:
    """What a new installation starts with: an organization, an operator `admin`, and a key. Safe to repeat."""
    organization = Organization.objects.filter(name=organization_name).first()
    organization = organization or organization_create(name=organization_name, actor="bootstrap")
    admin, created = User.objects.get_or_create(
        username="admin", defaults={"is_staff": True, "is_superuser": True, "organization": organization}
    )
    if created or not admin.check_password(admin_password):
        admin.set_password(admin_password)
        admin.save()
    if not ApiKey.objects.filter(digest=digest(api_key)).exists():
        api_key_create(organization=organization, name="bootstrap", actor="bootstrap", secret=api_key,
                       scopes=("inference", "admin", "metrics"))  # fmt: skip
