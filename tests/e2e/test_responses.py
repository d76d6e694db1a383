"""`/v1/responses` against the whole stack, on real weights: the `openai` SDK, and the Open Responses specification's models."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import jsonschema
import openai
import openresponses_types.types as spec
import pytest
import websockets
from openai.types.responses import Response

from tests.e2e.conftest import RunningStack

MODEL = "smollm2-135m"
QUESTION = "What is the capital of France? Answer in one sentence."
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "maxLength": 30}},
        "required": ["location"],
        "additionalProperties": False,
    },
}
NAMED = {"type": "function", "name": "get_weather"}
EVENTS = {
    next(iter(model.model_fields["type"].annotation)).value: model
    for name, model in vars(spec).items()
    if name.endswith("StreamingEvent") and hasattr(model, "model_fields")
}


@pytest.fixture
def client(stack: RunningStack):
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.key, max_retries=0, timeout=60) as client:
        yield client


def ask(client: openai.OpenAI, **fields) -> Response:
    asked = {"model": MODEL, "input": QUESTION, "max_output_tokens": 24, "temperature": 0, **fields}
    return client.responses.create(**asked)


def user(content) -> dict:
    return {"type": "message", "role": "user", "content": content}


def check(body: dict) -> None:
    """A response is what the specification and the SDK say, field by field."""
    spec.ResponseResource.model_validate(body)
    Response.model_validate_json(json.dumps(body), strict=True)


# --- What the public compliance suite asks, and of it what a text model can do --------------------------------------------

COMPLIANCE = {
    "basic": {"input": [user("Say hello in exactly 3 words.")]},
    "system prompt": {
        "input": [{"type": "message", "role": "system", "content": "You are a pirate."}, user("Say hello.")],
    },
    "phases": {
        "input": [
            {"type": "message", "role": "assistant", "phase": "commentary", "content": "I should answer with the number."},
            {"type": "message", "role": "assistant", "phase": "final_answer", "content": "The number is four."},
            user("Repeat only the number."),
        ]
    },
    "several turns": {
        "input": [
            user("My name is Alice."),
            {"type": "message", "role": "assistant", "content": "Hello Alice! How can I help you today?"},
            user("What is my name?"),
        ]
    },
    "a tool": {"input": [user("What's the weather like in San Francisco?")], "tools": [WEATHER], "tool_choice": NAMED},
    "every option": {
        "input": [user([{"type": "input_text", "text": "Hi"}])],
        "instructions": "Be short.", "metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k",
        "parallel_tool_calls": False, "max_tool_calls": 1, "truncation": "disabled", "background": False, "store": False,
        "service_tier": "default", "top_p": 0.9, "presence_penalty": 0.1, "frequency_penalty": 0.1, "top_logprobs": 2,
        "include": ["message.output_text.logprobs", "reasoning.encrypted_content"], "reasoning": {"effort": "none"},
        "text": {"format": {"type": "text"}, "verbosity": "low"}, "tools": [WEATHER], "tool_choice": "none",
    },
}  # fmt: skip


@pytest.mark.parametrize("body", COMPLIANCE.values(), ids=COMPLIANCE)
def test_a_response_is_what_the_specification_says(stack: RunningStack, body: dict) -> None:
    sent = {"model": MODEL, "temperature": 0, "max_output_tokens": 60, **body}
    with stack.client() as http:
        answer = http.post("/v1/responses", json=sent)
    assert answer.status_code == 200, answer.text
    check(answer.json())
    assert answer.json()["output"]
    for name in ("metadata", "user", "top_p", "max_tool_calls", "store", "instructions", "prompt_cache_key"):
        assert name not in body or answer.json()[name] == body[name]


def frames(text: str) -> list[dict]:
    """The events of a stream, each of which must be named and end with a blank line; the mark ends it."""
    *blocks, mark, rest = [block for block in text.split("\n\n") if block != ": keep-alive"]
    assert (mark, rest) == ("data: [DONE]", "")
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


@pytest.mark.parametrize("body", COMPLIANCE.values(), ids=COMPLIANCE)
def test_the_events_of_a_stream_are_the_specification_s_and_tell_the_same(stack: RunningStack, body: dict) -> None:
    sent = {"model": MODEL, "temperature": 0, "max_output_tokens": 60, **body}
    with stack.client() as http:
        whole = http.post("/v1/responses", json=sent).json()
        events = frames(http.post("/v1/responses", json={**sent, "stream": True}).text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENTS[event["type"]].model_validate(event)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]["response"]
    check(last)
    assert events[-1]["type"] == f"response.{last['status']}"
    assert [item["type"] for item in last["output"]] == [item["type"] for item in whole["output"]]
    said = "".join(event.get("delta", "") for event in events)
    (item,) = last["output"]
    assert said == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
    assert item == next(event["item"] for event in events if event["type"] == "response.output_item.done")


# --- The SDK ----------------------------------------------------------------------------------------------------------------


def test_a_greedy_answer_is_right_and_counted(client) -> None:
    response = ask(client)
    assert "Paris" in response.output_text
    assert response.id.startswith("resp_")
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert client.responses.input_tokens.count(model=MODEL, input=QUESTION).input_tokens == response.usage.input_tokens


def test_the_sdk_s_own_accumulator_puts_a_stream_together(client) -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=24) as stream:
        final = stream.get_final_response()
    assert final.output_text == ask(client).output_text


def test_an_answer_that_was_cut_short_says_so(client) -> None:
    response = ask(client, max_output_tokens=2)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"


def test_logprobs_come_with_the_text(client) -> None:
    (part,) = ask(client, top_logprobs=2, max_output_tokens=5).output[0].content
    assert len(part.logprobs) == 5
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)


def test_a_json_schema_is_followed(client) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}}
    response = ask(client, text=form, max_output_tokens=60)
    jsonschema.validate(json.loads(response.output_text), schema)
    assert response.text.format.name == "answer"


@pytest.mark.parametrize(
    "choice", ["required", NAMED, {"type": "allowed_tools", "mode": "required", "tools": [NAMED]}], ids=str
)
def test_a_function_is_called_and_its_result_goes_back(client, choice) -> None:
    other = {"type": "function", "name": "unused", "parameters": {}}
    tools = [WEATHER] if choice == "required" else [other, WEATHER]
    options = {"tools": tools, "tool_choice": choice, "max_tool_calls": 1, "max_output_tokens": 100}
    first = ask(client, input="What is the weather in Paris?", **options)
    (call,) = first.output
    assert (call.type, call.name) == ("function_call", "get_weather")
    jsonschema.validate(json.loads(call.arguments), WEATHER["parameters"])
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    by_id = ask(client, previous_response_id=first.id, input=[result])
    by_items = ask(client, input=[user("What is the weather in Paris?"), *first.output, result])
    assert by_id.output_text == by_items.output_text != ""


# --- What is stored ---------------------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_from_what_is_stored_and_cached(client) -> None:
    first = ask(client, input="My favourite colour is green. " * 20, instructions="You are a painter.")
    second = ask(client, previous_response_id=first.id, input="What is it?")
    assert second.usage.input_tokens_details.cached_tokens > 0
    again = client.responses.retrieve(second.id)
    assert again.model_dump() == second.model_dump()
    assert again.instructions is None
    items = list(client.responses.input_items.list(second.id, order="asc", limit=2))
    assert [item.role for item in items] == ["user", "assistant", "user"]
    assert [item.id for item in client.responses.input_items.list(second.id)] == [item.id for item in reversed(items)]
    referred = ask(client, input=[{"type": "item_reference", "id": items[0].id}, user("What is it?")])
    assert referred.usage.input_tokens > 100
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    assert client.responses.retrieve(second.id).id == second.id


def test_a_session_saves_what_it_can_and_nothing_once_it_is_deleted(stack: RunningStack, client) -> None:
    fields = {"input": "My favourite colour is green. " * 20, "max_output_tokens": 4, "store": False}
    named = {**fields, "extra_body": {"session_id": "painter"}}
    ask(client, **fields)  # the organization's own KV has it from now on
    first, second = ask(client, **named), ask(client, **named)
    assert first.usage.input_tokens_details.cached_tokens == 0
    assert (saved := second.usage.input_tokens_details.cached_tokens) > 100
    with stack.client() as http:
        told = http.get("/v1/sessions/painter").json()
        assert (told["turns"], told["saved_tokens"]) == (2, saved)
        assert told["cached_tokens"] == second.usage.total_tokens
        assert http.delete("/v1/sessions/painter").status_code == 200
    assert ask(client, **named).usage.input_tokens_details.cached_tokens == 0


def test_what_is_not_stored_or_another_s_is_not_there(stack: RunningStack, client) -> None:
    hidden = ask(client, store=False, max_output_tokens=1)
    stored = ask(client, max_output_tokens=1)
    key = next(word for word in stack.manage("create_key", "--org", "stranger").split() if word.startswith("sk-"))
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0) as stranger:
        for who, name in ((client, hidden.id), (stranger, stored.id), (client, "resp_never")):
            for act in (who.responses.retrieve, who.responses.delete, who.responses.cancel, who.responses.input_items.list):
                with pytest.raises(openai.NotFoundError) as missing:
                    act(name)
                assert missing.value.code == "not_found"
            with pytest.raises(openai.NotFoundError) as missing:
                ask(who, previous_response_id=name)
            assert (missing.value.code, missing.value.param) == ("previous_response_not_found", "previous_response_id")


def test_a_running_response_is_cancelled_and_kept_as_far_as_it_came(client) -> None:
    seen = []
    for event in ask(client, input="Tell me a long story.", stream=True, max_output_tokens=2000):
        seen.append(event)
        if event.type == "response.output_text.delta" and len(seen) == 12:
            cancelled = client.responses.cancel(event.item_id.replace("msg_", "resp_")[: len("resp_") + 24])
    assert cancelled.status == "cancelled"
    assert seen[-1].type == "response.failed"
    assert seen[-1].response.status == "cancelled"
    assert client.responses.retrieve(cancelled.id).output_text == cancelled.output_text != ""
    assert client.responses.cancel(cancelled.id).status == "cancelled"


def test_a_compaction_stands_for_a_conversation(stack: RunningStack, client) -> None:
    said = [user("We launch on Tuesday."), {"type": "message", "role": "assistant", "content": "Understood: Tuesday."}]
    with stack.client() as http:
        compacted = http.post("/v1/responses/compact", json={"model": MODEL, "input": said, "prompt_cache_key": "c"})
    spec.CompactResource.model_validate(compacted.json())
    assert [item["type"] for item in compacted.json()["output"]] == ["message", "compaction"]
    assert ask(client, input=[*compacted.json()["output"], user("When?")]).status in ("completed", "incomplete")
    forged = {"type": "compaction", "encrypted_content": "gAAAA"}
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, input=[forged, user("When?")])
    assert refusal.value.param == "input[0].encrypted_content"


# --- Over a socket ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def socket(stack: RunningStack):
    url = stack.url.replace("http", "ws") + "/v1/responses"
    async with websockets.connect(url, additional_headers=stack.headers) as connection:
        yield connection


async def turn(connection, **fields) -> list[dict]:
    """The events of one response, or the error."""
    body = {"model": MODEL, "temperature": 0, "max_output_tokens": 12, **fields}
    await connection.send(json.dumps({"type": "response.create", **body}))
    return await events_of(connection)


async def events_of(connection) -> list[dict]:
    ends = ("response.completed", "response.incomplete", "response.failed", "error")
    events = [json.loads(await asyncio.wait_for(connection.recv(), 30))]
    while events[-1]["type"] not in ends:
        events.append(json.loads(await asyncio.wait_for(connection.recv(), 30)))
    return events


async def test_a_socket_tells_what_a_stream_does(stack: RunningStack) -> None:
    async with socket(stack) as connection:
        events = await turn(connection, input=QUESTION)
    async with httpx.AsyncClient(base_url=stack.url, headers=stack.headers, timeout=60) as http:
        sent = {"model": MODEL, "temperature": 0, "max_output_tokens": 12, "input": QUESTION, "stream": True}
        streamed = frames((await http.post("/v1/responses", json=sent)).text)
    assert [event["type"] for event in events] == [event["type"] for event in streamed]
    for event in events:
        EVENTS[event["type"]].model_validate(event)


async def test_a_socket_serves_one_response_after_another(stack: RunningStack) -> None:
    async with socket(stack) as connection:
        for text in ("one", "two"):
            body = {"type": "response.create", "model": MODEL, "max_output_tokens": 4, "input": text, "store": False}
            await connection.send(json.dumps(body))
        first, second = await events_of(connection), await events_of(connection)
    assert first[-1]["response"]["id"] != second[0]["response"]["id"] == second[-1]["response"]["id"]


async def test_what_is_not_stored_lives_as_long_as_the_socket_and_until_a_turn_fails(stack: RunningStack) -> None:
    async with socket(stack) as connection:
        first = (await turn(connection, input="Remember: cobalt.", store=False))[-1]["response"]
        going_on = {"previous_response_id": first["id"], "store": False}
        second = (await turn(connection, input="What?", **going_on))[-1]["response"]
        assert second["usage"]["input_tokens"] > first["usage"]["total_tokens"]
        (failed,) = await turn(connection, input=[{"type": "function_call_output", "call_id": "c", "output": "x"}], **going_on)
        assert (failed["status"], failed["error"]["param"]) == (400, "input[0].call_id")
        (gone,) = await turn(connection, input="What?", **going_on)
        spec.WebSocketErrorEvent.model_validate(gone)
        assert (gone["status"], gone["error"]["code"]) == (404, "previous_response_not_found")
    async with socket(stack) as connection:
        (gone,) = await turn(connection, input="What?", previous_response_id=second["id"], store=False)
        assert gone["error"]["code"] == "previous_response_not_found"
        assert (await turn(connection, input="Start anew.", store=False))[-1]["response"]["output"]


async def test_fields_of_http_have_no_place_on_a_socket(stack: RunningStack) -> None:
    async with socket(stack) as connection:
        for field, value in (("stream", True), ("background", True), ("generate", False), ("temperature", 9)):
            (error,) = await turn(connection, input="x", **{field: value})
            assert (error["type"], error["status"], error["error"]["param"]) == ("error", 400, field)
        await connection.send('{"type": "session.update"}')
        assert json.loads(await connection.recv())["error"]["code"] == "invalid_message"
