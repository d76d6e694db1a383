"""The operators' view of durable jobs."""

from __future__ import annotations

from django.contrib import admin
from unfold.admin import ModelAdmin
from unfold.decorators import display

from apps.jobs.models import Batch, Delivery, UploadedFile, Video, Webhook

_COLOURS = {"completed": "success", "failed": "danger", "cancelled": "warning", "expired": "warning", "in_progress": "info"}


class ReadOnly(ModelAdmin):
    """What clients own is looked at here, not changed."""

    def has_add_permission(self, request: object) -> bool:
        return False

    def has_change_permission(self, request: object, obj: object = None) -> bool:
        return False

    @display(description="state", label=_COLOURS)
    def state_label(self, job: Video | Batch) -> str:
        return job.state


@admin.register(Video)
class VideoAdmin(ReadOnly):
    list_display = ("id", "org_id", "model", "state_label", "progress", "attempt", "created_at", "ended_at", "error_code")
    list_filter = ("state", "model")
    search_fields = ("id", "org_id")


@admin.register(Batch)
class BatchAdmin(ReadOnly):
    list_display = ("id", "org_id", "endpoint", "state_label", "total", "attempt", "created_at", "ended_at", "error_code")
    list_filter = ("state", "endpoint")
    search_fields = ("id", "org_id")


@admin.register(UploadedFile)
class UploadedFileAdmin(ReadOnly):
    list_display = ("id", "org_id", "filename", "purpose", "bytes", "created_at", "expires_at")
    list_filter = ("purpose",)
    search_fields = ("id", "org_id", "filename")


@admin.register(Webhook)
class WebhookAdmin(ModelAdmin):
    list_display = ("org_id", "url", "is_enabled")


@admin.register(Delivery)
class DeliveryAdmin(ReadOnly):
    list_display = ("id", "org_id", "kind", "object_id", "attempts", "due_at", "delivered_at", "given_up")
    list_filter = ("kind", "given_up")
