"""Whatever the work is, when its client hangs up or cancels: one step more, then nothing of it is left, and what was done is
charged."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from asgiref.sync import sync_to_async
from django.core.management import call_command
from redis.asyncio import Redis

from apps.api import intake
from apps.api.answer import followed
from apps.core.blobs import keyed
from apps.core.tasks import end
from apps.core.types import EmbedWork, ImageWork, InferenceRequest, MediaDelta, SpeechWork, TextDelta, TranscribeWork, VideoWork
from apps.core.types import WorkerSnapshot as Snapshot
from apps.fleet import selectors
from apps.fleet.weights import make_tiny, pull
from apps.scheduler import queue, services
from apps.scheduler.codec import decode_event
from tests.apps.scheduler.factories import make_request
from tests.apps.scheduler.site import principal
from tests.pictures import data_url, picture
from tests.real_site import DaemonProcess, real_site

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.timeout(400)]
TINY = ("sd-turbo", "cogvideox-2b", "qwen2.5-vl-3b", "kokoro-82m")  # the real Kokoro takes seconds to each of its steps
REAL = ("minilm-l6-v2", "whisper-tiny.en")
WORD_SECONDS = 3.0  # by then a daemon has heard of a cancellation, however busy the machine; shorter steps are taken meanwhile
AT_ONCE, ROUNDS = 5, 4
SLACK_BYTES = 48 << 20
NOISE = np.random.default_rng(1).integers(-3000, 3000, 16_000 * 120, np.int16).astype("<i2").tobytes()
Begun = tuple[InferenceRequest, dict[str, bytes]]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("models")
    for model in REAL:
        pull(model, models_dir, lambda *_: None)
        (folder / model).symlink_to(models_dir / model)
    for model in TINY:
        make_tiny(model, folder, lambda *_: None)
    process = DaemonProcess("w0", [*TINY, *REAL], folder, folder / "log", "--threads", "1")
    yield process
    process.stop()


@pytest.fixture
async def site(redis: Redis, daemon: DaemonProcess, settings: Any) -> AsyncIterator[None]:
    # However slow this machine is, nothing is refused for the time that it would take.
    settings.ENV = settings.ENV.model_copy(update={"models_dir": daemon.models_dir, "queue_max_drain_ms": 10**12})
    selectors._cache.clear()
    await sync_to_async(call_command)("loaddata", "models", verbosity=0)
    async with real_site(redis, daemon, seconds=300):
        yield


def media(model: str, work: Any, *, attachments: tuple[bytes, ...] = (), **fields: Any) -> Begun:
    kept = keyed(attachments)
    fields = {"prompts": (), "blobs": tuple(kept), "max_tokens": work.output_units, **fields}
    return make_request(model=model, work=work, **fields), kept


async def speech() -> Begun:
    return media("kokoro-82m", SpeechWork("The quick brown fox jumps over the lazy dog. " * 60, "af_heart"))


async def embedding() -> Begun:
    return media("minilm-l6-v2", EmbedWork(), prompts=((1000,) * 50,) * 320)


async def transcription() -> Begun:
    return media("whisper-tiny.en", TranscribeWork(120.0), attachments=(NOISE,))


async def image() -> Begun:
    return media("sd-turbo", ImageWork("a lighthouse", 512, 512, steps=4))


async def video() -> Begun:
    return media("cogvideox-2b", VideoWork("a lighthouse", 128, 128, frames=49, steps=50))


async def vision() -> Begun:
    seen = {"type": "image_url", "image_url": {"url": data_url(picture(560, 560))}}
    message = {"role": "user", "content": [seen, {"type": "text", "text": "What is it?"}]}
    body = {"model": "qwen2.5-vl-3b", "messages": [message], "max_tokens": 1000, "ignore_eos": True}
    _, prepared = await intake.chat(lambda: body, principal())
    return prepared.request, dict(prepared.attachments)


class Watch:
    """What the daemon says of itself, as it says it."""

    latest: Snapshot

    async def follow(self, daemon: DaemonProcess, begun: asyncio.Event) -> None:
        client = daemon.client()
        try:
            async with aclosing(client.watch_status(50)) as statuses:
                async for self.latest in statuses:
                    begun.set()
        finally:
            await client.close()

    async def until(self, condition: Callable[[Snapshot], bool]) -> Snapshot:
        async with asyncio.timeout(90):
            while not condition(self.latest):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return self.latest

    async def at_work(self, model: str) -> Snapshot:
        """Past the first step of what was just submitted."""
        since = self.latest.step
        return await self.until(lambda now: now.step > since and now.resident(model).in_flight > 0)

    async def idle(self, model: str) -> Snapshot:
        return await self.until(lambda now: now.resident(model).in_flight == 0)


@pytest.fixture
async def watch(site: None, daemon: DaemonProcess) -> AsyncIterator[Watch]:
    made, begun = Watch(), asyncio.Event()
    task = asyncio.create_task(made.follow(daemon, begun))
    await asyncio.wait_for(begun.wait(), 10)
    yield made
    await end(task)


async def follow(request: InferenceRequest) -> None:
    async with aclosing(followed(request.id)) as events:
        async for _ in events:
            pass


async def ended(redis: Redis, request: InferenceRequest) -> dict[str, Any]:
    """The ledger's row, once it is there."""
    async with asyncio.timeout(10):
        while True:
            rows = [json.loads(fields["entry"]) for _, fields in await redis.xrange("ledger")]
            if found := [row for row in rows if row["request_id"] == request.id]:
                assert len(found) == 1
                return found[0]
            await asyncio.sleep(0.02)


