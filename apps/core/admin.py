"""Admin pages whose changes leave audit rows."""

from __future__ import annotations

from typing import Any

from django.db.models import Model, QuerySet
from django.http import HttpRequest
from unfold.admin import ModelAdmin

from apps.core.audit import audit


class Audited(ModelAdmin):
    """One row for each object that is saved or deleted, here or in an inline of this page."""

    def save_model(self, request: HttpRequest, obj: Model, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        _record(request, "changed" if change else "created", obj)

    def save_formset(self, request: HttpRequest, form: Any, formset: Any, change: bool) -> None:
        super().save_formset(request, form, formset, change)
        for obj in formset.new_objects:
            _record(request, "created", obj)
        for obj, _ in formset.changed_objects:
            _record(request, "changed", obj)
        for obj in formset.deleted_objects:
            _record(request, "deleted", obj)

    def delete_model(self, request: HttpRequest, obj: Model) -> None:
        super().delete_model(request, obj)
        _record(request, "deleted", obj)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        gone = list(queryset)
        super().delete_queryset(request, queryset)
        for obj in gone:
            _record(request, "deleted", obj)


def _record(request: HttpRequest, what: str, obj: Model) -> None:
    audit(str(request.user), f"{obj._meta.verbose_name} {what}", obj)
