"""Quota as code: plans, and organizations with their own limits."""

from __future__ import annotations

from typing import Any, Literal

from django.core.exceptions import ValidationError
from django.db import models as django_models
from pydantic import Field

from apps.accounts.models import Limits, Organization, Plan
from apps.accounts.services import audit
from apps.core.declared import Entry, Section
from apps.core.errors import InvalidRequest
from apps.core.types import Priority

ACTOR = "declaration"


class LimitsEntry(Entry):
    """What is left out is no limit of its own."""

    requests_per_minute: int | None = Field(None, ge=0, le=2**31 - 1)
    tokens_per_minute: int | None = Field(None, ge=0, le=2**31 - 1)
    concurrent_requests: int | None = Field(None, ge=0, le=2**31 - 1)
    tokens_per_day: int | None = Field(None, ge=0, le=2**63 - 1)
    tokens_per_month: int | None = Field(None, ge=0, le=2**63 - 1)


class PlanEntry(LimitsEntry):
    name: str
    weight: float = Field(1.0, ge=0.01, le=1000)
    max_priority: Literal["flex", "default", "priority"] = "default"


class OrganizationEntry(LimitsEntry):
    name: str
    plan: str
    active: bool = True


def _limits(row: Limits) -> dict[str, Any]:
    return {name: getattr(row, name) for name in Limits.FIELDS}


def _save(row: django_models.Model, entry: LimitsEntry) -> None:
    """Raises InvalidRequest with what is wrong with which field."""
    for name in Limits.FIELDS:
        setattr(row, name, getattr(entry, name))
    try:
        row.full_clean()
    except ValidationError as error:
        text = "; ".join(f"{name}: {' '.join(messages)}" for name, messages in error.message_dict.items())
        raise InvalidRequest(text) from None
    row.save()
    audit(ACTOR, f"{type(row).__name__.lower()} set", row)


def _write_plan(entry: PlanEntry) -> None:
    plan = Plan.objects.filter(name=entry.name).first() or Plan(name=entry.name)
    plan.weight, plan.max_priority = entry.weight, Priority[entry.max_priority.upper()]
    _save(plan, entry)


def _write_organization(entry: OrganizationEntry) -> None:
    plan = Plan.objects.filter(name=entry.plan).first()
    if plan is None:
        raise InvalidRequest(f"there is no plan {entry.plan[:100]}")
    organization = Organization.objects.filter(name=entry.name).first() or Organization(name=entry.name)
    organization.plan, organization.is_active = plan, entry.active
    _save(organization, entry)


def _read_plans() -> list[PlanEntry]:
    return [
        PlanEntry(name=p.name, weight=p.weight, max_priority=Priority(p.max_priority).name.lower(), **_limits(p))  # type: ignore[arg-type]
        for p in Plan.objects.order_by("name")
    ]


def _read_organizations() -> list[OrganizationEntry]:
    rows = Organization.objects.select_related("plan").order_by("name")
    return [OrganizationEntry(name=o.name, plan=o.plan.name, active=o.is_active, **_limits(o)) for o in rows]


SECTIONS = (
    Section("plans", PlanEntry, _read_plans, _write_plan),
    Section("organizations", OrganizationEntry, _read_organizations, _write_organization),
)
