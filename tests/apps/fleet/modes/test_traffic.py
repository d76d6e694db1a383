"""Requests while their only host changes its mode: what runs moves with its tokens, what comes waits, and none fails."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from redis.asyncio import Redis

from apps.core.redis import shared
from apps.core.types import Outcome, TextDelta
from apps.scheduler import services
from apps.scheduler.dispatcher import Dispatcher
from tests.apps.fleet.modes.host import TINY, SshHost
from tests.apps.fleet.modes.site import controlling, ended, request, serving, until
from tests.apps.scheduler.factories import make_request
from tests.apps.scheduler.site import expected, principal
from tests.history import Client

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.timeout(240)]


@pytest.fixture
def light() -> bool:
    return True


@pytest.fixture
def _speaks(host: SshHost, tmp_path: Path, smollm2: Path, monkeypatch) -> None:
    """The arithmetic's tokens are of this vocabulary."""
    (tmp_path / "spoken").mkdir()
    (tmp_path / "spoken" / TINY).symlink_to(smollm2)
    changes = {"models_dir": tmp_path / "spoken", "switch_drain_ms": 300}
    monkeypatch.setattr(settings, "ENV", settings.ENV.model_copy(update=changes))


async def ask(max_tokens: int) -> tuple[Client, float]:
    """The whole stream, and the longest pause in it after its first token, in seconds."""
    sent = make_request(model=TINY, max_tokens=max_tokens)
    client, pause, last = Client(sent.id, "1", expected(sent)), 0.0, None
    await services.submit(sent, principal("1"))
    async for _, event in services.events(sent.id):
        client.events.append(event)
        if isinstance(event, TextDelta):
            pause, last = max(pause, time.monotonic() - (last or time.monotonic())), time.monotonic()
    return client, pause


@pytest.mark.usefixtures("_speaks")
async def test_none_fails_and_every_token_is_the_one_it_would_have_been(redis: Redis, host: SshHost) -> None:
    record = await sync_to_async(host.add)()
    stop = asyncio.Event()
    dispatchers = [asyncio.create_task(Dispatcher(redis, name).run(stop)) for name in ("d1", "d2")]
    async with controlling(redis):
        await until(lambda: serving(redis, host, "individual", 1))
        asked: list[asyncio.Task[tuple[Client, float]]] = []
        for mode in ("tensor_parallel", "individual"):
            switch = await request(record, mode)
            while not await ended(switch):
                asked += [asyncio.create_task(ask(length)) for length in (5, 300)]
                await asyncio.sleep(0.2)
            assert (switch.state, switch.reason) == ("succeeded", "")
            await until(lambda mode=mode: serving(redis, host, mode))
        done = await asyncio.gather(*asked)
    stop.set()
    await asyncio.gather(*dispatchers)
    await shared().aclose()
    assert {(client.end.outcome, client.end.error_message) for client, _ in done} == {(Outcome.SUCCEEDED, "")}
    assert [client.request_id for client, _ in done if client.tokens() != client.expected[0]] == []
    moved = max(pause for _, pause in done)
    print(f"{len(done)} requests, longest pause {moved:.2f} s")
    assert moved > 0.5, "some were moved, and waited until the old daemons had left"
