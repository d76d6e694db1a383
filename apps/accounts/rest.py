"""The management API of accounts: for operators, under /api/."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from drf_spectacular.utils import extend_schema
from rest_framework import mixins, serializers, viewsets
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.models import SCOPES, ApiKey, Limits, Organization, Plan, UsageDay, User
from apps.accounts.services import api_key_create, api_key_revoke
from apps.core.rest import Audited, ById, StrictSerializer


class PlanSerializer(StrictSerializer):
    class Meta:
        model = Plan
        fields = ("id", "name", "weight", "max_priority", *Limits.FIELDS)


class OrganizationSerializer(StrictSerializer):
    plan = serializers.SlugRelatedField(slug_field="name", queryset=Plan.objects.all())

    class Meta:
        model = Organization
        fields = ("id", "name", "plan", "is_active", "created_at", *Limits.FIELDS)


class UserSerializer(StrictSerializer):
    organization = serializers.SlugRelatedField(slug_field="name", queryset=Organization.objects.all())
    password = serializers.CharField(write_only=True, min_length=8)

    class Meta:
        model = User
        fields = ("id", "username", "email", "organization", "is_active", "is_staff", "password", "last_login")
        read_only_fields = ("last_login",)

    def create(self, validated_data: dict[str, Any]) -> User:
        return User.objects.create_user(**validated_data)

    def update(self, instance: User, validated_data: dict[str, Any]) -> User:
        if password := validated_data.pop("password", None):
            instance.set_password(password)
        return super().update(instance, validated_data)  # type: ignore[no-any-return]


class KeySerializer(StrictSerializer):
    organization = serializers.SlugRelatedField(slug_field="name", queryset=Organization.objects.all())
    scopes = serializers.ListField(child=serializers.ChoiceField(SCOPES), default=["inference"], allow_empty=False)
    expires_in_days = serializers.IntegerField(write_only=True, required=False, min_value=1, max_value=3650)
    state = serializers.CharField(read_only=True)
    key = serializers.CharField(read_only=True, help_text="The secret: in the answer that creates the key, and never again.")

    class Meta:
        model = ApiKey
        fields = ("id", "organization", "name", "prefix", "scopes", "priority", "state", "created_at", "expires_at",
                  "revoked_at", "last_used_at", "expires_in_days", "key")  # fmt: skip
        read_only_fields = ("prefix", "created_at", "expires_at", "revoked_at", "last_used_at")

    def create(self, validated_data: dict[str, Any]) -> ApiKey:
        days = validated_data.pop("expires_in_days", None)
        actor = str(self.context["request"].user)
        made, secret = api_key_create(**validated_data, actor=actor, expires_in=timedelta(days=days) if days else None)
        made.key = secret  # type: ignore[attr-defined]
        return made


class UsageSerializer(serializers.ModelSerializer[UsageDay]):
    organization = serializers.CharField(source="organization.name", read_only=True)

    class Meta:
        model = UsageDay
        fields = ("organization", "key_id", "model", "day", "requests", "prompt_tokens", "completion_tokens")


class PlanViewSet(Audited):
    """Plans: limits and a share of the machines, given to many organizations."""

    queryset = Plan.objects.all()
    serializer_class = PlanSerializer


class OrganizationViewSet(Audited):
    """Organizations. A limit that is null comes from the plan."""

    queryset = Organization.objects.select_related("plan")
    serializer_class = OrganizationSerializer


class UserViewSet(Audited):
    """People who sign in to the console."""

    queryset = User.objects.select_related("organization")
    serializer_class = UserSerializer


class KeyViewSet(mixins.CreateModelMixin, mixins.ListModelMixin, mixins.RetrieveModelMixin, viewsets.GenericViewSet[ApiKey]):
    """API keys. The secret is in the answer that creates one, and nowhere else."""

    queryset = ApiKey.objects.select_related("organization")
    serializer_class = KeySerializer
    pagination_class = ById

    @extend_schema(request=None, responses=KeySerializer)
    @action(detail=True, methods=["post"])
    def revoke(self, request: Request, pk: str | None = None) -> Response:
        """Ends the key for good, everywhere within 5 s."""
        key = self.get_object()
        api_key_revoke(key=key, actor=str(request.user))
        key.refresh_from_db()
        return Response(self.get_serializer(key).data)


class UsageViewSet(mixins.ListModelMixin, viewsets.GenericViewSet[UsageDay]):
    """Tokens and requests per organization, key, model and UTC day."""

    queryset = UsageDay.objects.select_related("organization")
    serializer_class = UsageSerializer
    pagination_class = ById
