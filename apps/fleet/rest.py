"""The management API of the fleet: for operators, under /api/."""

from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema
from rest_framework import serializers, viewsets
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from apps.core.rest import Audited, ById, StrictSerializer
from apps.fleet.models import Gpu, Host, Mode, Model, ModeSwitch, ModeSwitchStep, Placement, Worker
from apps.fleet.modes.services import SwitchPlan, switch_plan, switch_request
from apps.fleet.placing import Placing


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
        fields = ("id", "name", "address", "added_at", "gpus", "is_managed", "ssh_user", "ssh_port", "ssh_host_key",
                  "may_switch_itself", "mode", "epoch", "is_cordoned")  # fmt: skip
        read_only_fields = ("added_at", "mode", "epoch", "is_cordoned")


class StepSerializer(serializers.ModelSerializer[ModeSwitchStep]):
    class Meta:
        model = ModeSwitchStep
        fields = ("step", "started_at", "ended_at", "succeeded", "detail")


class SwitchSerializer(serializers.ModelSerializer[ModeSwitch]):
    host = serializers.CharField(source="host.name", read_only=True)
    steps = StepSerializer(many=True, read_only=True)

    class Meta:
        model = ModeSwitch
        fields = (
            "id",
            "host",
            "from_mode",
            "to_mode",
            "epoch",
            "state",
            "reason",
            "requested_by",
            "created_at",
            "ended_at",
            "steps",
        )


class SwitchWish(serializers.Serializer[Any]):
    mode = serializers.ChoiceField(choices=Mode.choices)
    dry_run = serializers.BooleanField(default=False)


class SwitchPlanSerializer(serializers.Serializer[SwitchPlan]):
    host = serializers.CharField()
    from_mode = serializers.CharField()
    to_mode = serializers.CharField()
    stops = serializers.ListField(child=serializers.CharField())
    starts = serializers.ListField(child=serializers.CharField())
    unloads = serializers.ListField(child=serializers.CharField())
    loads = serializers.ListField(child=serializers.CharField())
    seconds = serializers.FloatField(allow_null=True)


class WorkerSerializer(StrictSerializer):
    host = serializers.SlugRelatedField(slug_field="name", queryset=Host.objects.all())

    class Meta:
        model = Worker
        fields = ("id", "name", "host", "address", "mode", "is_enabled", "is_draining", "status", "seen_at")


class PlacementSerializer(StrictSerializer):
    model = serializers.SlugRelatedField(slug_field="name", queryset=Model.objects.all())
    worker = serializers.SlugRelatedField(slug_field="name", queryset=Worker.objects.all())

    class Meta:
        model = Placement
        fields = ("id", "model", "worker", "is_pinned", "state")


class ModelViewSet(Audited):
    """The catalogue."""

    queryset = Model.objects.all()
    serializer_class = ModelSerializer


class HostViewSet(Audited):
    """Machines with workers."""

    queryset = Host.objects.prefetch_related("gpus")
    serializer_class = HostSerializer

    @extend_schema(request=SwitchWish, responses={200: SwitchPlanSerializer, 202: SwitchSerializer})
    @action(detail=True, methods=["post"], url_path="switch-mode")
    def switch_mode(self, request: Request, pk: str | None = None) -> Response:
        """Has a managed host change its mode, which `/api/switches/` then tells about; a dry run says what that would do."""
        wish = SwitchWish(data=request.data)
        wish.is_valid(raise_exception=True)
        host, mode = self.get_object(), wish.validated_data["mode"]
        if wish.validated_data["dry_run"]:
            return Response(SwitchPlanSerializer(switch_plan(host=host, mode=mode)).data)
        switch = switch_request(host=host, mode=mode, actor=str(request.user))
        return Response(SwitchSerializer(switch).data, status=202)


class SwitchViewSet(viewsets.ReadOnlyModelViewSet[ModeSwitch]):
    """Mode switches and their steps."""

    queryset = ModeSwitch.objects.select_related("host").prefetch_related("steps")
    serializer_class = SwitchSerializer
    pagination_class = ById


class WorkerViewSet(Placing, Audited):
    """Daemons. Added and removed while serving."""

    queryset = Worker.objects.select_related("host")
    serializer_class = WorkerSerializer


class PlacementViewSet(Audited):
    """Which worker should hold which model."""

    queryset = Placement.objects.select_related("model", "worker")
    serializer_class = PlacementSerializer
