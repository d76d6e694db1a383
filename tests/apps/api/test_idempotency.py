"""`Idempotency-Key` and sessions over HTTP, on a site whose daemons compute by arithmetic."""

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
from apps.api import idempotency
from apps.fleet import selectors
from tests.apps.api.test_queue import MODEL, client, get, post
from tests.apps.scheduler.site import Site, site

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
async def made(redis: Redis, tmp_path: Path, smollm2: Path) -> AsyncIterator[Site]:
    auth._cache.clear()
    selectors._cache.clear()
    await sync_to_async(call_command)("loaddata", "models", verbosity=0)
    async with site(redis, tmp_path / "log", max_running=8, step_seconds=0.01) as running:
        yield running


async def enqueued(made: Site) -> int:
    return sum(fields["op"] == "enqueue" for _, fields in await made.redis.xrange("log"))


async def finished(response) -> bytes:
    return b"".join([part async for part in response.streaming_content])


async def test_fifty_at_once_are_one_execution_and_one_answer(made: Site) -> None:
    http = {**await client("fifty"), "idempotency-key": "k"}
    answers = await asyncio.gather(*(post(http, max_tokens=20) for _ in range(50)))
    told = Counter(answer.status_code for answer in answers)
    assert told[200] >= 1
    assert set(told) <= {200, 409}
    for answer in answers:
        if answer.status_code == 409:
            assert answer.json()["error"]["code"] == "in_progress"
            assert answer["Retry-After"] == "1"
    later = await post(http, max_tokens=20)
    assert (later.status_code, later["idempotent-replayed"]) == (200, "true")
    (whole,) = {answer.content for answer in [*answers, later] if answer.status_code == 200}
    assert json.loads(whole)["usage"]["completion_tokens"] == 20
    assert await enqueued(made) == 1


async def test_another_body_is_refused_and_another_path_or_organization_is_another_key(made: Site) -> None:
    one, two = await client("one"), await client("two")
    named = {**one, "idempotency-key": "k"}
    assert (await post(named)).status_code == 200
    other = await post(named, max_tokens=5)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")
    assert (await post(named, "/v1/completions", messages=None, prompt="x")).status_code == 400  # of its own making
    assert (await post({**two, "idempotency-key": "k"}, max_tokens=5)).status_code == 200
    assert await enqueued(made) == 2


async def test_what_was_refused_may_be_sent_again_corrected(made: Site) -> None:
    http = {**await client("clumsy"), "idempotency-key": "k"}
    assert (await post(http, max_tokens=-1)).status_code == 400
    assert (await post(http)).status_code == 200


@pytest.mark.parametrize("name", ["k" * 256, "clé", "a\tb"])
async def test_other_keys_are_refused(made: Site, name: str) -> None:
    refused = await post({**await client("strange"), "idempotency-key": name})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")


async def test_a_stream_is_sent_once(made: Site) -> None:
    http = {**await client("streams"), "idempotency-key": "k"}
    first = await post(http, stream=True)
    assert (await post(http, stream=True)).json()["error"]["code"] == "in_progress"
    assert (await finished(first)).endswith(b"data: [DONE]\n\n")
    again = await post(http, stream=True)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "already_streamed")
    assert again["x-should-retry"] == "false"


async def test_a_stream_that_broke_off_may_be_asked_for_again(made: Site) -> None:
    http = {**await client("broken"), "idempotency-key": "k"}
    reading = asyncio.create_task(finished(await post(http, stream=True, max_tokens=200)))
    await asyncio.sleep(0.2)
    reading.cancel()  # which is what the server does when a client hangs up
    await asyncio.gather(reading, return_exceptions=True)
    assert (await finished(await post(http, stream=True, max_tokens=200))).endswith(b"data: [DONE]\n\n")


async def test_the_keys_of_a_gateway_that_died_are_free_when_their_lease_ends(made: Site, monkeypatch) -> None:
    monkeypatch.setattr(idempotency, "LEASE_MS", 300)
    http = {**await client("dying"), "idempotency-key": "k"}
    slow = asyncio.create_task(post(http, max_tokens=100))  # a second, and three leases
    await asyncio.sleep(0.6)
    assert (await post(http, max_tokens=100)).status_code == 409, "whoever lives renews"
    monkeypatch.setattr(idempotency.Claim, "step", _unheard)
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)
    monkeypatch.undo()
    await asyncio.sleep(0.4)
    assert (await post(http, max_tokens=100)).status_code == 200


async def _unheard(*args: object) -> list[str]:
    return ["lost"]


async def test_a_key_knows_itself_its_limits_and_their_use(made: Site) -> None:
    http = await client("knowing", requests_per_minute=5, tokens_per_day=10_000)
    used = (await post(http)).json()["usage"]["total_tokens"]
    told = (await get(http, "/v1/key")).json()
    assert (told["name"], told["organization"], told["scopes"]) == ("n", "knowing", ["inference"])
    assert http["authorization"].removeprefix("Bearer ").startswith(told["prefix"])
    assert (told["service_tier"], told["max_service_tier"], told["expires_at"]) == ("default", "priority", None)
    assert told["limits"]["requests_per_minute"] == {"limit": 5, "used": 1, "remaining": 4}
    assert told["limits"]["tokens_per_day"] == {"limit": 10_000, "used": used, "remaining": 10_000 - used}
    assert told["limits"]["concurrent_requests"] == {"limit": None, "used": 0, "remaining": None}


async def test_a_session_counts_its_turns_for_its_organization_alone(made: Site) -> None:
    owner, stranger = await client("owner"), await client("stranger")
    answers = await asyncio.gather(*(post(owner, session_id="s", seed=seed) for seed in range(3)))  # turns may run side by side
    tokens = answers[0].json()["usage"]["total_tokens"]
    told = (await get(owner, "/v1/sessions/s")).json()
    assert (told["model"], told["worker"], told["turns"], told["cached_tokens"]) == (MODEL, "w0", 3, tokens)
    assert told["expires_at"] > told["last_used_at"] >= told["created_at"]
    assert (await get(owner, "/v1/sessions")).json()["data"] == [told]
    assert (await get(stranger, "/v1/sessions")).json()["data"] == []
    assert (await get(stranger, "/v1/sessions/s")).status_code == 404
    assert (await AsyncClient().delete("/v1/sessions/s", headers=stranger)).status_code == 404


async def test_a_deleted_session_s_kv_is_out_of_reach_even_of_its_name(made: Site) -> None:
    owner = await client("deleting")
    await post(owner, prompt_cache_key="s")
    await post(owner, prompt_cache_key="s")
    await post(owner)
    assert (await AsyncClient().delete("/v1/sessions/s", headers=owner)).json()["deleted"] is True
    assert (await get(owner, "/v1/sessions/s")).status_code == 404
    await post(owner, prompt_cache_key="s")
    one, two, plain, new = [submit.cache_salt for submit in made.daemons[0].submits]
    assert one == two
    assert len({one, plain, new}) == 3
