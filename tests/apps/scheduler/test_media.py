"""Work that is no text goes the way of text: priced, leased, fenced, resumed, ended once and charged by its units."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

import pytest
from redis.asyncio import Redis

from apps.core import blobs
from apps.core.errors import Unavailable
from apps.core.types import EmbedWork, ImageWork, MediaDelta, Outcome, SamplingParams, TranscribeWork, VideoWork
from apps.scheduler.cost import CostModel, price
from tests.apps.fleet.fake_daemon import MEDIA
from tests.apps.scheduler.factories import make_request
from tests.apps.scheduler.site import site

IMAGE = ImageWork("a lighthouse", 512, 512, steps=2)


def media(units: int) -> dict[str, object]:
    return {"prompts": (), "work": IMAGE, "max_tokens": units}


def test_units_of_a_request_are_those_of_all_its_choices() -> None:
    image = make_request(prompts=(), work=IMAGE, n=3, max_tokens=IMAGE.output_units)
    assert (image.num_choices, image.num_prompt_tokens, image.max_total_tokens) == (3, 3 * 1024, 3 * 1024 + 3 * 2048)
    embedding = make_request(prompts=((1, 2), (3, 4, 5)), work=EmbedWork(), max_tokens=1)
    assert (embedding.num_choices, embedding.num_prompt_tokens, embedding.max_total_tokens) == (2, 5, 7)
    assert VideoWork("", 720, 480, frames=49, steps=50).output_units == 50 * 13 * 1350
    assert (TranscribeWork(25).windows, TranscribeWork(25.5).windows) == (1, 2)


def test_the_price_is_of_the_whole_work_but_a_transcript_is_guessed() -> None:
    model = CostModel(prefill_ms=1.0, decode_ms=2.0)
    assert price(make_request(prompts=(), work=IMAGE, max_tokens=2048), model).expected_ms == 1024 + 2 * 2048
    spoken = TranscribeWork(10.0)
    assert price(make_request(prompts=(), work=spoken, max_tokens=spoken.output_units), model).tokens == 35


async def test_every_choice_gets_its_media_and_is_charged_by_its_units(redis: Redis, tmp_path: Path) -> None:
    async with site(redis, tmp_path / "log") as made:
        client = await made.run(**media(IMAGE.output_units), n=2)
        await made.check()
    given = [event for event in client.events if isinstance(event, MediaDelta) and event.media]
    assert [(event.choice, base64.b64decode(event.media), event.mime) for event in given] == [
        (0, MEDIA, "image/png"),
        (1, MEDIA, "image/png"),
    ]
    assert client.end.outcome is Outcome.SUCCEEDED
    assert (client.end.usage.prompt_tokens, client.end.usage.completion_tokens) == (2 * 1024, 2 * 2048)


async def test_work_of_a_worker_that_dies_goes_on_from_the_units_it_has(redis: Redis, tmp_path: Path) -> None:
    async with site(redis, tmp_path / "log", workers=2, step_seconds=0.05) as made:
        client = await made.submit(**media(1000))
        following = asyncio.create_task(made.follow(client))
        async with asyncio.timeout(5):
            while len(client.tokens()) < 400:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        victim = next(daemon for daemon in made.daemons if daemon._sequences)
        await made.kill(victim)
        await asyncio.wait_for(following, 8)
        other = next(daemon for daemon in made.daemons if daemon is not victim)
        assert other.submits[-1].choices[0].done_units >= 400
        await made.check()


async def test_attachments_reach_the_worker_and_survive_a_flush(redis: Redis, tmp_path: Path) -> None:
    picture = bytes(range(256))
    async with site(redis, tmp_path / "log", step_seconds=0.1, max_running=1) as made:
        ahead = asyncio.create_task(made.run(max_tokens=10))
        await asyncio.sleep(0.1)
        client = await made.submit(attachments=[picture])
        following = asyncio.create_task(made.follow(client))
        await redis.flushdb()
        await asyncio.wait_for(asyncio.gather(ahead, following), 20)
        submit = next(s for s in made.daemons[0].submits if s.request_id == client.request_id)
    assert list(submit.pictures) == [picture]
    assert client.end.outcome is Outcome.SUCCEEDED


async def test_an_attachment_that_is_gone_or_changed_is_said_to_be_lost(redis: Redis) -> None:
    kept = blobs.keyed([b"one"])
    await blobs.put(redis, kept, 1000)
    assert await blobs.take(redis, list(kept)) == [b"one"]
    await redis.set(f"blob:{next(iter(kept))}", "another")
    with pytest.raises(Unavailable):
        await blobs.take(redis, list(kept))
    with pytest.raises(Unavailable):
        await blobs.take(redis, ["0" * 64])


def test_requests_with_work_come_back_from_the_queue_as_they_were() -> None:
    from apps.scheduler.codec import decode_request, encode_request

    for work in (IMAGE, EmbedWork(8), TranscribeWork(1.5, prompt_ids=(1, 2)), VideoWork("p", 64, 64, 9, 2)):
        request = make_request(prompts=(), work=work, blobs=("a",), sampling=SamplingParams(3, seed=1))
        assert decode_request(encode_request(request)) == request
        assert json.loads(encode_request(request))["work"]["kind"] == work.kind
