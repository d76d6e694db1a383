"""The `anthropic` SDK against the whole stack, on real weights."""

from __future__ import annotations

import anthropic
import jsonschema
import pytest

from tests.e2e.conftest import RunningStack

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 30}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"name": "get_weather", "description": "The weather in a city", "input_schema": CITY}]
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture
def client(stack: RunningStack):
    with anthropic.Anthropic(base_url=stack.url, api_key=stack.key, max_retries=0, timeout=60) as client:
        yield client


GREEDY = {"temperature": 0}  # the SDK has no argument for it


def ask(client: anthropic.Anthropic, *, extra_body=GREEDY, **fields):
    asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 24, **fields}
    return client.messages.create(**asked, extra_body=extra_body)


def test_a_message_is_right_counted_and_of_anthropic_s_shape(client) -> None:
    message = ask(client)
    anthropic.types.Message.model_validate(message.model_dump(), strict=True)
    assert "Paris" in message.content[0].text
    assert message.id.startswith("msg_")
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message._request_id
    counted = client.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == counted


def test_a_second_turn_reads_the_cache(client) -> None:
    system = [
        {"type": "text", "text": "You answer questions about cities, shortly. " * 12, "cache_control": {"type": "ephemeral"}}
    ]
    first = ask(client, system=system)
    again = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And of Italy?"}]
    assert ask(client, system=system, messages=again).usage.cache_read_input_tokens >= 100


def test_the_sdk_s_own_accumulator_puts_a_stream_together(client) -> None:
    with client.messages.stream(model=MODEL, messages=QUESTION, max_tokens=24, extra_body=GREEDY) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    whole = ask(client)
    assert final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    raw = [kind for kind in kinds if kind not in ("text",)]
    assert raw[0] == "message_start"
    assert raw[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert kinds.count("content_block_start") == 1


def test_the_limit_and_the_stop_sequence_that_ended_it_are_named(client) -> None:
    cut = ask(client, max_tokens=2)
    assert (cut.stop_reason, cut.stop_sequence, cut.usage.output_tokens) == ("max_tokens", None, 2)
    stopped = ask(client, stop_sequences=["Rome", "Paris"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Paris")
    assert "Paris" not in stopped.content[0].text


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_tool_is_used_and_its_result_goes_back(client, choice) -> None:
    options = {"tools": TOOLS, "tool_choice": {**choice, "disable_parallel_tool_use": True}, "max_tokens": 100}
    message = ask(client, messages=ASK, **options)
    (use,) = message.content
    assert (message.stop_reason, use.type, use.name) == ("tool_use", "tool_use", "get_weather")
    jsonschema.validate(use.input, CITY)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "Sunny."}]}
    turn = [*ASK, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    assert ask(client, messages=turn, tools=TOOLS, tool_choice={"type": "none"}).content[0].type == "text"


def test_a_streamed_tool_use_comes_in_pieces_of_json(client) -> None:
    options = {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "get_weather"}, "max_tokens": 100}
    with client.messages.stream(model=MODEL, messages=ASK, extra_body=GREEDY, **options) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        (use,) = stream.get_final_message().content
    assert len(pieces) > 3
    jsonschema.validate(use.input, CITY)


async def test_the_asynchronous_client_streams_too(stack: RunningStack) -> None:
    async with anthropic.AsyncAnthropic(base_url=stack.url, auth_token=stack.key, api_key=None, max_retries=0) as client:
        stream = await client.messages.create(model=MODEL, messages=QUESTION, max_tokens=8, stream=True)
        kinds = [event.type async for event in stream]
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}


@pytest.mark.parametrize(
    ("fields", "error", "named"),
    [
        ({"model": "claude"}, anthropic.NotFoundError, "claude"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, anthropic.BadRequestError, "messages[0].content[0]"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "It is"}]}, anthropic.BadRequestError, "messages[1]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, anthropic.BadRequestError, "messages[0].role"),
        ({"extra_body": {"temperature": 1.5}}, anthropic.BadRequestError, "temperature"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, anthropic.BadRequestError, "thinking"),
        ({"extra_body": {"container": "c"}}, anthropic.BadRequestError, "container"),
        ({"tool_choice": {"type": "any"}}, anthropic.BadRequestError, "tool_choice"),
        ({"max_tokens": 100_000}, anthropic.BadRequestError, "context"),
    ],
)
def test_refusals_are_the_sdk_s_own_exceptions(client, fields, error, named) -> None:
    with pytest.raises(error) as refusal:
        ask(client, **fields)
    body = refusal.value.body
    assert (body["type"], set(body)) == ("error", {"type", "error", "request_id"})
    assert named in body["error"]["message"]
    assert refusal.value.request_id


def test_a_strange_key_is_refused_in_the_same_shape(stack: RunningStack) -> None:
    with (
        anthropic.Anthropic(base_url=stack.url, api_key="sk-" + "x" * 43, max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError) as refusal,
    ):
        ask(stranger)
    assert refusal.value.body["error"]["type"] == "authentication_error"
