"""Credentials to Principal, shared by HTTP, WebSocket and the management API."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from asgiref.sync import async_to_sync
from django.utils import timezone
from rest_framework import authentication
from rest_framework.request import Request

from apps.accounts.models import ApiKey, Organization, User
from apps.core.cache import TtlCache
from apps.core.database import in_database
from apps.core.errors import PermissionDenied, Unauthenticated
from apps.core.types import Principal, Priority

CACHE_SECONDS = 4.0  # A revoked key stops working this soon.
CACHE_ENTRIES = 10_000
USED_AT_SECONDS = 60
_KEY = re.compile(r"^sk-[A-Za-z0-9_-]{20,200}$")


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


async def authenticate(authorization: str | None) -> Principal:
    """The principal behind an Authorization header. Raises Unauthenticated, alike for unknown, revoked and expired."""
    if not authorization:
        raise Unauthenticated("Send your API key as `Authorization: Bearer sk-...`.", code="missing_api_key")
    scheme, _, secret = authorization.partition(" ")
    principal = await _lookup(secret.strip()) if scheme.lower() == "bearer" else None
    if principal is None:
        raise Unauthenticated("This API key is not valid: unknown, expired or revoked.")
    return principal


async def _lookup(secret: str) -> Principal | None:
    return await _cache.get(digest(secret)) if _KEY.match(secret) else None


async def _load(hashed: str) -> Principal | None:
    return await in_database(lambda: _read(hashed))


_cache: TtlCache[str, Principal | None] = TtlCache(_load, seconds=CACHE_SECONDS, entries=CACHE_ENTRIES)


def _read(hashed: str) -> Principal | None:
    """One indexed query, for good keys and bad ones alike."""
    key = ApiKey.objects.select_related("organization__plan").filter(digest=hashed).first()
    if key is None or key.state != "active" or not key.organization.is_active:
        return None
    now = timezone.now()
    if key.last_used_at is None or (now - key.last_used_at).total_seconds() > USED_AT_SECONDS:
        ApiKey.objects.filter(pk=key.pk).update(last_used_at=now)
    return _principal(key.organization, str(key.pk), frozenset(key.scopes), Priority(key.priority))


async def principal_of(org_id: str, key_id: str) -> Principal | None:
    """Who asked for work that outlives its connection; None once the key or the organization is not active any more."""

    def read() -> Principal | None:
        organization = Organization.objects.select_related("plan").filter(pk=org_id, is_active=True).first()
        if organization is None:
            return None
        if key_id == "session":
            return _principal(organization, key_id, frozenset({"inference"}))
        key = ApiKey.objects.filter(pk=key_id, organization=organization).first()
        if key is None or key.state != "active":
            return None
        return _principal(organization, key_id, frozenset(key.scopes), Priority(key.priority))

    return await in_database(read)


async def session_principal(user: Any) -> Principal:
    """The principal of someone signed in to the console. Raises PermissionDenied without an organization."""
    members = User.objects.select_related("organization__plan").filter(pk=user.pk, is_active=True)
    found = await in_database(members.first)
    if found is None or found.organization is None or not found.organization.is_active:
        raise PermissionDenied("Your account belongs to no active organization. Ask an operator to add you to one.")
    scopes = {"inference", "admin", "metrics"} if found.is_staff else {"inference"}
    return _principal(found.organization, "session", frozenset(scopes))


def _principal(
    organization: Organization, key_id: str, scopes: frozenset[str], priority: Priority = Priority.DEFAULT
) -> Principal:
    most = Priority(organization.plan.max_priority)
    return Principal(
        org_id=str(organization.pk),
        key_id=key_id,
        scopes=scopes,
        limits=organization.limits,
        weight=organization.plan.weight,
        max_priority=most,
        priority=min(priority, most),
    )


class KeyUser:
    """Who DRF sees behind an API key: authenticated, and nobody in particular."""

    is_authenticated = True
    is_active = True
    is_staff = False

    def __init__(self, principal: Principal) -> None:
        self.principal = principal
        self.pk = None

    def __str__(self) -> str:
        return f"key {self.principal.key_id}"


class ApiKeyAuthentication(authentication.BaseAuthentication):
    """`Authorization: Bearer sk-...` on the management API."""

    def authenticate(self, request: Request) -> tuple[Any, Principal] | None:
        header = request.headers.get("Authorization")
        if header is None:
            return None
        principal = async_to_sync(authenticate)(header)
        return KeyUser(principal), principal

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


class SessionAuthentication(authentication.SessionAuthentication):
    """A signed-in console user, with CSRF checked."""
