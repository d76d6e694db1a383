"""Pictures over `/ws/chat`: progress, sketches, the picture; resumed and cancelled as chats are."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.testing import WebsocketCommunicator
from django.core.management import call_command
from PIL import Image
from redis.asyncio import Redis

from apps.accounts import auth
from apps.api.consumers import ChatConsumer
from apps.fleet import selectors
from apps.fleet.weights import make_tiny
from tests.apps.api.test_media import post
from tests.apps.api.test_queue import client
from tests.real_site import DaemonProcess, real_site

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.timeout(120)]
IMAGES = "/v1/images/generations"
BODY = {"model": "sd-turbo", "prompt": "a lighthouse", "size": "64x64", "steps": 3, "seed": 5}
Frame = dict[str, Any]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("models")
    make_tiny("sd-turbo", folder, lambda *_: None)
    process = DaemonProcess("w0", ["sd-turbo"], folder, folder / "log", "--threads", "1")
    yield process
    process.stop()


@pytest.fixture
async def headers(redis: Redis, daemon: DaemonProcess) -> AsyncIterator[dict[str, str]]:
    auth._cache.clear()
    selectors._cache.clear()
    await sync_to_async(call_command)("loaddata", "models", verbosity=0)
    async with real_site(redis, daemon):
        yield await client("socket")


@asynccontextmanager
async def socket(headers: dict[str, str]) -> AsyncIterator[WebsocketCommunicator]:
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    connection = WebsocketCommunicator(ChatConsumer.as_asgi(), "/ws/chat", headers=sent)
    assert (await connection.connect())[0]
    yield connection
    await connection.disconnect()


async def start(connection: WebsocketCommunicator, **fields: Any) -> None:
    await connection.send_json_to({"type": "start", "id": "a", "endpoint": IMAGES, "request": {**BODY, **fields}})


async def until(connection: WebsocketCommunicator, kind: str) -> list[Frame]:
    frames = [await connection.receive_json_from(30)]
    while frames[-1]["type"] != kind:
        frames.append(await connection.receive_json_from(30))
    return frames


def size_of(data: str) -> tuple[str | None, tuple[int, int]]:
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return image.format, image.size


async def test_progress_and_sketches_lead_to_the_picture_that_http_gives(headers: dict[str, str]) -> None:
    async with socket(headers) as connection:
        await start(connection, partial_images=1)
        frames = await until(connection, "finished")
    progress = [frame for frame in frames if frame["type"] == "progress"]
    steps, (picture,) = progress[:-1], progress[-1:]
    assert [(frame["done"], frame["total"]) for frame in progress] == [(16, 48), (32, 48), (48, 48), (48, 48)]
    assert all(frame["preview"] and size_of(frame["data"])[0] == "JPEG" for frame in steps)
    assert (picture["preview"], picture["mime"], size_of(picture["data"])) == (False, "image/png", ("PNG", (64, 64)))
    assert [frame["event_id"] for frame in frames if "event_id" in frame] == list(range(1, len(progress) + 3))
    assert (frames[-1]["outcome"], frames[-1]["usage"]["completion_tokens"]) == ("succeeded", 48)
    whole = (await post(headers, IMAGES, **BODY, response_format="b64_json")).json()
    assert whole["data"][0]["b64_json"] == picture["data"]


async def test_without_partial_images_there_is_progress_alone_for_each_picture(headers: dict[str, str]) -> None:
    async with socket(headers) as connection:
        await start(connection, n=2)
        frames = await until(connection, "finished")
    for choice in (0, 1):
        progress = [frame for frame in frames if frame["type"] == "progress" and frame["choice"] == choice]
        assert ["data" in frame for frame in progress] == [False, False, False, True]


async def test_another_socket_goes_on_with_a_picture(headers: dict[str, str]) -> None:
    async with socket(headers) as connection:
        await start(connection, partial_images=3)
        seen = await until(connection, "progress")
    request_id = next(frame["request_id"] for frame in seen if frame["type"] == "accepted")
    async with socket(headers) as connection:
        await connection.send_json_to({"type": "resume", "id": "b", "request_id": request_id, "after": seen[-1]["event_id"]})
        rest = await until(connection, "finished")
        await connection.send_json_to({"type": "resume", "id": "c", "request_id": request_id})
        whole = await until(connection, "finished")
    assert [frame["done"] for frame in rest if frame["type"] == "progress"] == [32, 48, 48]
    assert [frame["event_id"] for frame in whole[1:]] == list(range(1, 7))
    assert rest[-1]["outcome"] == "succeeded"


async def test_a_picture_is_cancelled(headers: dict[str, str]) -> None:
    async with socket(headers) as connection:
        await start(connection, size="512x512", steps=4, n=2)
        await until(connection, "progress")
        await connection.send_json_to({"type": "cancel", "id": "a"})
        end = (await until(connection, "finished"))[-1]
    assert end["outcome"] == "cancelled"
    assert 0 < end["usage"]["completion_tokens"] < 2 * 4 * 32 * 32


@pytest.mark.parametrize(
    ("frame", "code", "param"),
    [
        ({"endpoint": "/v1/audio/speech"}, "invalid_value", "endpoint"),
        ({"endpoint": ["/v1/images/generations"]}, "invalid_value", "endpoint"),
        ({"request": {**BODY, "size": "63x63"}}, "invalid_value", "size"),
        ({"request": {**BODY, "stream": False}}, "invalid_value", "stream"),
        ({"request": {**BODY, "output_format": "webp"}}, "invalid_value", "output_format"),
        ({"request": {**BODY, "response_format": "url"}}, "invalid_value", "response_format"),
        ({"request": {**BODY, "style": "vivid"}}, "unsupported_parameter", "style"),
        ({"request": "a lighthouse"}, "invalid_message", None),
    ],
)
async def test_what_cannot_be_is_refused_by_name(headers: dict[str, str], frame: Frame, code: str, param: str | None) -> None:
    async with socket(headers) as connection:
        await connection.send_to(json.dumps({"type": "start", "id": "a", "endpoint": IMAGES, "request": BODY, **frame}))
        told = await connection.receive_json_from(10)
    assert (told["type"], told["id"], told["error"]["code"], told["error"]["param"]) == ("error", "a", code, param)
