"""Chats with images: priced and refused by their headers, answered by a real daemon on a tiny checkpoint."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import secrets
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from asgiref.sync import sync_to_async
from django.conf import settings as django_settings
from django.core.management import call_command
from django.test import AsyncClient
from PIL import Image
from redis.asyncio import Redis
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from apps.accounts import auth
from apps.accounts.services import api_key_create, organization_create
from apps.api import pictures
from apps.api.schemas import ChatRequest, parse
from apps.core.errors import InvalidRequest
from apps.core.redis import shared
from apps.fleet import registry, selectors
from apps.fleet.daemon_client import DaemonClient
from apps.fleet.pictures import PictureSizes, picture_sizes
from apps.fleet.tokenizers import ModelTokenizer, tokenizer_for
from apps.fleet.weights import make_tiny
from apps.scheduler import services
from apps.scheduler.dispatcher import Dispatcher
from gpu_daemon.__main__ import serve
from gpu_daemon.config import DaemonConfig
from tests.pictures import BOMBS, TRUNCATED, data_url, picture, png, saved
from tests.services import free_port

MODEL = "qwen2.5-vl-3b"
TABLE = {(28, 28): 4, (224, 224): 64, (640, 480): 391, (1024, 1024): 1369, (1920, 1080): 2691, (3840, 2160): 10549,
         (8000, 6000): 16170}  # fmt: skip


def image(data: bytes | str, **options) -> dict:
    return {"type": "image_url", "image_url": {"url": data if isinstance(data, str) else data_url(data), **options}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def read_all(*parts: dict) -> list[pictures.Picture]:
    return pictures.read_all(parse(ChatRequest, {"model": MODEL, "messages": [user(*parts)]}).messages)


# --- What an image costs ---


def test_tokens_are_the_published_ones() -> None:
    assert {size: PictureSizes().tokens(*size) for size in TABLE} == TABLE


def test_tokens_equal_those_of_the_models_processor() -> None:
    rng, sizes = random.Random(2), PictureSizes()
    for _ in range(20_000):
        width = int(2 ** rng.uniform(0, 14))
        height = max(1, min(16_384, int(width * 2 ** rng.uniform(-7.6, 7.6))))
        bound = rng.choice([0, pictures.LOW_PIXELS, 1])
        if max(width, height) <= 200 * min(width, height):
            most = max(sizes.min_pixels, bound or sizes.max_pixels)
            down, across = smart_resize(height, width, 28, sizes.min_pixels, most)
            assert sizes.tokens(width, height, bound) == down * across // 784


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "options", [{}, {"lossless": True}, {"exif": b"Exif\0\0" + bytes(50)}], ids=["plain", "lossless", "exif"]
)
def test_sizes_are_read_from_every_kind_of_header(form: str, options: dict) -> None:
    (found,) = read_all(image(picture(301, 77, form=form, **options), detail="low"))
    assert (found.width, found.height, found.bound) == (301, 77, 512 * 512)


# --- What is refused ---


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_what_must_not_be_decoded_is_refused_by_its_header(name: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read_all(text("look"), image(BOMBS[name]))
    assert (refusal.value.status, refusal.value.code) == (400, "invalid_image")
    assert refusal.value.param == "messages[0].content[1].image_url"
    assert "0x" not in refusal.value.message


def test_bombs_take_no_memory() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    for data in BOMBS.values():
        with pytest.raises(InvalidRequest):
            read_all(image(data))
    assert process.memory_info().rss - before <= 16 << 20


@pytest.mark.parametrize(
    "address",
    ["http://169.254.169.254/", "https://example.com/a.png", "file:///etc/passwd", "http://[::ffff:127.0.0.1]/", "//a\\@b", "",
     "data:text/html;base64,AAAA", "data:image/svg+xml;base64,AAAA", "data:image/png,AAAA", " data:image/png;base64,AAAA"],
)  # fmt: skip
def test_no_address_is_fetched(address: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read_all(image(address))
    assert (refusal.value.code, refusal.value.param) == ("invalid_image_url", "messages[0].content[0].image_url")


@pytest.mark.parametrize("rest", ["", "A", "AAAA AAAA", "$$$$", "AA==AA==", "\u00e4"])
def test_what_is_not_base64_is_refused(rest: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read_all(image("data:image/png;base64," + rest))
    assert refusal.value.code == "invalid_image"


def test_images_are_counted_and_weighed_before_they_are_read(settings) -> None:
    small = picture()
    assert len(read_all(*[image(small)] * 16)) == 16
    with pytest.raises(InvalidRequest) as refusal:
        read_all(*[image(small)] * 17)
    assert (refusal.value.code, refusal.value.param) == ("too_many_images", "messages[0].content[16].image_url")
    with pytest.raises(InvalidRequest):
        read_all(*[image(small)] * 10_000)
    settings.ENV = settings.ENV.model_copy(update={"max_image_bytes": len(small), "max_images_bytes": 2 * len(small)})
    assert len(read_all(image(small), image(small))) == 2
    for parts in ([image(picture(90, 90))], [image(small)] * 3):
        with pytest.raises(InvalidRequest) as refusal:
            read_all(*parts)
        assert refusal.value.code == "image_too_large"


def test_only_users_have_images() -> None:
    from apps.api.messages import conversation

    body = parse(ChatRequest, {"model": MODEL, "messages": [{**user(image(picture())), "role": "system"}]})
    with pytest.raises(InvalidRequest) as refusal:
        conversation(body.messages)
    assert refusal.value.param == "messages[0].content[0].image_url"


# --- A site with a real daemon ---


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny(MODEL, folder, lambda *_: None)
    return folder


@pytest.fixture
async def headers(redis: Redis, models_dir: Path, smollm2: Path, settings) -> AsyncIterator[dict[str, str]]:
    """Of a client, once the model can be asked."""
    for cache in (auth._cache, selectors._cache, services._shortest):
        cache.clear()
    tokenizer_for.cache_clear()
    settings.ENV = settings.ENV.model_copy(update={"models_dir": models_dir})
    await sync_to_async(call_command)("loaddata", "models", verbosity=0)
    stop = asyncio.Event()
    token = settings.ENV.daemon_token.get_secret_value()
    config = DaemonConfig("w", "127.0.0.1", free_port(), models_dir, token, max_model_len=2048, threads=2, kv_bytes=2**27,
                          preload=(MODEL,), drain_seconds=0.1)  # fmt: skip
    tasks = [
        asyncio.create_task(serve(config, stop)),
        asyncio.create_task(publish(redis, f"127.0.0.1:{config.port}", token)),
        asyncio.create_task(Dispatcher(redis, "d").run(stop)),
    ]
    try:
        async with asyncio.timeout(60):
            while not any((held := w.resident(MODEL)) and held.state == "ready" for w in await workers(redis)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        yield {"authorization": f"Bearer {await sync_to_async(new_key)()}"}
    finally:
        stop.set()
        tasks.pop(1).cancel()
        await asyncio.gather(*tasks)
        await shared().aclose()
        tokenizer_for.cache_clear()


def new_key() -> str:
    organization = organization_create(name=f"o{secrets.token_hex(4)}", actor="me")
    return api_key_create(organization=organization, name="n", actor="me")[1]


async def workers(redis: Redis) -> list:
    return await registry.workers(redis, timeout_ms=5000)


async def publish(redis: Redis, address: str, token: str) -> None:
    """What the controller does."""
    client = DaemonClient(address, token)
    try:
        async for snapshot in client.watch_status(100):
            await registry.publish(redis, dataclasses.replace(snapshot, address=address))
    finally:
        await client.close()


async def ask(headers: dict[str, str], *parts: dict, path: str = "/v1/chat/completions", **fields):
    body = {"model": MODEL, "messages": [user(*parts)], "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    sent = json.dumps({name: value for name, value in body.items() if value is not None})
    return await AsyncClient().post(path, sent, content_type="application/json", headers=headers)


def said(body: dict) -> list[list[int]]:
    """The bytes of each token."""
    return [entry["bytes"] for entry in body["choices"][0]["logprobs"]["content"]]


def expected(folder: Path, files: list[bytes], ids: list[int]) -> list[list[int]]:
    """What `generate` answers."""
    tokenizer = ModelTokenizer(folder)
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig()
    seen = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[Image.open(BytesIO(f)) for f in files], return_tensors="pt")
    prompt = torch.tensor([ids])
    answer = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), mm_token_type_ids=(prompt == tokenizer.picture_token).int(), **seen,
        max_new_tokens=8, min_new_tokens=8, do_sample=False,
    )  # fmt: skip
    return [list(tokenizer.token_bytes(token)) for token in answer[0, len(ids) :].tolist()]


ONE, TWO = picture(200, 120, seed=1), picture(120, 200, seed=2, form="WEBP", lossless=True)


@pytest.mark.django_db(transaction=True)
async def test_an_answer_is_the_models_own_and_its_images_are_counted(headers: dict[str, str], models_dir: Path) -> None:
    parts = [text("A <|image_pad|> b"), image(ONE), text("and"), image(TWO)]
    first = (await ask(headers, *parts, logprobs=True)).json()
    sizes = picture_sizes(models_dir / MODEL)
    tokens = [sizes.tokens(200, 120), sizes.tokens(120, 200)]
    plain = [{"role": "user", "content": [text("A <|image_pad|> b"), {"type": "image"}, text("and"), {"type": "image"}]}]
    ids = ModelTokenizer(models_dir / MODEL).encode_chat(plain, pictures=tokens)
    assert ids.count(268) == sum(tokens)
    assert said(first) == expected(models_dir / MODEL, [ONE, TWO], ids)
    usage = first["usage"]
    assert usage["prompt_tokens"] == len(ids)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": sum(tokens)}
    again = (await ask(headers, *parts, logprobs=True)).json()
    assert said(again) == said(first)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == (len(ids) - 1) // 16 * 16
    other = (await ask(headers, parts[0], image(picture(200, 120, seed=9)), *parts[2:], logprobs=True)).json()
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] < len(ids) - sum(tokens)


@pytest.mark.django_db(transaction=True)
async def test_images_and_words_run_beside_each_other_and_are_priced(headers: dict[str, str], redis: Redis) -> None:
    crowd = [ask(headers, image(picture(100 + 20 * i, 140, seed=i)), text("?")) for i in range(4)]
    crowd += [ask(headers, text(f"word {i}"), n=2) for i in range(3)]
    answers = await asyncio.gather(*crowd, ask(headers, text("x"), image(ONE, detail="high"), n=2))
    assert {answer.status_code for answer in answers} == {200}
    low = (await ask(headers, image(picture(1000, 1000), detail="low"), path="/v1/estimate")).json()
    full = (await ask(headers, image(picture(1000, 1000), detail="auto"), path="/v1/estimate")).json()
    assert full["prompt_tokens"] - low["prompt_tokens"] == 36 * 36 - 18 * 18
    answer = (await ask(headers, image(picture(1000, 1000), detail="low"))).json()
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 18 * 18


@pytest.mark.django_db(transaction=True)
async def test_refusals_over_http(headers: dict[str, str]) -> None:
    async def refused(*parts: dict, **fields) -> tuple[int, str, str]:
        answer = await ask(headers, *parts, **fields)
        error = answer.json()["error"]
        return answer.status_code, error["code"], error["param"]

    place = "messages[0].content[0].image_url"
    assert await refused(image("http://127.0.0.1:1/x.png")) == (400, "invalid_image_url", place)
    assert await refused(image(png(10_000, 10_000))) == (400, "invalid_image", place)
    assert await refused(image(ONE, detail="max")) == (400, "invalid_value", f"{place}.detail")
    assert await refused(image(ONE, size=5)) == (400, "unsupported_parameter", f"{place}.size")
    assert await refused({"type": "input_audio"}) == (400, "invalid_value", "messages[0].content[0].type")
    assert await refused(image(picture(1400, 1400))) == (400, "context_length_exceeded", "messages")
    assert await refused(prompt=[268], messages=None, path="/v1/completions") == (400, "invalid_value", "prompt")
    # Its header is whole and its data is not, which shows as it is decoded.
    damaged = picture(200, 200, form="JPEG")
    assert await refused(image(damaged[: len(damaged) // 2])) == (400, "invalid_image", "messages")
    assert (await ask(headers, text("still here"))).status_code == 200


@pytest.mark.django_db(transaction=True)
async def test_a_cancelled_request_leaves_nothing_behind(headers: dict[str, str], redis: Redis) -> None:
    async def load() -> tuple[int, int]:
        (worker,) = await workers(redis)
        held = worker.resident(MODEL)
        return held.running + held.waiting, held.kv_blocks_free

    before = await load()
    asking = asyncio.create_task(ask(headers, image(picture(600, 600)), max_tokens=1400))
    async with asyncio.timeout(20):
        while (await load())[0] == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(20):
        while await load() != before:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def test_the_tests_own_bombs_are_what_they_are_said_to_be() -> None:
    assert Image.open(BytesIO(picture(600, 400))).size == Image.open(BytesIO(TRUNCATED)).size == (600, 400)
    assert saved(Image.new("RGB", (3, 3)))[:4] == b"\x89PNG"
    assert django_settings.ENV.max_images == 16
