"""Asking for a switch: the command, the REST action, and who is refused. Nothing is switched here."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from django.core.management import CommandError, call_command
from django.test import AsyncClient
from django.utils import timezone

from apps.accounts.models import AuditLog
from apps.accounts.services import api_key_create, organization_create
from apps.fleet.models import Host, Modality, Model, ModeSwitch, ModeSwitchStep, Worker
from apps.fleet.modes.services import switch_request

pytestmark = pytest.mark.django_db(transaction=True)
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOArCp+6O54ouXSRCkYCB2x3bbgZGEsbhz0y5taewALM root@rack1"


@pytest.fixture
def host() -> Host:
    """As an operator adds it, by commands."""
    for name in ("small", "big", "both"):
        Model.objects.create(name=name, title=name, modality=Modality.TEXT, parameters=1, weight_bytes=1,
                             published_at="2026-01-01")  # fmt: skip
    manage("fleet", "add-host", "rack1", "--address", "10.0.0.7", "--ssh-host-key", KEY)
    manage("fleet", "add-worker", "gpu0", "--host", "rack1", "--port", "9000", "--model", "small", "--model", "both")
    manage("fleet", "add-worker", "tp", "--host", "rack1", "--port", "9010", "--mode", "tensor_parallel", "--model", "big",
           "--model", "both")  # fmt: skip
    return Host.objects.get()


def manage(*arguments: str) -> str:
    output = StringIO()
    call_command(*arguments, stdout=output)
    return output.getvalue()


@pytest.fixture
def operator() -> dict[str, str]:
    organization = organization_create(name="ops", actor="test")
    _, secret = api_key_create(organization=organization, name="k", actor="test", scopes=("admin",))
    return {"Authorization": f"Bearer {secret}"}


def test_a_dry_run_says_what_would_happen_and_leaves_no_trace(host: Host) -> None:
    assert host.ssh_host_key == KEY.removesuffix(" root@rack1")
    told = manage("switch_mode", "rack1", "tensor_parallel", "--dry-run")
    assert told == (
        "rack1: individual to tensor_parallel, never done before\n"
        "  stops: gpu0\n  starts: tp\n  unloads: small\n  loads: big, both\n"
    )
    assert not ModeSwitch.objects.exists()


def test_past_switches_tell_how_long_the_next_takes(host: Host) -> None:
    now = timezone.now()
    for seconds in (4, 6):
        switch = switch_request(host=host, mode="tensor_parallel", actor="test")
        ModeSwitch.objects.filter(pk=switch.pk).update(
            state="succeeded", created_at=now, ended_at=now + timezone.timedelta(seconds=seconds)
        )
    assert "about 5.0 s" in manage("switch_mode", "rack1", "tensor_parallel", "--dry-run")


def test_epochs_are_never_used_twice(host: Host) -> None:
    epochs = []
    for _ in range(3):
        switch = switch_request(host=host, mode="tensor_parallel", actor="test")
        epochs += [switch.epoch, switch.epoch + 1]
        ModeSwitch.objects.filter(pk=switch.pk).update(ended_at=timezone.now())
    assert len({host.epoch, *epochs}) == 7


def test_what_cannot_be_is_refused_kindly(host: Host) -> None:
    refusals = {
        ("nowhere", "individual"): "no host nowhere; `manage.py fleet list` shows them",
        ("rack1", "individual"): "Host rack1 is in individual mode already.",
    }
    for (name, mode), why in refusals.items():
        with pytest.raises(CommandError, match=why):
            manage("switch_mode", name, mode)
    Worker.objects.filter(name="tp").update(is_enabled=False)
    with pytest.raises(CommandError, match="no enabled worker for tensor_parallel"):
        manage("switch_mode", "rack1", "tensor_parallel")
    Host.objects.update(is_managed=False)
    with pytest.raises(CommandError, match="is not managed"):
        manage("switch_mode", "rack1", "tensor_parallel")
    for key in ("ssh-rsa AAAA", "ssh-ed25519 AAAA", "x;id"):
        with pytest.raises(CommandError, match="ssh-ed25519"):
            manage("fleet", "add-host", "rack2", "--address", "10.0.0.8", "--ssh-host-key", key)
    with pytest.raises(CommandError, match="name or an IP"):
        manage("fleet", "add-host", "rack2", "--address=-oProxyCommand=id")


def test_waiting_tells_each_step_and_fails_when_the_switch_did(host: Host, monkeypatch) -> None:
    """What a controller would write, written when the command first looks."""
    from apps.fleet.management.commands import switch_mode

    def work(_: float) -> None:
        switch = ModeSwitch.objects.get(ended_at=None)
        times = {"started_at": timezone.now(), "ended_at": timezone.now()}
        ModeSwitchStep.objects.create(switch=switch, step="start", succeeded=False, detail="tp does not listen", **times)
        ModeSwitch.objects.update(state="rolled_back", reason="start: tp does not listen", ended_at=timezone.now())

    monkeypatch.setattr(switch_mode.time, "sleep", work)
    output = StringIO()
    with pytest.raises(CommandError, match="rolled back: start: tp does not listen"):
        call_command("switch_mode", "rack1", "tensor_parallel", "--wait", stdout=output)
    assert "  start: failed in 0.0 s: tp does not listen" in output.getvalue()


async def test_the_same_over_rest(host: Host, operator: dict[str, str]) -> None:
    client, url = AsyncClient(), f"/api/hosts/{host.pk}/switch-mode/"

    async def post(**body: object) -> tuple[int, dict]:
        answer = await client.post(url, json.dumps(body), content_type="application/json", headers=operator)
        return answer.status_code, answer.json()

    assert (await client.post(url, "{}", content_type="application/json")).status_code == 401
    assert (await post(mode="both"))[0] == 400
    status, plan = await post(mode="tensor_parallel", dry_run=True)
    assert (status, plan["stops"], plan["unloads"], plan["seconds"]) == (200, ["gpu0"], ["small"], None)
    status, switch = await post(mode="tensor_parallel")
    assert (status, switch["state"], switch["epoch"], switch["steps"]) == (202, "running", 2, [])
    assert (await post(mode="tensor_parallel"))[0] == 409
    found = (await client.get(f"/api/switches/{switch['id']}/", headers=operator)).json()
    assert (found["host"], found["to_mode"]) == ("rack1", "tensor_parallel")
    assert await AuditLog.objects.filter(action="mode switch requested", target="rack1 to tensor_parallel").acount() == 1
    body = json.dumps({"mode": "tensor_parallel"})
    change = await client.patch(f"/api/hosts/{host.pk}/", body, content_type="application/json", headers=operator)
    assert change.status_code == 400, "a mode is switched, not written"
