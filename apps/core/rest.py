"""What every part of the management API shares."""

from __future__ import annotations

from typing import Any

from rest_framework import serializers
from rest_framework.pagination import CursorPagination


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
