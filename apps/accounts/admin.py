"""The operators' view of accounts."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group
from django.db.models import Count, F, Q, QuerySet, Sum
from django.http import HttpRequest
from django.utils import timezone
from unfold.admin import ModelAdmin
from unfold.decorators import action, display
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from apps.accounts.models import ApiKey, AuditLog, Limits, Organization, Plan, UsageDay, User
from apps.accounts.services import api_key_create, api_key_revoke, audit
from apps.core.admin import Audited
from apps.core.types import Priority

admin.site.unregister(Group)


@admin.register(Plan)
class PlanAdmin(Audited):
    list_display = ("name", "weight", "max_priority", *Limits.FIELDS)
    list_editable = Limits.FIELDS
    search_fields = ("name",)


@admin.register(Organization)
class OrganizationAdmin(Audited):
    list_display = ("name", "plan", "is_active", "active_keys", "tokens_this_month", *Limits.FIELDS)
    list_filter = ("is_active", "plan")
    list_editable = Limits.FIELDS
    list_select_related = ("plan",)
    search_fields = ("name",)
    fieldsets = (
        (None, {"fields": ("name", "plan", "is_active")}),
        ("Limits", {"fields": Limits.FIELDS, "description": "Leave a limit empty to take the plan's."}),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Organization]:
        return super().get_queryset(request).annotate(n_keys=Count("keys", filter=Q(keys__revoked_at=None)))

    @display(description="active keys", ordering="n_keys")
    def active_keys(self, organization: Any) -> int:
        return organization.n_keys

    @display(description="tokens this month")
    def tokens_this_month(self, organization: Organization) -> str:
        today = timezone.now().date()
        rows = organization.usage.filter(day__year=today.year, day__month=today.month)
        used = rows.aggregate(total=Sum(F("prompt_tokens") + F("completion_tokens"), default=0))["total"]
        limit = organization.limits.tokens_per_month
        return f"{used:,}" if limit is None else f"{used:,} of {limit:,} ({used / max(1, limit):.0%})"


@admin.register(User)
class UserAdmin(DjangoUserAdmin, ModelAdmin):  # type: ignore[type-arg]
    form, add_form, change_password_form = UserChangeForm, UserCreationForm, AdminPasswordChangeForm
    list_display = ("username", "organization", "email", "is_staff", "is_active", "last_login")
    list_filter = ("is_staff", "is_active", "organization")
    list_select_related = ("organization",)
    fieldsets = (
        (None, {"fields": ("username", "password", "email", "organization")}),
        ("Access", {"fields": ("is_active", "is_staff", "is_superuser")}),
    )
    add_fieldsets = ((None, {"fields": ("username", "organization", "password1", "password2")}),)
    filter_horizontal = ()


@admin.register(ApiKey)
class ApiKeyAdmin(ModelAdmin):
    list_display = (
        "name",
        "prefix",
        "organization",
        "scopes",
        "priority",
        "state_label",
        "last_used_at",
        "expires_at",
        "created_at",
    )
    list_filter = ("organization", "revoked_at")
    list_select_related = ("organization",)
    search_fields = ("name", "prefix", "organization__name")
    fields = ("organization", "name", "scopes", "priority", "expires_at")
    actions = ("revoke_selected",)

    @display(description="state", label={"active": "success", "expired": "warning", "revoked": "danger"})
    def state_label(self, key: ApiKey) -> str:
        return key.state

    @action(description="Revoke the selected keys")
    def revoke_selected(self, request: HttpRequest, keys: QuerySet[ApiKey]) -> None:
        for key in keys.select_related("organization"):
            api_key_revoke(key=key, actor=str(request.user))
        self.message_user(request, "Revoked. Every gateway refuses them within 5 s.", messages.SUCCESS)

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        return {"scopes": ["inference"]}

    def save_model(self, request: HttpRequest, obj: ApiKey, form: Any, change: bool) -> None:
        if change:
            super().save_model(request, obj, form, change)
            audit(str(request.user), "key changed", obj)
            return
        lifetime = obj.expires_at - timezone.now() if obj.expires_at else None
        made, secret = api_key_create(
            organization=obj.organization,
            name=obj.name,
            actor=str(request.user),
            scopes=obj.scopes,
            priority=Priority(obj.priority),
            expires_in=lifetime,
        )
        obj.pk = made.pk
        self.message_user(request, f"Copy the key now, it is shown this once: {secret}", messages.WARNING)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False  # Keys are revoked, so that usage keeps its owner.


class ReadOnly(ModelAdmin):
    """A record: looked at, never edited."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    has_change_permission = has_delete_permission = has_add_permission


@admin.register(UsageDay)
class UsageDayAdmin(ReadOnly):
    list_display = ("day", "organization", "model", "key_id", "requests", "prompt_tokens", "completion_tokens")
    list_filter = ("organization", "model")
    date_hierarchy = "day"


@admin.register(AuditLog)
class AuditLogAdmin(ReadOnly):
    list_display = ("at", "actor", "action", "target")
    search_fields = ("actor", "action", "target")
    date_hierarchy = "at"
