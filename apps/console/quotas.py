"""Quotas in the admin: each organization's use beside its limits, which are changed in place; and what it used by day."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asgiref.sync import async_to_sync
from django import forms
from django.contrib import admin, messages
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.http import require_GET, require_http_methods
from redis.asyncio import Redis

from apps.accounts import quota
from apps.accounts.models import Limits, Organization
from apps.accounts.selectors import usage_by_day
from apps.accounts.services import organization_limit
from apps.console.ask import bars, with_redis
from apps.core.types import Principal, Priority, QuotaLimits

PAGE = 25
DAYS = 30


class LimitsForm(forms.ModelForm):  # type: ignore[type-arg]
    """A plan, and limits of its own; where one is empty, its placeholder is what the plan says."""

    class Meta:
        model = Organization
        fields = ("plan", *Limits.FIELDS)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **{"auto_id": f"id_{named['instance'].pk}_%s", **named})
        for name in Limits.FIELDS:
            of_plan = getattr(self.instance.plan, name)
            self.fields[name].widget.attrs["placeholder"] = "no limit" if of_plan is None else f"{of_plan} (plan)"


@dataclass(frozen=True)
class Row:
    organization: Organization
    bars: list[dict[str, Any]]
    form: LimitsForm

    @property
    def highest_class(self) -> str:
        return Priority(self.organization.plan.max_priority).name.lower()


@require_GET
def quotas(request: HttpRequest) -> HttpResponse:
    """Searched with `q`, by the name of the organization or of its plan."""
    text = request.GET.get("q", "").strip()[:100]
    found = Organization.objects.select_related("plan").order_by("name")
    if text:
        found = found.filter(name__icontains=text) | found.filter(plan__name__icontains=text)
    page = Paginator(found, PAGE).get_page(request.GET.get("page"))
    context = {"title": "Quotas", "rows": _rows(list(page)), "page": page, "q": text, "fields": Limits.FIELDS}
    return render(request, "admin/quotas.html", {**admin.site.each_context(request), **context})


@require_http_methods(["GET", "POST"])
def edit(request: HttpRequest, organization_id: int) -> HttpResponse:
    """One organization; a change leads back to where it was made."""
    organization = get_object_or_404(Organization.objects.select_related("plan"), pk=organization_id)
    form = LimitsForm(request.POST or None, instance=organization)
    if request.method == "POST" and form.is_valid():
        _save(form, str(request.user))
        messages.success(request, f"{organization}: saved. Gateways follow within 5 s.")
        return redirect(_back(request))
    fresh = Organization.objects.select_related("plan").get(pk=organization_id)
    days = usage_by_day(fresh, DAYS)
    most = max(1, *(day.tokens for day in days))
    context = {
        "title": f"Quota of {fresh}",
        "row": Row(fresh, _rows([fresh])[0].bars, form),
        "days": [(day, round(100 * day.tokens / most, 1)) for day in days],
        "most": most,
        "total": sum(day.tokens for day in days),
    }
    return render(
        request, "admin/quota.html", {**admin.site.each_context(request), **context}, status=400 if form.errors else 200
    )


def _save(form: LimitsForm, actor: str) -> None:
    chosen = form.cleaned_data
    limits = QuotaLimits(**{name: chosen[name] for name in Limits.FIELDS})
    organization_limit(organization=form.instance, plan=chosen["plan"], limits=limits, actor=actor)


def _back(request: HttpRequest) -> str:
    wanted = request.POST.get("next", "")
    return wanted if url_has_allowed_host_and_scheme(wanted, allowed_hosts=None) else reverse("quotas")


def _rows(organizations: Sequence[Organization]) -> list[Row]:
    async def ask(redis: Redis) -> list[quota.QuotaUse]:
        return await asyncio.gather(*(quota.use(redis, _principal(each)) for each in organizations))

    uses = async_to_sync(with_redis)(ask)
    return [Row(each, bars(use), LimitsForm(instance=each)) for each, use in zip(organizations, uses, strict=True)]


def _principal(organization: Organization) -> Principal:
    return Principal(str(organization.pk), "session", frozenset(), organization.limits)
