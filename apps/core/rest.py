"""What every part of the management API shares."""

from __future__ import annotations

from typing import Any

from rest_framework import serializers, viewsets
from rest_framework.pagination import CursorPagination

from apps.core.audit import audit


class StrictSerializer(serializers.ModelSerializer[Any]):
    """A serializer that refuses fields it does not know, by name."""

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = set(data) - {name for name, field in self.fields.items() if not field.read_only}
            if unknown:
                raise serializers.ValidationError(dict.fromkeys(unknown, "This field is unknown or read-only."))
        return super().to_internal_value(data)


class ById(CursorPagination):
    """Newest first, by a cursor: no page shifts while rows are added."""

    ordering = "-id"


class Audited(viewsets.ModelViewSet[Any]):
    """Create, read, update, delete, each change with an audit row."""

    pagination_class = ById

    def perform_create(self, serializer: Any) -> None:
        super().perform_create(serializer)
        self._audit("created", serializer.instance)

    def perform_update(self, serializer: Any) -> None:
        super().perform_update(serializer)
        self._audit("changed", serializer.instance)

    def perform_destroy(self, instance: Any) -> None:
        self._audit("deleted", instance)
        super().perform_destroy(instance)

    def _audit(self, what: str, instance: Any) -> None:
        audit(str(self.request.user), f"{type(instance).__name__.lower()} {what}", instance)