async def units_published(redis: Redis, request: InferenceRequest) -> int:
    events = [decode_event(fields["e"]) for _, fields in await redis.xrange(f"events:{request.id}")]
    texts = sum(len(event.token_ids) for event in events if isinstance(event, TextDelta))
    return texts + sum(event.units for event in events if isinstance(event, MediaDelta))


async def at_rest(redis: Redis, model: str) -> bool:
    lanes, busy = await queue.depths(redis)
    return not any(busy.values()) and (lanes[model].waiting, lanes[model].running, lanes[model].work_ms) == (0, 0, 0)


MAKERS = [speech, embedding, transcription, image, video, vision]


@pytest.mark.parametrize("make", MAKERS, ids=[make.__name__ for make in MAKERS])
async def test_an_abort_takes_one_step_and_leaves_nothing(make: Any, watch: Watch, redis: Redis) -> None:
    request, kept = await make()
    before = watch.latest.resident(request.model)
    await services.submit(request, principal(), kept)
    client = asyncio.create_task(follow(request))
    working = await watch.at_work(request.model)
    hung_up = time.monotonic()
    await end(client)
    after = await watch.idle(request.model)
    # The step that it was in, and one that began while the word went round.
    assert after.step - working.step <= 2 or time.monotonic() - hung_up < WORD_SECONDS
    assert after.resident(request.model).kv_blocks_free == before.kv_blocks_free
    row = await ended(redis, request)
    assert (row["outcome"], row["completion_tokens"]) == ("cancelled", await units_published(redis, request))
    assert row["completion_tokens"] < request.num_choices * request.sampling.max_tokens
    assert await at_rest(redis, request.model)


@pytest.mark.parametrize("make", MAKERS, ids=[make.__name__ for make in MAKERS])
async def test_memory_is_as_before_after_twenty_aborts(make: Any, watch: Watch, redis: Redis, daemon: DaemonProcess) -> None:
    process, sizes = psutil.Process(daemon.process.pid), []
    for _ in range(ROUNDS):
        begun = [await make() for _ in range(AT_ONCE)]
        for request, kept in begun:
            await services.submit(request, principal(), kept)
        await watch.at_work(begun[0][0].model)
        await asyncio.gather(*(services.cancel(request.id) for request, _ in begun))
        assert {(await ended(redis, request))["outcome"] for request, _ in begun} == {"cancelled"}
        await watch.idle(begun[0][0].model)
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[1] < SLACK_BYTES, [size >> 20 for size in sizes]
    assert await at_rest(redis, begun[0][0].model)
