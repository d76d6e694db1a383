"""`/ws/chat` against the whole stack."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, suppress

import httpx
import pytest
import websockets

from tests.e2e.conftest import RunningStack

BODY = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Count to ten."}], "temperature": 0}


@asynccontextmanager
async def socket(stack: RunningStack, *, authorized: bool = True, **options):
    headers = stack.headers if authorized else {}
    url = stack.url.replace("http", "ws") + "/ws/chat"
    async with websockets.connect(url, additional_headers=headers, **options) as connection:
        yield connection


async def send(connection, **frame) -> None:
    await connection.send(json.dumps(frame))


async def receive(connection) -> dict:
    return json.loads(await asyncio.wait_for(connection.recv(), 30))


async def until(connection, kind: str) -> list[dict]:
    frames = [await receive(connection)]
    while frames[-1]["type"] != kind:
        frames.append(await receive(connection))
    return frames


def text_of(frames: list[dict]) -> str:
    return "".join(frame["text"] for frame in frames if frame["type"] == "token")


CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {**CITY, "additionalProperties": False}}}


def pieces_of(frames: list[dict]) -> list[dict]:
    return [piece for frame in frames for piece in frame.get("tool_calls", ())]


async def test_a_call_is_streamed_and_goes_on_on_another_socket(stack: RunningStack) -> None:
    request = {**BODY, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 80}
    async with socket(stack) as connection:
        await send(connection, type="start", id="a", request=request)
        whole = await until(connection, "finished")
        first = [frame for frame in whole if frame.get("event_id", 99) <= 20]
        await send(connection, type="resume", id="b", request_id=whole[0]["request_id"], after=20)
        rest = await until(connection, "finished")
    pieces = pieces_of(whole)
    assert (pieces[0]["type"], pieces[0]["function"]["name"]) == ("function", "get_weather")
    assert set(json.loads("".join(piece["function"]["arguments"] for piece in pieces))) == {"city"}
    assert pieces_of(first) + pieces_of(rest) == pieces
    assert whole[-2]["finish_reason"] == "tool_calls"
    assert text_of(whole) == ""


async def test_two_requests_stream_over_one_socket(stack: RunningStack) -> None:
    async with socket(stack) as connection:
        for name in ("a", "b"):
            await send(connection, type="start", id=name, request={**BODY, "max_tokens": 8})
        ends: dict[str, dict] = {}
        frames: list[dict] = []
        while len(ends) < 2:
            frame = await receive(connection)
            frames.append(frame)
            if frame["type"] == "finished":
                ends[frame["id"]] = frame
        by_id = {name: [f for f in frames if f["id"] == name] for name in ends}
        assert text_of(by_id["a"]) == text_of(by_id["b"]) != ""
        numbers = [f["event_id"] for f in by_id["a"] if "event_id" in f]
        assert numbers == list(range(1, len(numbers) + 1))


async def test_the_first_frame_may_authenticate(stack: RunningStack) -> None:
    async with socket(stack, authorized=False) as connection:
        await send(connection, type="start", id="a", request=BODY)
        assert (await receive(connection))["error"]["code"] == "missing_api_key"
        await send(connection, type="auth", api_key=stack.key)
        assert (await receive(connection))["type"] == "authenticated"
        await send(connection, type="start", id="a", request={**BODY, "max_tokens": 2})
        assert (await until(connection, "finished"))[-1]["outcome"] == "succeeded"


async def test_a_reconnected_client_resumes_where_it_was(stack: RunningStack) -> None:
    async with socket(stack) as connection:
        await send(connection, type="start", id="whole", request={**BODY, "max_tokens": 30})
        whole = text_of(await until(connection, "finished"))
        await send(connection, type="start", id="cut", request={**BODY, "max_tokens": 30})
        request_id = (await receive(connection))["request_id"]
        seen = [await receive(connection) for _ in range(3)]
    async with socket(stack) as connection:
        await send(connection, type="resume", id="cut", request_id=request_id, after=seen[-1]["event_id"])
        rest = await until(connection, "finished")
    assert text_of(seen) + text_of(rest) == whole


async def test_cancel_ends_a_request_at_once(stack: RunningStack) -> None:
    async with socket(stack) as connection:
        await send(connection, type="start", id="a", request={**BODY, "max_tokens": 2000, "ignore_eos": True})
        await until(connection, "token")
        await send(connection, type="cancel", id="a")
        end = (await until(connection, "finished"))[-1]
        assert end["outcome"] == "cancelled"
        assert end["usage"]["completion_tokens"] < 200


async def test_another_organization_cannot_resume(stack: RunningStack) -> None:
    other = json.loads(stack.manage("create_key", "--org", "other", "--json"))["key"]
    async with socket(stack) as connection:
        await send(connection, type="start", id="a", request={**BODY, "max_tokens": 2})
        request_id = (await receive(connection))["request_id"]
        await until(connection, "finished")
    async with socket(stack, authorized=False) as connection:
        await send(connection, type="auth", api_key=other)
        await receive(connection)
        await send(connection, type="resume", id="a", request_id=request_id, after=0)
        assert (await receive(connection))["error"]["code"] == "not_found"


async def test_three_strikes_close_the_socket(stack: RunningStack) -> None:
    async with socket(stack) as connection:
        for nonsense in ("{", '{"type": "dance"}', "[]"):
            await connection.send(nonsense)
        codes = []
        with suppress(websockets.ConnectionClosedError):
            async for frame in connection:
                codes.append(json.loads(frame)["error"]["code"])
    assert codes == ["invalid_message"] * 3
    assert connection.close_code == 1008


async def test_binary_frames_are_not_spoken_here(stack: RunningStack) -> None:
    async with socket(stack) as connection:
        await connection.send(b"\x00")
        await asyncio.wait_for(connection.wait_closed(), 10)
    assert connection.close_code == 1003


async def test_a_message_beyond_the_cap_closes_the_socket(stack: RunningStack) -> None:
    async with socket(stack) as connection:
        await connection.send("x" * ((1 << 20) + 1))
        await asyncio.wait_for(connection.wait_closed(), 10)
    assert connection.close_code == 1009


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "https://127.0.0.1.evil.example"])
async def test_foreign_pages_are_refused_before_anything_else(stack: RunningStack, origin: str) -> None:
    with pytest.raises(websockets.InvalidStatus) as refusal:
        async with socket(stack, origin=origin):
            pass
    assert refusal.value.response.status_code == 403


async def test_a_bad_key_in_the_header_is_refused_at_the_handshake(stack: RunningStack) -> None:
    url = stack.url.replace("http", "ws") + "/ws/chat"
    with pytest.raises(websockets.InvalidStatus) as refusal:
        async with websockets.connect(url, additional_headers={"Authorization": "Bearer sk-nope"}):
            pass
    assert refusal.value.response.status_code == 403


async def test_a_revoked_key_loses_its_socket(stack: RunningStack) -> None:
    made = json.loads(stack.manage("create_key", "--org", "demo", "--json"))
    async with socket(stack, authorized=False) as connection:
        await send(connection, type="auth", api_key=made["key"])
        await receive(connection)
        async with httpx.AsyncClient(base_url=stack.url, headers=stack.headers) as operator:
            revoked = await operator.post(f"/api/keys/{made['id']}/revoke/")
        assert revoked.json()["state"] == "revoked"
        await asyncio.wait_for(connection.wait_closed(), 20)
    assert connection.close_code == 4401
