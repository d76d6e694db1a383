"""What operators change in the admin's lists and forms is recorded, with who did it."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.test import AsyncClient
from redis.asyncio import Redis

from apps.accounts.models import AuditLog
from apps.core.database import in_database
from apps.fleet.models import Host, Modality, Model, Placement, Worker
from tests.apps.console.test_scheduler_pages import signed_in

pytestmark = pytest.mark.django_db(transaction=True)


def made() -> tuple[Worker, Placement]:
    host = Host.objects.create(name="rack1", address="10.0.0.7")
    worker = Worker.objects.create(name="w1", host=host, address="10.0.0.7:9000")
    model = Model.objects.create(
        name="a", title="a", modality=Modality.TEXT, parameters=1, weight_bytes=1, published_at="2026-01-01"
    )
    return worker, Placement.objects.create(model=model, worker=worker)


@pytest.fixture
async def operator(redis: Redis) -> AsyncClient:
    client = await signed_in("ann", staff=True)
    await AuditLog.objects.all().adelete()
    return client


async def post(client: AsyncClient, path: str, form: dict[str, Any]) -> None:
    answer = await client.post(f"/admin/fleet/{path}", form)
    assert answer.status_code == 302, answer.context["errors"]


async def recorded() -> list[tuple[str, str, str]]:
    return [row async for row in AuditLog.objects.order_by("pk").values_list("actor", "action", "target")]


async def test_an_edit_in_a_list(operator: AsyncClient) -> None:
    worker, _ = await in_database(made)
    await post(operator, "worker/", {"form-TOTAL_FORMS": 1, "form-INITIAL_FORMS": 1, "form-0-id": worker.pk, "_save": "Save"})
    await worker.arefresh_from_db()
    assert not worker.is_enabled
    assert await recorded() == [("ann", "worker changed", "w1")]


async def test_an_edit_inside_another_s_page(operator: AsyncClient) -> None:
    worker, placement = await in_database(made)
    form = {
        "name": "w1", "host": worker.host_id, "address": worker.address, "is_enabled": "on", "mode": worker.mode, "ranks": 1,
        "placements-TOTAL_FORMS": 1, "placements-INITIAL_FORMS": 1, "placements-0-id": placement.pk,
        "placements-0-worker": worker.pk, "placements-0-model": placement.model_id, "placements-0-DELETE": "on",
    }  # fmt: skip
    told = str(placement)
    await post(operator, f"worker/{worker.pk}/change/", form)
    assert not await Placement.objects.aexists()
    assert await recorded() == [("ann", "worker changed", "w1"), ("ann", "placement deleted", told)]


async def test_a_deletion_of_several(operator: AsyncClient) -> None:
    _, placement = await in_database(made)
    told = str(placement)
    await post(operator, "placement/", {"action": "delete_selected", ACTION_CHECKBOX_NAME: [placement.pk], "post": "yes"})
    assert not await Placement.objects.aexists()
    assert await recorded() == [("ann", "placement deleted", told)]
