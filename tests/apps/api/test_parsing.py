"""JSON, schemas, headers and frames, without a server."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.api import sse
from apps.api.headers import duration, rate_limit_headers, request_id
from apps.api.json import parse_object
from apps.api.schemas import ChatRequest, CompletionRequest, parse
from apps.core.errors import InvalidRequest
from apps.core.types import RateLimitState

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"\\{[', max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text('ab{["', max_size=3), VALUES, max_size=4))
def test_every_honest_object_is_read_as_it_is(value: dict) -> None:
    assert parse_object(json.dumps(value).encode()) == value
    assert parse_object(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=200))
def test_no_bytes_are_anything_but_an_object_or_a_clean_refusal(body: bytes) -> None:
    try:
        outcome = type(parse_object(body)).__name__
    except InvalidRequest as error:
        outcome = error.code
    assert outcome in ("dict", "invalid_json", "invalid_request")


@pytest.mark.parametrize("body", [b"[" * 900_000, b'{"a":' * 150_000, b'{"a":' + b"1" * 900_000 + b"}"])
def test_hostile_bodies_are_refused_quickly(body: bytes) -> None:
    started = time.perf_counter()
    with pytest.raises(InvalidRequest):
        parse_object(body)
    assert time.perf_counter() - started < 1


def test_null_is_as_if_it_were_not_sent() -> None:
    nulls = dict.fromkeys(("temperature", "max_tokens", "stop", "seed", "n", "logit_bias", "stream"), None)
    assert parse(ChatRequest, {**CHAT, **nulls}) == parse(ChatRequest, CHAT).model_copy(update=nulls)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])],
)
def test_the_four_shapes_of_a_prompt(prompt, expected) -> None:
    assert parse(CompletionRequest, {"model": "m", "prompt": prompt}).prompts == expected


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [-1], {}, 5])
def test_other_prompts_are_refused(prompt) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse(CompletionRequest, {"model": "m", "prompt": prompt})
    assert refusal.value.param.startswith("prompt")


def test_request_ids_are_echoed_only_when_plain() -> None:
    assert request_id("abc-12345") == "abc-12345"
    for strange in (None, "", "a b", "x" * 65, "a\r\nb", "host:80"):
        assert request_id(strange).startswith("req_")


@pytest.mark.parametrize(("ms", "text"), [(0, "0ms"), (250, "250ms"), (1000, "1s"), (59_001, "1m0s"), (360_000, "6m0s")])
def test_durations_are_spelled_as_clients_expect(ms: int, text: str) -> None:
    assert duration(ms) == text


def test_a_limit_that_does_not_exist_has_no_header() -> None:
    headers = rate_limit_headers(RateLimitState(limit_requests=5, remaining_requests=4, reset_requests_ms=1))
    assert headers == {
        "x-ratelimit-limit-requests": "5",
        "x-ratelimit-remaining-requests": "4",
        "x-ratelimit-reset-requests": "1ms",
    }


async def test_a_silent_stream_is_kept_alive_and_ends_with_its_frames() -> None:
    async def slow():
        yield b"a"
        await asyncio.sleep(0.05)
        yield b"b"

    out = [piece async for piece in sse.kept_alive(slow(), every_ms=10)]
    assert [piece for piece in out if piece != sse.KEEP_ALIVE] == [b"a", b"b"]
    assert sse.KEEP_ALIVE in out


async def test_a_listener_that_leaves_ends_what_feeds_it() -> None:
    ended = asyncio.Event()

    async def endless():
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0.001)
        finally:
            ended.set()

    frames = sse.kept_alive(endless(), every_ms=1000)
    await anext(frames)
    await frames.aclose()
    assert ended.is_set()
