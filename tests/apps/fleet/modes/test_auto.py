"""Switches on demand: the policy, and what it is fed with."""

from __future__ import annotations

import asyncio

import pytest
from django.conf import settings
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from apps.core.database import in_database
from apps.fleet.models import Host, Modality, Model, ModeSwitch
from apps.fleet.modes import demand
from apps.fleet.modes.auto import STALE_MS, Demand, SwitchableHost, Wish, choose
from apps.fleet.services import host_add, worker_add

NOW, SECOND = 10_000_000, 1000
TERMS = {"now_ms": NOW, "demand_ms": 20 * SECOND, "dwell_ms": 300 * SECOND}
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOArCp+6O54ouXSRCkYCB2x3bbgZGEsbhz0y5taewALM"


def waiting(model: str = "big", *, since: int = 30, last: int = 1) -> Demand:
    return Demand(model, NOW - since * SECOND, NOW - last * SECOND)


def host(
    pk: int = 1, *, kept: int = 1000, here: tuple[str, ...] = ("small",), there: tuple[str, ...] = ("big",)
) -> SwitchableHost:
    other = "tensor_parallel"
    return SwitchableHost(pk, "individual", NOW - kept * SECOND, frozenset(here), frozenset(there), other)


def test_demand_that_lasts_for_what_only_the_other_mode_has_changes_it() -> None:
    assert choose([waiting()], [host()], **TERMS) == Wish(1, "tensor_parallel", "big")


@pytest.mark.parametrize(
    ("demands", "hosts"),
    [
        ([], [host()]),
        ([waiting(since=15)], [host()]),  # too short
        ([waiting(since=60, last=16)], [host()]),  # over
        ([waiting()], [host(kept=299)]),  # too soon
        ([waiting()], [host(here=("big", "small"))]),  # it has it already; it only has to load
        ([waiting("other")], [host()]),
        ([waiting()], []),
    ],
)
def test_anything_less_changes_nothing(demands, hosts) -> None:
    assert choose(demands, hosts, **TERMS) is None


def test_the_longest_demand_counts_and_the_host_that_gives_up_least_goes() -> None:
    hosts = [host(1, here=("a", "b")), host(2, here=("a",)), host(3, there=("older",), here=())]
    assert choose([waiting(), waiting("older", since=90)], hosts, **TERMS) == Wish(3, "tensor_parallel", "older")
    assert choose([waiting()], hosts, **TERMS) == Wish(2, "tensor_parallel", "big")


@given(st.integers(0, 600), st.integers(0, 60), st.integers(0, 1000))
def test_a_host_is_never_asked_before_its_time(since: int, last: int, kept: int) -> None:
    wish = choose([waiting(since=since + last, last=last)], [host(kept=kept)], **TERMS)
    assert (wish is not None) == (since >= 20 and last * SECOND <= STALE_MS and kept >= 300)


@pytest.mark.django_db(transaction=True)
async def test_requests_that_find_no_worker_have_a_host_switch_that_may(redis: Redis, monkeypatch) -> None:
    def write() -> Host:
        for name in ("small", "big"):
            Model.objects.create(name=name, title=name, modality=Modality.TEXT, parameters=1, weight_bytes=1,
                                 published_at="2026-01-01")  # fmt: skip
        made = host_add(name="h", address="127.0.0.1", ssh_host_key=KEY)
        worker_add(name="w", host=made, port=1, models=["small"])
        worker_add(name="tp", host=made, port=2, models=["big"], mode="tensor_parallel")
        return made

    record = await in_database(write)
    monkeypatch.setattr(settings, "ENV", settings.ENV.model_copy(update={"switch_demand_ms": 100, "switch_dwell_ms": 0}))
    await redis.hset(demand.KEY, "nonsense", "yesterday")
    await demand.note(redis, "big")
    assert await demand.act(redis) is None, "once is not lasting"
    await asyncio.sleep(0.15)
    await demand.note(redis, "big")
    assert await demand.act(redis) is None, "the host may not"
    await in_database(lambda: Host.objects.update(may_switch_itself=True))
    assert await demand.act(redis) == Wish(record.pk, "tensor_parallel", "big")
    switch = await in_database(lambda: ModeSwitch.objects.get())
    assert (switch.to_mode, switch.requested_by) == ("tensor_parallel", "demand for big")
    await demand.note(redis, "big")
    await asyncio.sleep(0.15)
    await demand.note(redis, "big")
    assert await demand.act(redis) is None, "one at a time"
    monkeypatch.setattr(settings, "ENV", settings.ENV.model_copy(update={"switch_dwell_ms": 60_000}))
    await in_database(lambda: ModeSwitch.objects.update(ended_at=timezone.now(), state="failed"))
    assert await demand.act(redis) is None, "one that failed is not asked for at once again"
