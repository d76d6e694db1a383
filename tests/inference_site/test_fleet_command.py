"""The fleet and its quotas as code: export, plan, apply."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from io import StringIO
from pathlib import Path

import pytest
import yaml
from django.core.management import CommandError, call_command

from apps.accounts.models import AuditLog, Organization, Plan
from apps.core.redis import connect
from apps.core.types import ModelFolder, ResidentModel, WorkerSnapshot
from apps.fleet import registry
from apps.fleet.models import Host, Modality, Model, Placement, Worker

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _fleet() -> None:
    publish(None)
    for name in ("a", "b"):
        Model.objects.create(name=name, title=name, modality=Modality.TEXT, parameters=1, weight_bytes=1,
                             published_at="2026-01-01")  # fmt: skip
    host = Host.objects.create(name="rack1", address="10.0.0.7")
    worker = Worker.objects.create(name="w1", host=host, address="10.0.0.7:9000")
    Placement.objects.create(model=Model.objects.get(name="a"), worker=worker)
    plan = Plan.objects.create(name="standard", tokens_per_minute=1000)
    Organization.objects.create(name="acme", plan=plan, concurrent_requests=4)


def fleet(*arguments: str) -> str:
    out = StringIO()
    call_command("fleet", *arguments, stdout=out)
    return out.getvalue()


def changed(tmp_path: Path, **sections) -> str:
    """The path of an export in which some sections are others."""
    file = tmp_path / "fleet.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(fleet("export")), **sections}, sort_keys=False))
    return str(file)


def test_what_is_exported_and_applied_is_exported_again_byte_for_byte(tmp_path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(fleet("export"))
    assert fleet("plan", str(file)).splitlines()[0].startswith(("nothing to change", "w1: not heard"))
    Host.objects.all().delete()
    Plan.objects.update(weight=7)
    Organization.objects.update(concurrent_requests=None, tokens_per_day=5)
    fleet("apply", str(file))
    assert fleet("export") == file.read_text()
    assert AuditLog.objects.filter(action="plan set", target="standard").exists()


def test_a_plan_names_each_difference_and_changes_nothing(tmp_path) -> None:
    before = fleet("export")
    organizations = [{"name": "acme", "plan": "standard", "active": True}, {"name": "new", "plan": "standard"}]
    placements = [{"worker": "w1", "model": "b", "pinned": True}]
    said = fleet("plan", changed(tmp_path, placements=placements, organizations=organizations)).splitlines()
    assert said[:4] == [
        "- placement a on w1",
        "+ placement b on w1: worker 'w1', model 'b', pinned True",
        "~ organization acme: concurrent_requests 4 -> None",
        "+ organization new: name 'new', plan 'standard', active True",
    ]
    assert fleet("export") == before


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("hosts: [", "line 1: "),
        ("- a", "line 1: the file is a mapping of sections"),
        ("hosts: []\nguests: []", "line 2: no section is called guests"),
        ("hosts:\n- name: h\n  adress: x", "line 2: hosts\\[0\\]: address: Field required"),
        ("hosts:\n- name: h\n  address: x\n  port: 3", "line 4: hosts\\[0\\]: port: Extra inputs"),
        ("hosts:\n- {name: h, address: x}\n- name: h\n  address: y", "line 3: hosts\\[1\\]: h is there twice"),
        ("hosts: []\nmodels: 3", "line 2: models is a list"),
        ("hosts: !!python/object:os.system {}", "line 1: "),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_line(tmp_path, text: str, why: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    for action in ("plan", "apply"):
        with pytest.raises(CommandError, match=why):
            fleet(action, str(file))


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"organizations": []}, "organizations: acme is missing"),
        ({"models": [{"name": n} for n in "abc"]}, "models: there is no c"),
        ({"models": [{"name": "a", "engine": "fast"}, {"name": "b"}]}, "models: a: engine: "),
        ({"workers": [{"name": "w1", "host": "nowhere", "address": "a:1"}]}, "there is no host nowhere"),
        ({"placements": [{"worker": "w1", "model": "a"}, {"worker": "w9", "model": "a"}]}, "there is no worker w9"),
    ],
)
def test_a_file_that_cannot_be_applied_changes_nothing(tmp_path, sections, why: str) -> None:
    before = fleet("export")
    with pytest.raises(CommandError, match=why):
        fleet("apply", changed(tmp_path, **sections))
    assert fleet("export") == before


def publish(snapshot: WorkerSnapshot | None) -> None:
    """The only worker that is heard; None for none."""

    async def write() -> None:
        redis = connect(os.environ["REDIS_URL"])
        await redis.flushdb()
        if snapshot is not None:
            await registry.publish(redis, snapshot)
        await redis.aclose()

    asyncio.run(write())


def test_a_plan_tells_what_is_loaded_what_makes_room_and_what_does_not_fit(tmp_path) -> None:
    size = 400 << 20
    snapshot = WorkerSnapshot(
        "w1", "10.0.0.7:9000", 1, 0, "cpu", "individual", False, 0, 0, (ResidentModel("a", "ready", resident_bytes=size),),
        memory_budget_bytes=size + 1, memory_reserved_bytes=size,
        folders=(ModelFolder("a", need_bytes=size), ModelFolder("b", need_bytes=size)),
    )  # fmt: skip
    publish(snapshot)
    pinned = [{"worker": "w1", "model": "b", "pinned": True}]
    assert fleet("plan", changed(tmp_path, placements=pinned)).splitlines()[2:] == [
        "w1: unloads a (placed here)",
        "w1: loads b (placed here)",
    ]
    both = [{"worker": "w1", "model": "a"}, {"worker": "w1", "model": "b"}]
    assert fleet("plan", changed(tmp_path, placements=both)).splitlines()[-1] == (
        "w1: b does not fit: there is no room for it beside the others"
    )
    publish(dataclasses.replace(snapshot, memory_budget_bytes=10))
    assert "w1: b does not fit: needs 400 MiB, 0 MiB can be made free" in fleet("plan", changed(tmp_path, placements=both))


def test_how_a_host_is_managed_and_a_worker_s_mode_are_in_the_file(tmp_path) -> None:
    key = "ssh-ed25519 " + "A" * 68
    Host.objects.update(is_managed=True, ssh_user="gpu", ssh_port=2222, ssh_host_key=key, may_switch_itself=True)
    host = Host.objects.get()
    Worker.objects.create(name="tp", host=host, address="10.0.0.7:9100", mode="tensor_parallel", is_draining=True)
    file = tmp_path / "fleet.yaml"
    file.write_text(fleet("export"))
    Host.objects.all().delete()
    fleet("apply", str(file))
    assert fleet("export") == file.read_text()
    found = Host.objects.get()
    assert (found.is_managed, found.ssh_user, found.ssh_port, found.ssh_host_key) == (True, "gpu", 2222, key)
    assert found.may_switch_itself
    assert (found.mode, found.epoch) == ("individual", 1), "the mode of the moment is the mode switch's"
    worker = Worker.objects.get(name="tp")
    assert (worker.mode, worker.is_draining, worker.is_enabled) == ("tensor_parallel", True, True)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"managed": True}, "a managed host is known by its key"),
        ({"ssh_host_key": "ssh-rsa AAAA"}, "ssh_host_key"),
        ({"ssh_user": "-oProxyCommand=x"}, "ssh_user"),
        ({"ssh_port": 0}, "ssh_port"),
    ],
)
def test_a_host_that_cannot_be_reached_safely_is_refused(tmp_path, fields, why) -> None:
    file = changed(tmp_path, hosts=[{"name": "rack1", "address": "10.0.0.7", **fields}])
    with pytest.raises(CommandError, match=why):
        fleet("apply", file)
    assert not Host.objects.get().is_managed
