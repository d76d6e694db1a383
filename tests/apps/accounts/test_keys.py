"""Keys: shown once, kept as a hash, refused alike, managed from the shell."""

from __future__ import annotations

import json
from datetime import timedelta
from io import StringIO

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.management import CommandError, call_command
from django.utils import timezone

from apps.accounts import auth
from apps.accounts.models import ApiKey, AuditLog, Organization, Plan
from apps.accounts.services import api_key_create, api_key_revoke, bootstrap
from apps.core.errors import InvalidRequest, Unauthenticated

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _no_cache():
    auth._cache.clear()


@pytest.fixture
def org() -> Organization:
    plan = Plan.objects.create(name="p", requests_per_minute=7, weight=2)
    return Organization.objects.create(name="acme", plan=plan, tokens_per_day=5)


def test_a_key_is_random_and_only_its_hash_is_kept(org) -> None:
    key, secret = api_key_create(organization=org, name="n", actor="me")
    assert len(secret) >= 46
    assert secret.startswith(key.prefix)
    assert secret not in json.dumps(list(ApiKey.objects.values()), default=str)
    assert AuditLog.objects.get().action == "key created"


async def test_a_key_s_principal_has_its_organization_s_limits(org) -> None:
    _, secret = await sync_to_async(api_key_create)(organization=org, name="n", actor="me")
    principal = await auth.authenticate(f"Bearer {secret}")
    assert (principal.limits.requests_per_minute, principal.limits.tokens_per_day, principal.weight) == (7, 5, 2)


@pytest.mark.parametrize("header", ["Basic x", "Bearer", "Bearer ", "Bearer sk-" + "x" * 43, "Bearer ' OR 1=1--", "\0"])
async def test_what_is_no_key_is_refused_alike(header: str) -> None:
    with pytest.raises(Unauthenticated) as refusal:
        await auth.authenticate(header)
    assert refusal.value.code == "invalid_api_key"


@pytest.mark.parametrize("end", ["revoked", "expired", "inactive"])
def test_a_key_that_ended_is_refused_like_an_unknown_one(org, end: str) -> None:
    key, secret = api_key_create(organization=org, name="n", actor="me")
    if end == "revoked":
        api_key_revoke(key=key, actor="me")
    elif end == "expired":
        ApiKey.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    else:
        Organization.objects.update(is_active=False)
    with pytest.raises(Unauthenticated) as refusal:
        async_to_sync(auth.authenticate)(f"Bearer {secret}")
    assert refusal.value.code == "invalid_api_key"


def test_unknown_scopes_are_named(org) -> None:
    with pytest.raises(InvalidRequest, match="root"):
        api_key_create(organization=org, name="n", actor="me", scopes=["root"])


def test_create_key_makes_the_organization_and_prints_json() -> None:
    out = StringIO()
    call_command("create_key", "--org", "new-org", "--json", stdout=out)
    made = json.loads(out.getvalue())
    assert ApiKey.objects.get().digest == auth.digest(made["key"])
    with pytest.raises(CommandError, match="small letters"):
        call_command("create_key", "--org", "Bad Name")


def test_bootstrapping_twice_changes_nothing() -> None:
    for _ in range(2):
        bootstrap(admin_password="long enough", api_key="sk-" + "b" * 43)
    assert (ApiKey.objects.count(), Organization.objects.count()) == (1, 1)
