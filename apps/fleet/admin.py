"""The operators' view of the fleet."""

from __future__ import annotations

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.template.defaultfilters import filesizeformat
from unfold.admin import TabularInline
from unfold.decorators import display

from apps.core.admin import Audited
from apps.fleet.models import Gpu, Host, Model, Placement, Worker

_COLOURS = {"serving": "success", "ready": "success", "draining": "warning", "loading": "info", "wanted": "info"}


class PlacementInline(TabularInline):
    model = Placement
    fields = ("model", "is_pinned", "state")
    readonly_fields = ("state",)
    extra = 0


class GpuInline(TabularInline):
    model = Gpu
    extra = 0


@admin.register(Model)
class CatalogueAdmin(Audited):
    list_display = ("name", "modality", "size", "weights", "context_length", "engine", "is_enabled", "placed_on", "licence")
    list_filter = ("modality", "engine", "is_enabled")
    list_editable = ("engine", "is_enabled")
    search_fields = ("name", "title", "publisher")
    readonly_fields = ("measured_bytes",)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Model]:
        return super().get_queryset(request).prefetch_related("placements__worker")

    @display(description="parameters", ordering="parameters")
    def size(self, model: Model) -> str:
        return f"{model.parameters / 1e6:,.0f} M"

    @display(description="weights", ordering="weight_bytes")
    def weights(self, model: Model) -> str:
        return filesizeformat(model.weight_bytes)

    @display(description="placed on")
    def placed_on(self, model: Model) -> str:
        return ", ".join(f"{p.worker} ({p.state})" for p in model.placements.all()) or "nowhere"


@admin.register(Host)
class HostAdmin(Audited):
    list_display = ("name", "address", "devices", "added_at")
    search_fields = ("name", "address")
    inlines = (GpuInline,)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Host]:
        return super().get_queryset(request).prefetch_related("gpus")

    @display(description="devices")
    def devices(self, host: Host) -> str:
        return ", ".join(f"{g.device} ({filesizeformat(g.memory_bytes)})" for g in host.gpus.all()) or "none seen yet"


@admin.register(Gpu)
class GpuAdmin(Audited):
    list_display = ("host", "device", "name", "memory")
    list_filter = ("host",)

    @display(description="memory", ordering="memory_bytes")
    def memory(self, gpu: Gpu) -> str:
        return filesizeformat(gpu.memory_bytes)


@admin.register(Worker)
class WorkerAdmin(Audited):
    list_display = ("name", "host", "gpu", "address", "is_enabled", "status_label", "seen_at", "holds")
    list_filter = ("host", "is_enabled")
    list_editable = ("is_enabled",)
    list_select_related = ("host", "gpu")
    search_fields = ("name", "address")
    readonly_fields = ("status", "seen_at")
    inlines = (PlacementInline,)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Worker]:
        return super().get_queryset(request).prefetch_related("placements__model")

    @display(description="status", label=_COLOURS)
    def status_label(self, worker: Worker) -> str:
        return worker.status

    @display(description="models")
    def holds(self, worker: Worker) -> str:
        return ", ".join(f"{p.model} ({p.state})" for p in worker.placements.all()) or "nothing placed"


@admin.register(Placement)
class PlacementAdmin(Audited):
    list_display = ("model", "worker", "engine", "is_pinned", "state_label")
    list_filter = ("worker", "model", "model__engine")
    list_editable = ("is_pinned",)
    list_select_related = ("model", "worker")
    readonly_fields = ("state",)

    @display(description="engine", ordering="model__engine")
    def engine(self, placement: Placement) -> str:
        return placement.model.engine

    @display(description="state", label=_COLOURS)
    def state_label(self, placement: Placement) -> str:
        return placement.state
