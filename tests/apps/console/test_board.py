"""The placement board and the quota pages: what they show, what can be done from them, and who may."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.test import AsyncClient
from redis.asyncio import Redis

from apps.accounts import quota
from apps.accounts.models import AuditLog, Organization, Plan, UsageDay
from apps.accounts.services import api_key_create, organization_create
from apps.core.database import in_database
from apps.core.types import ModelFolder, Principal, ResidentModel, WorkerSnapshot
from apps.fleet import registry
from apps.fleet.controller import LEADER_KEY
from apps.fleet.models import Host, Modality, Mode, Model, ModeSwitch, Movement, Placement, UnloadWish, Worker
from tests.apps.console.test_scheduler_pages import signed_in

pytestmark = pytest.mark.django_db(transaction=True)
GIB = 1 << 30


async def fleet(redis: Redis) -> Worker:
    """A host with a worker that is heard, and has `a` at work and `b` asleep."""

    def write() -> Worker:
        for name in ("a", "b"):
            Model.objects.create(name=name, title=name, modality=Modality.TEXT, parameters=1, weight_bytes=1,
                                 published_at="2026-01-01")  # fmt: skip
        host = Host.objects.create(name="rack1", address="10.0.0.7")
        worker = Worker.objects.create(name="w1", host=host, address="10.0.0.7:9000", status="serving")
        Worker.objects.create(name="w2", host=host, address="10.0.0.7:9001", status="unreachable: unavailable")
        Placement.objects.create(model=Model.objects.get(name="a"), worker=worker, is_pinned=True)
        return worker

    return await in_database(write)


def snapshot(**fields: Any) -> WorkerSnapshot:
    a = ResidentModel("a", "ready", running=2, waiting=1, max_running=8, weight_bytes=GIB, resident_bytes=3 * GIB, kv_bytes=GIB)
    folders = (ModelFolder("a", need_bytes=2 * GIB), ModelFolder("b", need_bytes=GIB, in_host_memory=True))
    return WorkerSnapshot(
        "w1", "10.0.0.7:9000", 1, 77, "cuda:0", "individual", False, 10 * GIB, 6 * GIB, (a,), memory_budget_bytes=8 * GIB,
        memory_reserved_bytes=3 * GIB, folders=folders, loadable=("a", "b"), **fields,
    )  # fmt: skip


async def data(client: AsyncClient, redis: Redis, **fields: Any) -> dict[str, Any]:
    """The board just after the worker was heard."""
    await registry.publish(redis, snapshot(**fields))
    answer = await client.get("/api/board/")
    assert answer.status_code == 200
    return answer.json()


async def test_the_board_shows_the_fleet_as_it_is(redis: Redis) -> None:
    await fleet(redis)
    client = await signed_in("ops", staff=True)
    board = await data(client, redis)
    assert board["leader"] == "", "nobody leads yet"
    await redis.set(LEADER_KEY, "c1")
    board = await data(client, redis)
    assert board["leader"] == "c1"
    (host,) = board["hosts"]
    w1, w2 = host["workers"]
    assert (w1["state"], w1["step"], w1["device"]) == ("serving", 77, "cuda:0")
    assert w1["memory"] == {"total": 10 * GIB, "budget": 8 * GIB, "weights": GIB, "kv": GIB, "other": GIB, "elsewhere": GIB}
    a, b = w1["models"]
    assert (a["state"], a["is_pinned"], a["running"], a["waiting"], a["bytes"]) == ("ready", True, 2, 1, 3 * GIB)
    assert (b["model"], b["state"], b["is_placed"]) == ("b", "asleep", False)
    assert (w2["state"], w2["status"], w2["seen_ms_ago"]) == ("unreachable", "unreachable: unavailable", None)


async def test_the_board_tells_what_is_wrong_and_what_happened(redis: Redis) -> None:
    worker = await fleet(redis)

    def write() -> None:
        Placement.objects.create(model=Model.objects.get(name="b"), worker=worker, state="failed: no shard")
        now = worker.host.added_at
        Movement.objects.create(worker=worker, loaded="b", reason="placed here", started_at=now, ended_at=now, error="no shard")
        ModeSwitch.objects.create(host=worker.host, from_mode=Mode.INDIVIDUAL, to_mode=Mode.TENSOR_PARALLEL, from_epoch=1,
                                  epoch=2, requested_by="me").steps.create(step="start")  # fmt: skip
        Worker.objects.filter(name="w2").update(status="stuck: its step stands still")

    await in_database(write)
    await redis.sadd("lanes", "b")
    await redis.hset("depth", mapping={"waiting:b": 3, "cause:b": "model_load"})
    client = await signed_in("ops", staff=True)
    board = await data(client, redis, refused={"b": "failed: no shard"}, cordoned=True)
    (host,) = board["hosts"]
    w1, w2 = host["workers"]
    assert (w1["state"], w2["state"], host["is_switching"]) == ("cordoned", "stuck", True)
    assert [(m["model"], m["state"], m["note"]) for m in w1["models"]][1] == ("b", "failed", "failed: no shard")
    assert board["lanes"] == [{"model": "b", "waiting": 3, "running": 0, "cause": "model_load"}]
    assert board["movements"][0]["error"] == "no shard"
    assert [step["step"] for step in board["switches"][0]["steps"]] == ["start"]


async def test_the_board_is_for_operators_and_in_the_schema(redis: Redis) -> None:
    worker = await fleet(redis)
    member = await signed_in("member", staff=False)
    assert (await member.get("/admin/board/")).status_code == 302
    assert (await member.get("/admin/quotas/")).status_code == 302
    assert (await member.get("/api/board/")).status_code == 403
    assert (await AsyncClient().get("/api/board/")).status_code == 401
    refused = await member.post(f"/api/workers/{worker.pk}/drain/", {}, content_type="application/json")
    assert refused.status_code == 403
    assert not (await Worker.objects.aget(pk=worker.pk)).is_draining
    schema = (await (await signed_in("ops", staff=True)).get("/api/schema/?format=json")).json()
    assert {"/api/board/", "/api/workers/{id}/place/", "/api/workers/{id}/move/", "/api/workers/{id}/unload/",
            "/api/workers/{id}/drain/", "/api/hosts/{id}/switch-mode/"} <= set(schema["paths"])  # fmt: skip
    assert {"Board", "HostCard", "Chip", "Preview"} <= set(schema["components"]["schemas"])


async def test_every_action_has_a_dry_run_that_changes_nothing_and_leaves_an_audit_row_when_done(redis: Redis) -> None:
    worker = await fleet(redis)
    client, headers = AsyncClient(), await operator_key()

    async def do(verb: str, **body: Any) -> dict[str, Any]:
        path, before = f"/api/workers/{worker.pk}/{verb}/", await record()
        await registry.publish(redis, snapshot())
        tried = await client.post(path, {**body, "dry_run": True}, content_type="application/json", headers=headers)
        assert tried.status_code == 200
        assert await record() == before
        done = await client.post(path, body, content_type="application/json", headers=headers)
        assert done.status_code == 202
        assert done.json() == tried.json()
        assert await in_database(lambda: AuditLog.objects.count()) == before[-1] + (2 if verb == "move" else 1)
        return done.json()

    placed = await do("place", model="b", pinned=True)
    assert (placed["possible"], placed["loads"], placed["seconds"]) == (True, ["b"], None)
    assert any("from host memory" in line for line in placed["says"])
    assert await in_database(lambda: Placement.objects.get(model__name="b").is_pinned)
    await do("place", model="b", pinned=False)
    moved = await do("move", model="a", to="w2")
    assert not moved["possible"], "w2 is not heard"
    assert await in_database(lambda: UnloadWish.objects.get(model__name="a").once_elsewhere)
    assert (await do("unload", model="a"))["unloads"] == ["a"]
    assert not await in_database(lambda: UnloadWish.objects.get(model__name="a").once_elsewhere)
    drained = await do("drain")
    assert "the 3 sequences it has end there" in drained["says"][0]
    assert await in_database(lambda: Worker.objects.get(name="w1").is_draining)
    await do("drain", draining=False)
    actor = await in_database(lambda: AuditLog.objects.filter(action="model moved").get().actor)
    assert actor.startswith("key ")


async def record() -> tuple[Any, ...]:
    def read() -> tuple[Any, ...]:
        placements = list(Placement.objects.order_by("pk").values_list("model__name", "worker__name", "is_pinned"))
        wishes = list(UnloadWish.objects.values_list("model__name", "once_elsewhere"))
        return placements, wishes, list(Worker.objects.values_list("name", "is_draining")), AuditLog.objects.count()

    return await in_database(read)


async def operator_key() -> dict[str, str]:
    def make() -> str:
        return api_key_create(organization=organization_create(name="ops", actor="t"), name="k", actor="t", scopes=("admin",))[
            1
        ]

    secret = await in_database(make)
    return {"Authorization": f"Bearer {secret}"}


@pytest.mark.parametrize(
    ("verb", "body", "param"),
    [
        ("place", {}, "model"),
        ("place", {"model": "none"}, "model"),
        ("place", {"model": "a", "pin": True}, "pin"),
        ("place", [], None),
        ("move", {"model": "a", "to": "w1"}, "to"),
        ("move", {"model": "a", "to": "<script>"}, "to"),
        ("drain", {"draining": "perhaps"}, "draining"),
        ("unload", {"model": None}, "model"),
    ],
)
async def test_what_is_wrong_with_an_action_is_named(redis: Redis, verb: str, body: Any, param: str | None) -> None:
    worker = await fleet(redis)
    path, headers = f"/api/workers/{worker.pk}/{verb}/", await operator_key()
    answer = await AsyncClient().post(path, json.dumps(body), content_type="application/json", headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


# --- Quotas ---


async def limited(redis: Redis) -> Organization:
    def write() -> Organization:
        plan = Plan.objects.create(name="basic", tokens_per_day=1000)
        Plan.objects.create(name="pro", weight=4)
        organization = organization_create(name="acme", actor="t", plan=plan)
        UsageDay.objects.create(organization=organization, key_id="1", model="a", day="2026-01-01", requests=9)
        return organization

    organization = await in_database(write)
    principal = Principal(str(organization.pk), "k", frozenset(), organization.limits)
    await quota.reserve(redis, request_id="r1", principal=principal, tokens=900, ttl_ms=60_000)
    return organization


async def test_quotas_show_use_beside_limits_and_are_searched(redis: Redis) -> None:
    organization = await limited(redis)
    client = await signed_in("ops", staff=True)
    page = (await client.get("/admin/quotas/")).content.decode()
    assert "tokens per day: 900 of 1000, 90 percent" in page
    assert "q-use near" in page
    assert 'aria-label="acme"' not in (await client.get("/admin/quotas/?q=nobody%22%3E%3Cscript%3E")).content.decode()
    assert 'aria-label="acme"' in (await client.get("/admin/quotas/?q=BASIC")).content.decode()
    one = (await client.get(f"/admin/quotas/{organization.pk}/")).content.decode()
    assert one.count("<li title=") == 30


async def test_a_quota_is_edited_in_place_with_an_audit_row_of_old_and_new(redis: Redis) -> None:
    organization = await limited(redis)
    client = await signed_in("ops", staff=True)
    pro = await Plan.objects.aget(name="pro")
    fields = {"plan": pro.pk, "tokens_per_day": "5000", "requests_per_minute": "", "next": "/admin/quotas/?q=ac"}
    answer = await client.post(f"/admin/quotas/{organization.pk}/", fields)
    assert (answer.status_code, answer["Location"]) == (302, "/admin/quotas/?q=ac")
    changed = await Organization.objects.select_related("plan").aget(pk=organization.pk)
    assert (changed.plan.name, changed.tokens_per_day, changed.requests_per_minute) == ("pro", 5000, None)
    row = await AuditLog.objects.aget(action="organization limited")
    assert (row.actor, row.target) == ("ops", "acme: plan basic -> pro, tokens_per_day plan's -> 5000")
    elsewhere = await client.post(f"/admin/quotas/{organization.pk}/", {**fields, "next": "https://evil.example/"})
    assert elsewhere["Location"] == "/admin/quotas/"
    assert await sync_to_async(AuditLog.objects.filter(action="organization limited").count)() == 1, "nothing was changed"


@pytest.mark.parametrize(
    ("value", "why"), [("-1", "greater than or equal to 0"), ("many", "whole number"), ("9" * 30, "less than or equal")]
)
async def test_a_limit_that_is_none_is_told_where_it_is(redis: Redis, value: str, why: str) -> None:
    organization = await limited(redis)
    answer = await (await signed_in("ops", staff=True)).post(
        f"/admin/quotas/{organization.pk}/", {"plan": organization.plan_id, "tokens_per_day": value}
    )
    assert answer.status_code == 400
    assert why in answer.content.decode()
    assert (await Organization.objects.aget(pk=organization.pk)).tokens_per_day is None
