"""What clients are told about the queue, over HTTP, on a site whose daemons compute by arithmetic."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from asgiref.sync import sync_to_async
from django.core.management import call_command
from django.test import AsyncClient
from redis.asyncio import Redis

from apps.accounts import auth
from apps.accounts.models import Organization, Plan
from apps.accounts.services import api_key_create
from apps.core.types import Priority
from apps.fleet import selectors
from apps.metrics import prometheus
from apps.metrics.records import parse_entry
from tests.apps.scheduler.site import Site, site

pytestmark = pytest.mark.django_db(transaction=True)
MODEL = "smollm2-135m"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture
async def made(redis: Redis, tmp_path: Path, smollm2: Path) -> AsyncIterator[Site]:
    auth._cache.clear()
    selectors._cache.clear()
    await sync_to_async(call_command)("loaddata", "models", verbosity=0)
    async with site(redis, tmp_path / "log", max_running=1, step_seconds=0.01) as running:
        yield running


def key(name: str, *, priority: Priority = Priority.DEFAULT, most: Priority = Priority.PRIORITY, **limits: int) -> str:
    plan = Plan.objects.create(name=name, max_priority=most, weight=2, **limits)
    organization = Organization.objects.create(name=name, plan=plan)
    return api_key_create(organization=organization, name="n", actor="me", priority=priority)[1]


async def client(name: str, **fields) -> dict[str, str]:
    """The headers of a client of a new organization."""
    return {"authorization": f"Bearer {await sync_to_async(key)(name, **fields)}"}


async def post(headers: dict[str, str], path: str = "/v1/chat/completions", **fields):
    body = json.dumps({**BODY, **fields})
    return await AsyncClient().post(path, body, content_type="application/json", headers=headers)


async def get(headers: dict[str, str], path: str):
    return await AsyncClient().get(path, headers=headers)


async def test_the_tier_is_the_asked_one_or_the_key_s_and_is_echoed(made: Site) -> None:
    flex, strict = await client("flex", priority=Priority.FLEX), await client("strict", most=Priority.DEFAULT)
    assert (await post(flex)).json()["service_tier"] == "flex"
    assert (await post(flex, service_tier="auto")).json()["service_tier"] == "flex"
    assert (await post(flex, service_tier="priority")).json()["service_tier"] == "priority"
    assert (await post(strict, service_tier="priority")).json()["error"]["code"] == "priority_not_allowed"
    logged = [fields for _, fields in await made.redis.xrange("log") if fields["op"] == "enqueue"]
    assert [(entry["priority"], entry["weight"]) for entry in logged] == [("0", "2.0"), ("0", "2.0"), ("2", "2.0")]


async def test_a_request_says_why_it_waited_to_its_owner_alone(made: Site) -> None:
    owner, stranger = await client("owner"), await client("stranger")
    answers = await asyncio.gather(*(post(owner, seed=i) for i in range(4)))
    for answer in answers:
        told = (await get(owner, f"/v1/requests/{answer.json()['id']}")).json()
        assert (told["state"], told["outcome"]) == ("finished", "succeeded")
        assert sum(told["wait"].values()) == pytest.approx(told["timeline"]["first_token_ms"], abs=1)
        missing = await get(stranger, f"/v1/requests/{answer.json()['id']}")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "not_found"


async def test_an_estimate_comes_true_within_its_interval(made: Site) -> None:
    http = await client("asker")
    for seed in range(14):
        await post(http, seed=seed, max_tokens=4 + seed % 3)
    told = (await post(http, "/v1/estimate", max_tokens=6)).json()
    assert (told["model"], told["completion_tokens"], told["service_tier"]) == (MODEL, 6, "default")
    for name in ("cost", "wait", "first_token", "finish"):
        assert 0 <= told[name]["low_ms"] <= told[name]["expected_ms"] <= told[name]["high_ms"]
    assert 20 <= told["cost"]["expected_ms"] <= 200, "six steps of 10 ms and what the wire takes"
    assert told["wait"]["expected_ms"] == 0


async def test_a_stream_shows_its_place_to_those_who_ask(made: Site) -> None:
    http = await client("streamer")
    busy = [asyncio.create_task(post(http, seed=i, max_tokens=40)) for i in range(2)]
    await asyncio.sleep(0.15)
    answer = await post(http, stream=True, stream_options={"include_queue": True})
    text = b"".join([part async for part in answer.streaming_content]).decode()
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    places = [chunk["queue"] for chunk in chunks if "queue" in chunk]
    assert places[0]["position"] >= 0
    assert places[0]["cause"] in ("capacity", "dispatch")
    assert all(chunk["choices"] == [] for chunk in chunks if "queue" in chunk)
    await asyncio.gather(*busy)


async def test_http_prometheus_and_the_ledger_agree_exactly(made: Site, settings) -> None:
    settings.ENV = settings.ENV.model_copy(update={"queue_max_requests": 3, "queue_max_requests_per_org": 2})
    free, rated, few = (
        await client("free"),
        await client("rated", requests_per_minute=2),
        await client("few", concurrent_requests=1),
    )
    poor = await client("poor", tokens_per_day=1)
    sent = [
        *(post(free, seed=i, max_tokens=30) for i in range(8)),
        *(post(rated, seed=i) for i in range(5)),
        *(post(few, seed=i) for i in range(4)),
        *(post(poor) for _ in range(2)),
        post(free, model="nobody-knows"),
        post(free, max_tokens=-1),
        post(free, tp_size=4),
    ]
    answers = await asyncio.gather(*sent)
    for daemon in list(made.daemons):
        await made.kill(daemon)
    answers.append(await post(free))
    told = Counter(answer.json()["error"]["code"] if answer.status_code != 200 else "" for answer in answers)
    assert set(told) >= {"", "rate_limit_exceeded", "concurrency_exceeded", "quota_exceeded", "queue_full"}
    for answer in answers:
        if answer.status_code in (429, 503):
            assert 1 <= int(answer["Retry-After"]) <= 60
    entries = [(stream_id, parse_entry(fields["entry"])) for stream_id, fields in await made.redis.xrange("ledger")]
    assert Counter(entry.code for _, entry in entries) == told
    await prometheus.count(made.redis, entries)
    counted: Counter[str] = Counter()
    for name, value in (await made.redis.hgetall("metrics:counters")).items():
        if name.startswith("requests|"):
            counted[name.split("|")[3]] += int(value)
    assert counted == told
