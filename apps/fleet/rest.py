"""The management API of the fleet: for operators, under /api/."""

from __future__ import annotations

from typing import Any

from rest_framework import serializers, viewsets

from apps.core.rest import ById, StrictSerializer
from apps.fleet.models import Gpu, Host, Model, Placement, Worker


class ModelSerializer(StrictSerializer):
    class Meta:
        model = Model
        fields = "__all__"


class GpuSerializer(StrictSerializer):
    class Meta:
        model = Gpu
        fields = ("device", "name", "memory_bytes")


class HostSerializer(StrictSerializer):
    gpus = GpuSerializer(many=True, read_only=True)

    class Meta:
        model = Host
        fields = ("id", "name", "address", "added_at", "gpus")


class WorkerSerializer(StrictSerializer):
    host = serializers.SlugRelatedField(slug_field="name", queryset=Host.objects.all())

    class Meta:
        model = Worker
        fields = ("id", "name", "host", "address", "is_enabled", "status", "seen_at")


class PlacementSerializer(StrictSerializer):
    model = serializers.SlugRelatedField(slug_field="name", queryset=Model.objects.all())
    worker = serializers.SlugRelatedField(slug_field="name", queryset=Worker.objects.all())

    class Meta:
        model = Placement
        fields = ("id", "model", "worker", "is_pinned", "state")


class Managed(viewsets.ModelViewSet[Any]):
    pagination_class = ById


class ModelViewSet(Managed):
    """The catalogue."""

    queryset = Model.objects.all()
    serializer_class = ModelSerializer


class HostViewSet(Managed):
    """Machines with workers."""

    queryset = Host.objects.prefetch_related("gpus")
    serializer_class = HostSerializer


class WorkerViewSet(Managed):
    """Daemons. Added and removed while serving."""

    queryset = Worker.objects.select_related("host")
    serializer_class = WorkerSerializer


class PlacementViewSet(Managed):
    """Which worker should hold which model."""

    queryset = Placement.objects.select_related("model", "worker")
    serializer_class = PlacementSerializer
