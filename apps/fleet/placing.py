"""The management API of the placement board: what can be done to a worker, each with a dry run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asgiref.sync import async_to_sync
from django.conf import settings
from drf_spectacular.utils import extend_schema
from redis.exceptions import RedisError
from rest_framework import serializers, viewsets
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from apps.core.errors import Unavailable
from apps.core.redis import connect
from apps.core.types import WorkerSnapshot
from apps.fleet import preview, registry
from apps.fleet.models import Model, Worker
from apps.fleet.preview import Preview
from apps.fleet.services import model_unload, placement_move, placement_put, worker_drain


class DryRun(serializers.Serializer[Any]):
    dry_run = serializers.BooleanField(default=False, help_text="Say what would happen, and change nothing.")

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, dict) and (unknown := set(data) - set(self.fields)):
            raise serializers.ValidationError(dict.fromkeys(unknown, "This field is unknown."))
        return super().to_internal_value(data)


class ModelWish(DryRun):
    model = serializers.SlugRelatedField(slug_field="name", queryset=Model.objects.all())


class PlaceWish(ModelWish):
    pinned = serializers.BooleanField(default=False, help_text="Never evicted to make room.")


class MoveWish(ModelWish):
    to = serializers.SlugRelatedField(slug_field="name", queryset=Worker.objects.all(), help_text="The other worker.")


class DrainWish(DryRun):
    draining = serializers.BooleanField(default=True, help_text="False has it take requests again.")


class PreviewSerializer(serializers.Serializer[Preview]):
    possible = serializers.BooleanField(help_text="False where the wish is kept and does not come true for now.")
    says = serializers.ListField(child=serializers.CharField(), help_text="What happens, one sentence each.")
    loads = serializers.ListField(child=serializers.CharField())
    unloads = serializers.ListField(child=serializers.CharField())
    seconds = serializers.FloatField(allow_null=True, help_text="What loads like these took lately.")


_ANSWERS = {200: PreviewSerializer, 202: PreviewSerializer}


class Placing(viewsets.GenericViewSet[Worker]):
    """Answers 200 with what would happen, or 202 with what will: the controller acts within 2 s."""

    @extend_schema(request=PlaceWish, responses=_ANSWERS)
    @action(detail=True, methods=["post"])
    def place(self, request: Request, pk: str | None = None) -> Response:
        """Places a model on the worker, pins or unpins it there."""
        worker, wish = self._asked(PlaceWish)
        fields = {"model": wish["model"], "worker": worker, "is_pinned": wish["pinned"]}
        return self._answer(wish, lambda alive: preview.put_preview(alive, **fields),
                            lambda actor: placement_put(**fields, actor=actor))  # fmt: skip

    @extend_schema(request=MoveWish, responses=_ANSWERS)
    @action(detail=True, methods=["post"])
    def move(self, request: Request, pk: str | None = None) -> Response:
        """Moves a model from this worker to another, which serves it before it leaves here."""
        worker, wish = self._asked(MoveWish)
        fields = {"model": wish["model"], "source": worker, "target": wish["to"]}
        return self._answer(wish, lambda alive: preview.move_preview(alive, **fields),
                            lambda actor: placement_move(**fields, actor=actor))  # fmt: skip

    @extend_schema(request=ModelWish, responses=_ANSWERS)
    @action(detail=True, methods=["post"])
    def unload(self, request: Request, pk: str | None = None) -> Response:
        """Takes a model off the worker, whether it was placed there or loaded on demand."""
        worker, wish = self._asked(ModelWish)
        fields = {"model": wish["model"], "worker": worker}
        return self._answer(wish, lambda alive: preview.unload_preview(alive, **fields),
                            lambda actor: model_unload(**fields, actor=actor))  # fmt: skip

    @extend_schema(request=DrainWish, responses=_ANSWERS)
    @action(detail=True, methods=["post"])
    def drain(self, request: Request, pk: str | None = None) -> Response:
        """Has the worker be given nothing more while what it runs ends there, or opens it again."""
        worker, wish = self._asked(DrainWish)
        fields = {"worker": worker, "is_draining": wish["draining"]}
        return self._answer(wish, lambda alive: preview.drain_preview(alive, **fields),
                            lambda actor: worker_drain(**fields, actor=actor))  # fmt: skip

    def _asked(self, kind: type[DryRun]) -> tuple[Worker, dict[str, Any]]:
        wish = kind(data=self.request.data)
        wish.is_valid(raise_exception=True)
        return self.get_object(), wish.validated_data

    def _answer(
        self, wish: dict[str, Any], foresee: Callable[[list[WorkerSnapshot]], Preview], act: Callable[[str], object]
    ) -> Response:
        seen = foresee(async_to_sync(_alive)())
        if not wish["dry_run"]:
            act(str(self.request.user))
        return Response(PreviewSerializer(seen).data, status=200 if wish["dry_run"] else 202)


async def _alive() -> list[WorkerSnapshot]:
    try:
        async with connect(settings.ENV.redis_url) as redis:
            return await registry.workers(redis, timeout_ms=settings.ENV.worker_timeout_ms)
    except RedisError:
        raise Unavailable("The registry of workers cannot be reached.", code="dependency_unavailable") from None
